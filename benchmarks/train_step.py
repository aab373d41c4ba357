"""One training step in a process of its own: reads a job as JSON, prints seconds, losses and peak memory as JSON.

who: "ours" (through the thoughts) or "hugging_face" (the plain step of transformers on the same tokens without any
thought, loss on the labelled positions only). bfloat16 is autocast over fp32 weights, as in training.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from pathlib import Path

import torch
from transformers.activations import NewGELUActivation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import DEVICE, make_hf, make_model, make_rows
from coconut_fast import Coconut, ops
from coconut_fast.kernels import matmul
from coconut_fast.model import batch as ragged_batch
from coconut_fast.model import coconut, deferred, weight
from coconut_fast.model.batch import RaggedBatch, collate
from coconut_fast.train import buckets
from coconut_fast.train.buckets import bucketed
from coconut_fast.train.graphed import GraphedStep


def plain_gelu(model: Coconut) -> None:
    for block in model.hf.transformer.h:
        block.mlp.act = NewGELUActivation()


def only_torch(*names: str) -> None:
    for name in names:
        ops.BACKENDS[name] = ("torch",)


def keep_everything(model: Coconut) -> None:
    deferred._Cheap.made = lambda self, x: False  # type: ignore[method-assign]


def read_everything(model: Coconut) -> None:
    ragged_batch.used_positions = buckets.used_positions = lambda counts, unread: None


def products_by_onednn(model: Coconut) -> None:
    weight.has_own_products = coconut.has_own_products = lambda tensor, dtype: False


def products_by_mkl(model: Coconut) -> None:
    products_by_onednn(model)
    matmul._linear = None


OWN, EITHER = "our own products, with oneDNN's", "either, with PyTorch's"
# Each saving, and what switches it off. Without the deferring mode the four savings in it are gone: one product per
# weight, products other than PyTorch's, token gradients joined with the head's, norms and GELU computed again.
SAVINGS = {
    "the deferring mode": lambda model: setattr(model, "defer_weight_gradients", False),
    OWN: products_by_onednn,
    EITHER: products_by_mkl,
    "norms and GELU computed again": keep_everything,
    "last layer of read tokens only": read_everything,
    "fused head and loss": lambda model: only_torch("linear_cross_entropy"),
    "attention kernels": lambda model: only_torch("ragged_attention", "ragged_attention_backward", "kv_append"),
    "fused GELU": plain_gelu,
}


def main() -> None:
    job = json.load(sys.stdin)
    device = DEVICE
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=job["dtype"] == "bfloat16")
    vocab = make_hf(job["shape"], layers=1).config.vocab_size
    rows, labels = make_rows(vocab, job["rows"], job["length"], job["thoughts"], job["labelled"])
    if job["who"] == "ours":
        ops.extension().keep_freed_memory()  # as the trainer does
        model = make_model(job["shape"]).train()
        model.settings.parallel_rounds = job.get("parallel_rounds")
        if job.get("without"):
            SAVINGS[job["without"]](model)

        def forward_backward(batch: RaggedBatch, num_items: torch.Tensor | int) -> tuple[torch.Tensor]:
            with autocast():
                value = model(batch=batch, num_items=num_items, loss_only=True).loss
            value.backward()
            return (value.detach(),)

        if device == "cpu" or model.settings.parallel_rounds is not None:
            batch = collate(rows, model.tokens.thought, labels).to(device)
            step = functools.partial(forward_backward, batch, batch.num_targets)
        else:  # as the trainer does, with a batch that comes from the host every time
            batch = bucketed(rows, model.tokens.thought, labels, idle_id=0).pin_memory()
            graphed = GraphedStep(forward_backward, model.parameters(), torch.device(device))
            step = functools.partial(graphed, batch, batch.num_targets)

    else:
        model = make_hf(job["shape"]).to(device).train()
        ids, targets = torch.tensor(rows, device=device), torch.tensor(labels, device=device)
        keep = job["labelled"] + 1

        def step() -> tuple[torch.Tensor]:
            with autocast():
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.float()
                wanted = targets[:, -keep + 1 :].flatten()
                value = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted)
            value.backward()
            return (value.detach(),)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    seconds, losses = [], []
    for _ in range(job.get("rounds", 5)):
        start = finished(device)
        (value,) = step()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(finished(device) - start)
        losses.append(value.item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"seconds": min(seconds), "losses": losses, "peak_bytes": peak}))


def finished(device: str = DEVICE) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
