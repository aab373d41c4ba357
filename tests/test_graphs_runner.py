"""The graph runner's passes, run launch by launch on the CPU: the same answers as the eager runner's."""

from __future__ import annotations

import pytest

from coconut_fast import generate
from coconut_fast.infer import engine
from coconut_fast.infer.graphs import GraphRunner
from tests.families import FAMILIES, make_pair, make_row

PROMPTS = [make_row(n, k, 0, seed) for seed, (n, k) in enumerate([(5, 2), (12, 1), (3, 19), (30, 6), (4, 6)])]
OTHERS = [[4, 5, 6], [7, 94, 8, 9], make_row(6, 0, 0, 9)]  # not `thoughts, one token` at the end: prefilled


@pytest.fixture(params=[{}, {"temperature": 0.8, "seed": 2, "top_k": 30, "num_samples": 2}], ids=["greedy", "sampled"])
def options(request) -> dict:
    return {"max_new_tokens": 11, **request.param}


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_passes_write_what_eager_ones_write(family: str, options: dict, monkeypatch) -> None:
    model, _ = make_pair(family)
    prompts = PROMPTS + OTHERS
    expected = [generate(model, [p], **options).token_ids for p in prompts]
    monkeypatch.setattr(engine, "choose_runner", lambda model: (GraphRunner, "asked for"))
    together = [generate(model, p, **options) for p in (PROMPTS, OTHERS)]
    assert together[0].stats.backend == "graph"
    assert [ids for output in together for ids in output.token_ids] == [ids for answers in expected for ids in answers]


def test_rows_that_end_early_stop_where_they_ended(monkeypatch) -> None:
    model, _ = make_pair("gpt2")
    first = generate(model, [PROMPTS[0]], max_new_tokens=6).token_ids[0]
    model.tokens = type(model.tokens)(start=93, thought=94, end=95, eos=first[3])
    expected = generate(model, PROMPTS, max_new_tokens=11).token_ids
    monkeypatch.setattr(engine, "choose_runner", lambda model: (GraphRunner, "asked for"))
    assert generate(model, PROMPTS, max_new_tokens=11, batch_size=2).token_ids == expected
