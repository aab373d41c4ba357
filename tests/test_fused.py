"""Fused passes, with their kernels in the interpreter, against Hugging Face's body; launches; idle rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from coconut_fast import Coconut, LatentTokens, generate, load, ops
from coconut_fast.infer import engine, runner_cache
from coconut_fast.infer.cuda_graphs import GraphRunner
from coconut_fast.infer.fused import SKINNY_ROWS, FusedPasses, reason_not
from coconut_fast.infer.passes import BUCKETS, HuggingFacePasses, Passes, StaticBatch
from coconut_fast.infer.prefill import prefill
from coconut_fast.infer.sampling import Sampling
from coconut_fast.model.cache import KVCache
from coconut_fast.model.feedback import FEEDBACKS, make_feedback
from tests.compare import assert_as_good_as_torch
from tests.families import FAMILIES, make_hf, make_pair

# They include a sliding window of 7, biases, QK norm and grouped heads.
KNOWN = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
STEPS = 2
KERNELS = Path(__file__).resolve().parents[1] / "kernels"
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Bench:
    """Rows of one model with prefilled prompts, and a batch over them. One row in three has no thoughts, and the first
    is long enough for its attention to be split."""

    def __init__(
        self, model: Coconut, rows: int, make: Callable[..., Passes], sampling: Sampling | None = None
    ) -> None:
        self.cache = KVCache(
            model.num_layers, num_slots=64 * (rows + 2), max_rows=rows + 2, max_length=96, device=model.device
        )
        self.rows = self.cache.alloc(rows)
        prompts = [[(7 * r + i) % 90 + 1 for i in range(3 + 5 * r % 29 if r else 66)] for r in range(rows)]
        with ops.use(None):
            self.hidden = prefill(model, self.cache, self.rows, prompts)
        self.passes = make(model, self.cache, sampling or Sampling())
        dim = model.hf.get_input_embeddings().weight.shape[1]
        size = next(b for b in BUCKETS if b >= rows)
        self.batch = StaticBatch(size, dim, STEPS, torch.float32, model.device)
        self.counts = [r % 3 for r in range(rows)] if rows > 1 else [2]
        self.lengths = [len(p) for p in prompts]
        self.batch.fill(self.rows, self.lengths, self.counts)
        self.batch.hidden[:rows] = self.hidden
        self.cache.reserve(self.rows, [STEPS + c for c in self.counts])

    @torch.inference_mode()
    def think(self) -> torch.Tensor:
        self.passes.think(self.batch, max(self.counts))
        assert self.batch.lengths[: len(self.rows)].tolist() == [
            n + c for n, c in zip(self.lengths, self.counts, strict=True)
        ]
        assert not self.batch.remaining.any()
        return self.batch.hidden[: len(self.rows)].clone()

    @torch.inference_mode()
    def write(self) -> torch.Tensor:
        self.batch.remaining[: len(self.rows)] = torch.tensor([min(STEPS, c) for c in self.counts], dtype=torch.int32)
        self.batch.tokens.copy_(torch.arange(1, self.batch.size + 1))
        for _ in range(STEPS):
            self.passes.decode(self.batch)
        return self.batch.written[: len(self.rows)].clone()

    @torch.inference_mode()
    def feed(self) -> torch.Tensor:
        self.batch.tails[: len(self.rows)] = 1
        self.batch.tokens.copy_(torch.arange(1, self.batch.size + 1))
        self.passes.feed(self.batch)
        return self.batch.hidden[: len(self.rows)].clone()


def hugging_face(model: Coconut, cache: KVCache, sampling: Sampling) -> Passes:
    return HuggingFacePasses(model, cache, sampling, "asked for")


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the kernels launched within the block."""
    from triton.runtime import interpreter, jit

    names: list[str] = []
    target = interpreter.GridExecutor if not torch.cuda.is_available() else jit.JITFunction
    method = "__call__" if not torch.cuda.is_available() else "run"
    original = getattr(target, method)

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    setattr(target, method, counted)
    try:
        yield names
    finally:
        setattr(target, method, original)


@pytest.mark.parametrize(("family", "rows"), [("gpt2", 1), *((f, r) for f in KNOWN for r in (3, 17))])
def test_kernels_agree_with_hugging_face(family: str, rows: int, device) -> None:
    """Thoughts, a fed token and answer tokens, for ragged rows of which some are idle."""
    model, twin = make_pair(family)
    model.to(device)
    plain, ours = Bench(model, rows, hugging_face), Bench(model, rows, FusedPasses)
    truth = _truth(twin, ours)
    expected = plain.think(), plain.feed(), plain.write()
    with ops.use("triton"):
        found = ours.think(), ours.feed(), ours.write()
    still = [r for r, count in enumerate(ours.counts) if count == 0]
    assert torch.equal(found[0][still].cpu(), ours.hidden[still].float().cpu()), "a row without a pass changed"
    assert_as_good_as_torch(found[0].cpu(), expected[0].float().cpu(), truth, what="states after the thoughts")
    assert torch.equal(found[2], expected[2])
    assert (found[1] - expected[1]).abs().max() <= 1e-5 * expected[1].abs().max()


@pytest.mark.parametrize("rows", [2, 5, 18])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_16_bit_states_are_as_good_as_hugging_faces(family: str, rows: int, device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter's bf16 is wrong
    model, twin = make_pair(family, dtype)
    model.to(device)
    plain, ours = Bench(model, rows, hugging_face), Bench(model, rows, FusedPasses)
    with ops.use("triton"):
        found = ours.think()
    assert_as_good_as_torch(
        found.cpu(), plain.think().float().cpu(), _truth(twin, ours), what="states after the thoughts", working=dtype
    )


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("family", KNOWN)
def test_bf16_states_on_a_gpu(family: str, rows: int, device) -> None:
    test_16_bit_states_are_as_good_as_hugging_faces(family, rows, device)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("rows", [1, 8, 20])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_kernels_that_overlap_change_no_bit(family: str, rows: int, monkeypatch) -> None:
    """A kernel that read too early, or a stale line of L1, would change bits. By replay, where kernels follow
    each other immediately, in models deep and small enough for several kernels to be in flight together."""
    depth = {"gpt2": "n_layer", "llama": "num_hidden_layers"}[family]
    prompts = [[(7 * r + i) % 90 + 1 for i in range(9 + r)] + [94] * (1 + 5 * r % 17) + [95] for r in range(rows)]
    states: list[torch.Tensor] = []
    first = GraphRunner.first_tokens
    monkeypatch.setattr(
        GraphRunner, "first_tokens", lambda self, h, d: (states.append(h.clone()), first(self, h, d))[1]
    )

    def answers(count: int) -> list[list[list[int] | None]]:
        model = make_pair(family, torch.bfloat16, **{depth: 12})[0].cuda()
        return [generate(model, prompts, max_new_tokens=12).token_ids for _ in range(count)]

    with monkeypatch.context() as patch:
        for op in (file.stem for file in KERNELS.glob("*.py") if "launch_pdl=" in file.read_text()):
            patch.setattr(f"coconut_fast.kernels.{op}.overlaps", lambda tensor: False)
        expected = answers(1)
    assert answers(30) == expected * 30
    assert len(states) == 31 and all(torch.equal(h, states[0]) for h in states)


def _truth(twin, bench: Bench) -> torch.Tensor:
    """The states after the thoughts, by Hugging Face's model with its own cacheless attention, as good as fp64 gets."""
    double = twin.double()
    states = []
    with torch.no_grad():
        for r, count in enumerate(bench.counts):
            ids = torch.tensor([[(7 * r + i) % 90 + 1 for i in range(bench.lengths[r])]])
            embeds = double.get_input_embeddings()(ids)
            for step in range(count + 1):
                state = double.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1:]
                if step < count:
                    embeds = torch.cat([embeds, state], dim=1)
            states.append(state[0, 0])
    return torch.stack(states)


@pytest.mark.parametrize("rows", [1, SKINNY_ROWS, SKINNY_ROWS + 1])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_launches(family: str, rows: int, device) -> None:
    model = make_pair(family)[0].to(device)
    bench, few = Bench(model, rows, FusedPasses), rows <= SKINNY_ROWS
    bench.counts = [2] * rows
    bench.batch.fill(bench.rows, bench.lengths, bench.counts)
    per_layer = 5 if few else 4  # many: two norms, attention and activation; the library does the four products
    with ops.use("triton"), launches() as names:
        bench.think()
    between = [i for i, name in enumerate(names) if name == "_feed"]
    assert len(between) == 3, "a launch in front of each pass, and one that ends the chain"
    for start, stop in pairwise(between):
        assert stop - start - 1 == model.num_layers * per_layer + (not few)
    with ops.use("triton"), torch.inference_mode(), launches() as names:
        bench.passes.decode(bench.batch)
    assert names[0] == "_feed" and names[-4:] == ["_norm", "_head", "_largest", "_accept"]
    assert len(names) == 1 + model.num_layers * per_layer + (not few) + 4


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_feedbacks(feedback: str, device) -> None:
    model = make_pair("gpt2", activation_function="gelu")[0]
    model.feedback = make_feedback(feedback, model.hf.get_input_embeddings())
    model.to(device)
    expected = Bench(model, 3, hugging_face).think()
    with ops.use("triton"):
        found = Bench(model, 3, FusedPasses).think()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_row_that_stands_still_writes_nothing_to_the_cache(device) -> None:
    bench = Bench(make_pair("gpt2")[0].to(device), 4, FusedPasses)
    before = [t.clone() for t in (*bench.cache.keys, *bench.cache.values)]
    with ops.use("triton"):
        bench.think()
    page, table = bench.cache.page_size, bench.cache.page_table
    written = torch.zeros(bench.cache.num_slots, dtype=torch.bool)
    for row, length, count in zip(bench.rows, bench.lengths, bench.counts, strict=True):
        for p in range(length, length + count):
            written[int(table[row, p // page]) * page + p % page] = True
    for store, old in zip((*bench.cache.keys, *bench.cache.values), before, strict=True):
        # compared as bits: unwritten slots hold whatever the memory held, NaN included
        changed = (store.cpu().view(torch.int32) != old.cpu().view(torch.int32)).flatten(1).any(1)
        assert torch.equal(changed, written)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_golden_tokens(golden: Path, architecture: str, monkeypatch) -> None:
    """The official code's greedy answers, by replayed passes, in groups of prompts of one form."""
    monkeypatch.setattr(engine, "choose_runner", lambda model: (runner_cache.acquire, "asked for"))
    _assert_golden_tokens(golden / architecture, "cpu")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_golden_tokens_on_a_gpu(golden: Path, architecture: str) -> None:
    _assert_golden_tokens(golden / architecture, "cuda")


def _assert_golden_tokens(folder: Path, device: str) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    ids = LatentTokens(start=meta["start_id"], thought=meta["latent_id"], end=meta["end_id"], eos=meta["eos_id"])
    model = load(folder, tokens=ids, device=device)
    for case in meta["cases"].values():
        rows = case["generate"]
        output = generate(model, [r["prompt"] for r in rows], max_new_tokens=24)
        assert output.stats.backend == "graph" and "fused kernels" in output.stats.reason
        for row, answer in zip(rows, output.token_ids, strict=True):
            expected = row["tokens"][len(row["prompt"]) :]
            expected = expected[: expected.index(meta["eos_id"])] if meta["eos_id"] in expected else expected
            assert answer == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_who_has_fused_passes(family: str) -> None:
    reason = reason_not(make_pair(family)[0])
    assert (reason is None) == (family in KNOWN), reason


def test_reasons() -> None:
    tokens = make_pair("gpt2")[0].tokens
    assert "float64" in (reason_not(make_pair("gpt2", torch.float64)[0]) or "")
    assert "activation 'relu' without a gate" in (
        reason_not(Coconut(make_hf("gpt2", activation_function="relu"), tokens)) or ""
    )
    with pytest.raises(ValueError, match="has no fused passes: the model is torch.float64"):
        FusedPasses(make_pair("gpt2", torch.float64)[0], KVCache(2, num_slots=16), Sampling())


@pytest.mark.parametrize("through_data", [False, True])  # as averaged weights are swapped in: versions stay the same
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_written_in_place_are_taken_up_at_the_same_addresses(family: str, through_data: bool) -> None:
    model = make_pair(family)[0]
    bench = Bench(model, 3, FusedPasses)
    passes = bench.passes
    where = [t.data_ptr() for layer in passes.layers for t in layer.named().values()]
    with torch.no_grad():
        for p in model.parameters():
            (p.data if through_data else p).mul_(1.5)
    passes.refresh()
    assert [t.data_ptr() for layer in passes.layers for t in layer.named().values()] == where
    fresh = Bench(model, 3, FusedPasses)
    bench.batch.hidden[:3] = fresh.hidden
    for index, layer in enumerate(passes.layers):
        for name, tensor in layer.named().items():
            assert torch.equal(tensor, getattr(fresh.passes.layers[index], name)), name
