"""Passes can be captured: while they run, nothing is copied between host and device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coconut_fast.infer.passes import HuggingFacePasses, StaticBatch, StaticPrompts
from coconut_fast.infer.prefill import prefill
from coconut_fast.infer.sampling import Sampling
from coconut_fast.model.cache import KVCache
from coconut_fast.model.feedback import FEEDBACKS, make_feedback
from tests.families import FAMILIES, make_pair

# Operations that read a value, make a tensor from the host's numbers, or have a data-dependent shape.
WORDS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "lift_fresh", "nonzero", "masked_select", "_unique2",
    "unique_consecutive", "repeat_interleave", "bincount",
}  # fmt: skip


class Listener(TorchDispatchMode):
    """Notes which operations within the block synchronise host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = [i for i in args[1] if i is not None] if name in ("index", "index_put_") else []
        if name in WORDS or any(i.dtype == torch.bool for i in indices):
            self.heard.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inference", [False, True])
def test_the_listener_hears(inference: bool) -> None:
    """In inference mode too, where reading a value is another operation."""
    x = torch.arange(3)
    with torch.inference_mode(inference), Listener() as listener:
        int(x[0]), x[x > 1], torch.tensor([1, 2]), bool((x == 1).all()), x[0].item()
    read = "_local_scalar_dense"
    reads = ["item", "is_nonzero", "item"] if inference else [read] * 3
    assert listener.heard == [reads[0], "index", "lift_fresh", *reads[1:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 30, 0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_faces_body_keeps_to_the_device(family: str, sampling: Sampling, dtype: torch.dtype) -> None:
    silent(family, "identity", sampling, dtype)


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_feedbacks_keep_to_the_device(feedback: str) -> None:
    silent("gpt2", feedback, Sampling())


@torch.inference_mode()
def silent(family: str, feedback: str, sampling: Sampling, dtype: torch.dtype = torch.float32) -> None:
    model, _ = make_pair(family, dtype)
    model.feedback = make_feedback(feedback, model.hf.get_input_embeddings())
    cache = KVCache(model.num_layers, num_slots=128, max_rows=8, max_length=64)
    rows = cache.alloc(2)
    hidden_BD = prefill(model, cache, rows, [[3, 4, 5], [6, 7]])
    passes = HuggingFacePasses(model, cache, sampling, "asked for")
    batch = StaticBatch(2, hidden_BD.shape[1], 2, torch.float32, model.device)
    batch.fill(rows, [3, 2], [3, 1], [9, None], fresh=1)
    batch.hidden.copy_(hidden_BD)
    prompts = StaticPrompts((3, 2, 2), hidden_BD.shape[1], torch.float32, model.device)
    tails = cache.alloc(2)
    prompts.fill(tails, [[3, 4], [6]], [2, 1], cache.reserve(tails, [2, 1]), [0, 1])
    cache.reserve(rows, [4, 4])
    with Listener() as listener:
        passes.prefill(prompts)
        passes.think(batch, 2)
        passes.feed(batch)
        passes.decode(batch)
        passes.begin(batch)
    assert listener.heard == []
    assert batch.lengths.tolist() == [7, 3]
