"""Prompts prefilled by the fused kernels, in the interpreter, against Hugging Face's body: states, cache, padding."""

from __future__ import annotations

import pytest
import torch

from coconut_fast import Coconut, ops
from coconut_fast.infer.cuda_graphs import prompt_sizes
from coconut_fast.infer.fused import FusedPasses
from coconut_fast.infer.passes import StaticPrompts
from coconut_fast.infer.prefill import prefill
from coconut_fast.infer.sampling import Sampling
from coconut_fast.model.cache import KVCache
from tests.compare import assert_as_good_as_torch
from tests.families import make_pair
from tests.test_fused import KNOWN, launches

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
# The second call continues the first one's rows, as tokens after thoughts do; one row has none.
FIRST, THEN = [[5, 6, 7], [8], [9] * 21, [3, 4]], [[11, 12], [13] * 9, [14]]


class Reader:
    """Rows of a cache whose unwritten slots hold NaN, prefilled by fused passes at graphs' sizes, or by `prefill`."""

    def __init__(self, model: Coconut, fused: bool) -> None:
        self.model = model
        self.cache = KVCache(model.num_layers, num_slots=256, max_rows=6, max_length=64, device=model.device)
        self.rows = self.cache.alloc(len(FIRST))
        self.passes = FusedPasses(model, self.cache, Sampling()) if fused else None
        self.warm = False
        if fused:
            for storage in (*self.cache.keys, *self.cache.values):
                storage.fill_(float("nan"))

    @torch.inference_mode()
    def read(self, tokens: list[list[int]], extra: int = 0) -> torch.Tensor:
        rows = self.rows[: len(tokens)]
        if self.passes is None:
            return prefill(self.model, self.cache, rows, tokens).float()
        counts = [len(t) for t in tokens]
        total, count, longest = prompt_sizes(sum(counts), len(tokens), max(counts))
        size = (total + extra, count, longest)
        dim = self.model.hf.get_input_embeddings().weight.shape[1]
        prompts = StaticPrompts(size, dim, torch.float32, self.model.device)
        slots = self.cache.reserve(rows, counts)
        lengths = [int(self.cache.layout.lengths[r]) for r in rows]
        prompts.fill(rows, tokens, lengths, slots, range(len(rows)))
        with ops.use("triton"):
            if not self.warm:
                with prompts.at_rest():
                    self.passes.prefill(prompts)
                self.warm = True
            self.passes.prefill(prompts)
        return prompts.hidden[: len(rows)].clone()

    def written(self) -> torch.Tensor:
        """(2 layers, tokens, kv heads * head dim): what the cache holds of all rows."""
        table, page = self.cache.page_table, self.cache.page_size
        slots = [
            int(table[r, p // page]) * page + p % page
            for r in self.rows
            for p in range(int(self.cache.layout.lengths[r]))
        ]
        return torch.stack([t[slots].flatten(1) for t in (*self.cache.keys, *self.cache.values)])


@pytest.mark.parametrize("family", KNOWN)
def test_states_and_cache_are_hugging_faces(family: str, device) -> None:
    model = make_pair(family)[0].to(device)
    plain, ours = Reader(model, False), Reader(model, True)
    for tokens in (FIRST, THEN):
        expected, found = plain.read(tokens), ours.read(tokens)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        expected = plain.written()
        assert (ours.written() - expected).abs().max() <= 1e-5 * expected.abs().max()
    held = sum(len(t) for t in (*FIRST, *THEN))
    for storage in (*ours.cache.keys, *ours.cache.values):
        assert int(storage.isfinite().flatten(1).all(1).sum()) == held, "what pads a bucket is written nowhere"


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_16_bit_states_are_as_good_as_hugging_faces(family: str, device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter's bf16 is wrong
    model, twin = make_pair(family, dtype)
    model.to(device)
    double = twin.double()
    with torch.no_grad():
        states = [double.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1] for ids in FIRST]
    found, plain = Reader(model, True).read(FIRST), Reader(model, False).read(FIRST)
    assert_as_good_as_torch(found.cpu(), plain.cpu(), torch.stack(states), what="states", working=dtype)


def test_what_pads_a_bucket_changes_no_bit(device) -> None:
    model = make_pair("llama")[0].to(device)
    one, other = Reader(model, True), Reader(model, True)
    for tokens in (FIRST, THEN):
        assert torch.equal(one.read(tokens), other.read(tokens, extra=32))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_launches(family: str, device) -> None:
    """Five of our kernels per layer (and four products), between the embeddings and the last norm (two launches)."""
    model = make_pair(family)[0].to(device)
    reader = Reader(model, True)
    reader.read(FIRST)
    with launches() as names:
        reader.read(THEN)
    layer = ["_norm", "_append", "_forward", "_norm", "_activate"]
    assert names == ["_feed", *layer, *(n.replace("_forward", "_decode") for n in layer), "_norm", "_norm"]


@pytest.mark.parametrize(
    ("needed", "size"),
    [
        ((1, 1, 1), (16, 1, 16)),
        ((64, 1, 64), (64, 1, 64)),
        ((65, 2, 60), (128, 4, 128)),
        ((1024, 5, 300), (1024, 16, 512)),
        ((1025, 5, 300), (1536, 16, 512)),
        ((1537, 65, 600), (2048, 256, 1024)),
        ((16384, 256, 64), (16384, 256, 256)),
    ],
)
def test_sizes(needed: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    assert prompt_sizes(*needed) == size
