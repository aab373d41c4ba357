"""Curriculum rows: equal to the official code's for the methods it has, and as in the papers for the others."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from itertools import chain

import pytest

from coconut_fast.data.curriculum import METHODS, CurriculumConfig, num_slots, question_row, row_rng, training_row
from coconut_fast.data.examples import Example, TokenizedExample, tokenize_examples
from coconut_fast.tokens import END_LATENT, LATENT, START_LATENT, LatentTokens
from coconut_fast.train.arguments import CoconutArguments

TOKENS = LatentTokens(start=91, end=92, thought=93, eos=94, pause=95)
BARE = LatentTokens(thought=93)
ROW = TokenizedExample([1, 2, 3], [[10, 11], [20], [30, 31, 32]], [40, 41, 94], idx=7)
NODES = TokenizedExample([1, 2], [[10], [20], [30]], [40, 30, 94], frontiers=[[10, 11], [20, 21, 22], [30]], cue=1)


def test_equal_to_the_official_code(golden):
    from transformers import AutoTokenizer

    folder = golden / "curriculum"
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens([START_LATENT, END_LATENT, LATENT])
    expected = json.loads((folder / "expected.json").read_text())
    ids = expected["ids"]
    tokens = LatentTokens(start=ids["start"], end=ids["end"], thought=ids["latent"], eos=ids["eos"])
    assert tokenizer.convert_tokens_to_ids([START_LATENT, END_LATENT, LATENT]) == [
        tokens.start,
        tokens.end,
        tokens.thought,
    ]
    sets = {name: tokenize_examples([Example(**r) for r in expected[name]], tokenizer) for name in ("prosqa", "gsm")}
    assert len(expected["sets"]) > 200
    seen = set()
    for case in expected["sets"]:
        config = CurriculumConfig(
            method=case["method"],
            c_thought=case["c_thought"],
            max_latent_stage=case["max_latent_stage"],
            pad_latent_to_max=case["pad_latent_to_max"],
        )
        examples = sets[case["data"]]
        assert len(examples) == len(case["train"]) == len(case["question"])
        for example, train, question in zip(examples, case["train"], case["question"], strict=True):
            what = f"{config}, stage {case['stage']}, example {example.idx}"
            row = training_row(example, case["stage"], config, tokens)
            assert row == (train["input_ids"], train["labels"]), what
            assert question_row(example, case["stage"], config, tokens) == question, what
        seen.add((case["method"], case["stage"]))
    assert {method for method, _ in seen} == {"coconut", "no_thoughts", "no_cot", "cot"}


def row(method, stage, tokens=TOKENS, rng=None, example=ROW, **settings):
    ids, labels = training_row(example, stage, CurriculumConfig(method, **settings), tokens, rng)
    given = labels.count(-100)
    assert labels == [-100] * given + ids[given:]
    return ids[:given], ids[given:]


def test_pause_token():
    for stage in (0, 1, 9):
        assert row("pause", stage, c_thought=2, max_latent_stage=2) == ([1, 2, 3] + [95] * 4, [40, 41, 94])
    assert row("pause", 0, max_latent_stage=5, pad_latent_to_max=False)[0] == [1, 2, 3] + [95] * 3
    assert question_row(ROW, 0, CurriculumConfig("pause", max_latent_stage=2), TOKENS) == [1, 2, 3, 95, 95]


def test_pause_as_thought_is_coconut_with_pause_tokens():
    for stage in range(6):
        settings = {"c_thought": 2, "max_latent_stage": 4}
        coconut = training_row(ROW, stage, CurriculumConfig("coconut", **settings), TOKENS)
        single = training_row(ROW, stage, CurriculumConfig("pause_as_thought", **settings), TOKENS)
        multi = training_row(ROW, stage, CurriculumConfig("pause_as_thought_multipass", **settings), TOKENS)
        assert multi == coconut
        assert single == ([95 if t == 93 else t for t in coconut[0]], coconut[1])
        assert (93 in coconut[0]) == (stage > 0)


def test_no_curriculum_trains_in_the_last_stage():
    for stage in (0, 2, 9):
        assert row("no_curriculum", stage, max_latent_stage=2) == ([1, 2, 3, 91, 93, 93, 92], [40, 41, 94])
        config = CurriculumConfig("no_curriculum", max_latent_stage=2)
        assert question_row(ROW, stage, config, TOKENS) == [1, 2, 3, 91, 93, 93, 92]


def test_icot_removes_leading_tokens():
    steps = list(chain.from_iterable(ROW.steps_ids))
    for stage in range(4):
        assert row("icot", stage, tokens_per_stage=2) == ([1, 2, 3], [*steps[2 * stage :], 40, 41, 94])
    assert row("icot", 2, tokens_per_stage=1, max_latent_stage=1) == ([1, 2, 3], [40, 41, 94])
    assert question_row(ROW, 5, CurriculumConfig("icot"), TOKENS) == [1, 2, 3]


def test_icot_removal_smoothing_is_geometric():
    example = TokenizedExample([1], [list(range(100, 160))], [40])
    config = CurriculumConfig("icot", tokens_per_stage=3, removal_smoothing=1.0)
    extra = Counter()
    n = 4000
    for idx in range(n):
        ids, _ = training_row(example, 2, config, TOKENS, row_rng(0, 0, idx))
        extra[60 - (len(ids) - 2) - 6] += 1
    for o in range(4):
        p = (1 - math.exp(-1)) * math.exp(-o)
        assert abs(extra[o] / n - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert min(extra) == 0


def test_markers_stand_where_asked_for():
    assert row("coconut", 1) == ([1, 2, 3, 91, 93, 92], [20, 30, 31, 32, 40, 41, 94])
    assert row("coconut", 1, markers=False)[0] == [1, 2, 3, 93]
    assert row("coconut", 1, tokens=BARE)[0] == [1, 2, 3, 93]  # a model trained without markers
    assert row("pause", 0, max_latent_stage=1, markers=True)[0] == [1, 2, 3, 91, 95, 92]
    with pytest.raises(ValueError, match=r"markers: asked for, but tokens\.start"):
        row("coconut", 1, tokens=BARE, markers=True)
    with pytest.raises(ValueError, match=r"tokens.pause: found None.*'pause'"):
        row("pause", 1, tokens=BARE)


@pytest.mark.parametrize("method", METHODS)
def test_question_row_is_the_given_part_of_the_final_training_row(method):
    for pad in (True, False):
        config = CurriculumConfig(method, c_thought=2, max_latent_stage=5, pad_latent_to_max=pad)
        ids, labels = training_row(ROW, 6, config, TOKENS)
        question = question_row(ROW, 6, config, TOKENS)
        assert question == ids[: labels.count(-100)]
        assert num_slots(ROW, 6, config) == sum(t in (93, 95) for t in question)


def test_superposition_targets():
    settings = {"max_latent_stage": 3, "markers": False, "example": NODES}
    seen = {stage: set() for stage in range(3)}
    for stage in range(3):
        given = [1, 2] + [93] * stage
        assert row("coconut", stage, target="next_node", **settings) == (given, NODES.steps_ids[stage])
        for idx in range(60):
            found, asked = row("coconut", stage, target="random_frontier", rng=row_rng(1, 0, idx), **settings)
            assert found == given
            seen[stage].update(asked)
    assert [sorted(seen[stage]) for stage in range(3)] == NODES.frontiers
    for target in ("next_node", "random_frontier"):
        for stage in (3, 4):
            answer = row("coconut", stage, target=target, rng=row_rng(0, 0, 0), **settings)
            assert answer == ([1, 2, 93, 93, 93, 40], [30, 94])
        config = CurriculumConfig(max_latent_stage=3, markers=False, target=target)
        assert question_row(NODES, 3, config, TOKENS) == [1, 2, 93, 93, 93, 40]
        # a model trained up to four hops, on a chain of three
        own = CurriculumConfig(max_latent_stage=4, pad_latent_to_max=False, markers=False, target=target)
        assert training_row(NODES, 4, own, TOKENS, row_rng(0, 0, 0))[0] == [1, 2, 93, 93, 93, 40, 30, 94]
        assert question_row(NODES, 9, own, TOKENS) == [1, 2, 93, 93, 93, 40]
    with pytest.raises(ValueError, match="needs a frontier at stage 1, example 7 has none"):
        row("coconut", 1, target="random_frontier", rng=row_rng(0, 0, 0))


def stages_used(config, stage, n=3000):
    """How often each number of slots was used, over n rows."""
    used = Counter(training_row(ROW, stage, config, TOKENS, row_rng(3, 1, idx))[0].count(93) for idx in range(n))
    return {slots: count / n for slots, count in used.items()}


def test_uniform_prob_draws_from_all_stages_of_the_example():
    used = stages_used(CurriculumConfig(uniform_prob=0.4, max_latent_stage=5), 5)
    assert sorted(used) == [0, 1, 2, 3, 5]
    for slots in range(4):
        assert abs(used[slots] - 0.1) < 4 * math.sqrt(0.09 / 3000)


def test_replay_draws_from_earlier_stages():
    used = stages_used(CurriculumConfig(replay_prob=0.4, max_latent_stage=2), 9)
    # rows past the last stage have two thoughts as well, so stages 2 and 9 count together here
    assert sorted(used) == [0, 1, 2]
    for slots in range(2):
        assert abs(used[slots] - 0.4 / 3) < 4 * math.sqrt(0.4 / 3 * (1 - 0.4 / 3) / 3000)
    assert stages_used(CurriculumConfig(replay_prob=1.0), 0, n=50) == {0: 1.0}
    both = stages_used(CurriculumConfig(uniform_prob=0.3, replay_prob=0.6, max_latent_stage=2), 2)
    for slots in range(2):
        assert abs(both[slots] - (0.3 / 4 + 0.6 / 2)) < 4 * math.sqrt(0.25 / 3000), "each takes its share"


def test_random_rows_depend_on_seed_epoch_and_example_alone():
    config = CurriculumConfig(uniform_prob=0.5, replay_prob=0.5)
    rows = [training_row(ROW, 3, config, TOKENS, row_rng(0, 2, idx)) for idx in range(50)]
    again = [training_row(ROW, 3, config, TOKENS, row_rng(0, 2, idx)) for idx in reversed(range(50))]
    assert rows == again[::-1]
    for other in ((1, 2), (0, 3)):
        assert rows != [training_row(ROW, 3, config, TOKENS, row_rng(*other, idx)) for idx in range(50)]
    with pytest.raises(ValueError, match="rng: found None"):
        training_row(ROW, 3, config, TOKENS)


def test_rows_do_not_share_lists_with_the_example():
    before = repr(ROW)
    for method in METHODS:
        ids, labels = training_row(ROW, 0, CurriculumConfig(method), TOKENS)
        question = question_row(ROW, 0, CurriculumConfig(method), TOKENS)
        ids.append(0), labels.append(0), question.append(0)
    assert repr(ROW) == before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "cocnut"}, "method: found 'cocnut', expected one of coconut, "),
        ({"target": "node"}, "target: found 'node', expected one of chain"),
        ({"c_thought": -1}, "c_thought: found -1, expected 0 or more"),
        ({"c_thought": 1.5}, "c_thought: found 1.5, expected 0 or more, a whole number"),
        ({"max_latent_stage": "2"}, "max_latent_stage: found '2', expected 0 or more, a whole number"),
        ({"uniform_prob": "0.3"}, "uniform_prob: found '0.3', expected a probability"),
        ({"uniform_prob": 1.5}, "uniform_prob: found 1.5, expected a probability"),
        ({"uniform_prob": 0.7, "replay_prob": 0.7}, r"uniform_prob \+ replay_prob: .*at most 1"),
        ({"method": "icot", "removal_smoothing": 0}, "removal_smoothing: found 0"),
        ({"method": "icot", "target": "next_node"}, "target: found 'next_node', expected 'chain' for method 'icot'"),
    ],
)
def test_a_senseless_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CurriculumConfig(**settings)


def test_a_negative_stage_is_refused():
    for make in (training_row, question_row):
        with pytest.raises(ValueError, match="stage: found -1"):
            make(ROW, -1, CurriculumConfig(), TOKENS)


def test_defaults_never_change() -> None:
    """A checkpoint stores only what differs from them: another default would change the meaning of all older ones."""
    found = asdict(CurriculumConfig())
    assert found == {
        "method": "coconut",
        "c_thought": 1,
        "max_latent_stage": 6,
        "pad_latent_to_max": True,
        "uniform_prob": 0.0,
        "replay_prob": 0.0,
        "target": "chain",
        "markers": None,
        "tokens_per_stage": 8,
        "removal_smoothing": math.inf,
    }
    assert asdict(CoconutArguments().curriculum()) == found
