"""Each Triton op on a GPU: its time against the limit (bytes or operations over measured rates) and against PyTorch.

    pytest benchmarks/bench_ops.py [--results FOLDER]

A figure is the time of one launch in the replay of a CUDA graph over several sets of inputs, together larger than L2,
so that launch gaps and cached weights do not count. Correctness first: an op whose results, or what it writes in place,
differ from its reference's is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks.timing import gpu_limits, seconds_of
from coconut_fast import ops
from coconut_fast.model.layer_norm import SHARES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE, DTYPE = "cuda", torch.bfloat16
COPIES = ("kv_append", "kv_gather", "transpose")
SETS_BYTES = 200 << 20  # more than three times the L2 of an H200


@dataclass
class Work:
    """One call on one set of inputs: what it must move and compute, and the same by PyTorch alone."""

    op: str
    given: dict[str, Any]
    moved: float
    flops: float = 0.0
    peer: Callable[[], Any] | None = None
    graphed_peer: bool = True

    def run(self) -> Any:
        return getattr(ops, self.op)(**self.given, backend="triton")


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def _rows(batch: int, length: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    pages = -(-length // 16)
    table = torch.randperm(batch * pages, dtype=torch.int32).view(batch, pages).to(DEVICE)
    return {
        "keys": _random(batch * pages * 16, kv_heads, head_dim),
        "values": _random(batch * pages * 16, kv_heads, head_dim),
        "page_table": table,
        "rows": torch.arange(batch, dtype=torch.int32, device=DEVICE),
        "lengths": torch.full((batch,), length, dtype=torch.int32, device=DEVICE),
        "page_size": 16,
        "scaling": head_dim**-0.5,
        "max_length": length,
    }


def _dense(batch: int, length: int, heads: int, kv_heads: int, head_dim: int, queries: int) -> Callable[[], Any]:
    """SDPA on contiguous rows of one length: a baseline that shows the cost of the cache's layout."""
    q, k, v = (_random(batch, h, n, head_dim) for h, n in ((heads, queries), (kv_heads, length), (kv_heads, length)))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=heads != kv_heads)


def decode(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> Work:
    given = _rows(batch, length, kv_heads, head_dim) | {"query": _random(batch, heads, head_dim)}
    given["counters"] = torch.zeros(batch * heads, dtype=torch.int32, device=DEVICE)
    moved = 2 * batch * (2 * length * kv_heads + 2 * heads) * head_dim
    return Work("decode_attention", given, moved, peer=_dense(batch, length, heads, kv_heads, head_dim, 1))


def prefill(batch: int, length: int, heads: int, kv_heads: int, head_dim: int, backward: bool = False) -> Work:
    given = _rows(batch, length, kv_heads, head_dim) | {"query": _random(batch * length, heads, head_dim)}
    given["row_offsets"] = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * length
    given["max_query"] = length
    moved = 2 * batch * length * (2 * kv_heads + 2 * heads) * head_dim
    flops = 2 * batch * heads * length * length * head_dim  # half of 4 L L K under the causal mask
    if not backward:
        peer = _dense(batch, length, heads, kv_heads, head_dim, length)
        return Work("ragged_attention", given, moved, flops, peer)
    given["out"], given["lse"] = ops.ragged_attention(**given)
    given["grad_out"] = _random(batch * length, heads, head_dim)
    given |= {f"grad_{n}": torch.zeros(given[n].shape, device=DEVICE) for n in ("keys", "values")}
    q, k, v = (_random(batch, h, length, head_dim).requires_grad_() for h in (heads, kv_heads, kv_heads))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    grad = torch.randn_like(out)
    return Work(
        "ragged_attention_backward", given, 3 * moved, 2.5 * flops,
        lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), graphed_peer=False,
    )  # fmt: skip


def append(tokens: int, kv_heads: int, head_dim: int) -> Work:
    key, value, store = _random(tokens, kv_heads, head_dim), _random(tokens, kv_heads, head_dim), 2 * tokens
    keys, values = _random(store, kv_heads, head_dim), _random(store, kv_heads, head_dim)
    slots = torch.randperm(store, device=DEVICE)[:tokens]

    def plain() -> None:
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)

    given = {"key": key, "value": value, "slots": slots, "keys": keys, "values": values}
    return Work("kv_append", given, 8 * key.numel(), peer=plain)


def linear(rows: int, inputs: int, outputs: int, **keywords: Any) -> Work:
    wide = 2 * outputs if keywords.get("activation") == "swiglu" else outputs
    x, weight = _random(rows, inputs), _random(wide, inputs) * inputs**-0.5
    return Work(
        "skinny_linear", {"x": x, "weight": weight} | keywords, 2 * weight.numel(), peer=lambda: F.linear(x, weight)
    )


def head(batch: int, dim: int, vocabulary: int, **keywords: Any) -> Work:
    hidden, weight = _random(batch, dim), _random(vocabulary, dim) * dim**-0.5
    if keywords:
        keywords["numbers"] = torch.rand(batch, dtype=torch.float64, device=DEVICE)
    given = {"hidden": hidden, "weight": weight} | keywords
    return Work("lm_head_sample", given, 2 * weight.numel(), peer=lambda: F.linear(hidden, weight).argmax(-1))


def norm(rows: int, dim: int) -> Work:
    x, weight, residual = _random(rows, dim), _random(dim), torch.randn(rows, dim, device=DEVICE)
    given = {"x": x, "weight": weight, "residual": residual}
    return Work(
        "residual_norm", given, 12 * x.numel(), peer=lambda: F.layer_norm((residual + x).to(DTYPE), (dim,), weight)
    )


def mlp(rows: int, inner: int) -> Work:
    x = _random(rows, 2 * inner)

    def plain() -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    return Work("gated_mlp", {"x": x, "activation": "swiglu"}, 6 * rows * inner, peer=plain)


def feedback(batch: int, dim: int) -> Work:
    def ints(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(batch, dtype=dtype, device=DEVICE)

    given = {
        "source": _random(batch, dim), "last": torch.arange(batch, device=DEVICE), "next_input": _random(batch, dim),
        "positions": ints(torch.int64), "lengths": ints(torch.int32),
        "position_embedding": _random(1 << 12, dim),
    }  # fmt: skip
    return Work("latent_feedback", given, 6 * batch * dim)


def accept(batch: int) -> Work:
    def ints(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=DEVICE)

    given = {
        "ids": ints(batch), "tokens": ints(batch), "written": ints(batch, 1 << 16), "step": ints(1), "eos": -1,
        "remaining": ints(batch, dtype=torch.int32), "attended": torch.ones(batch, dtype=torch.int32, device=DEVICE),
    }  # fmt: skip
    return Work("accept_tokens", given, 40 * batch)


def gather(tokens: int, kv_heads: int, head_dim: int) -> Work:
    keys, values = (torch.randn(2 * tokens, kv_heads, head_dim, device=DEVICE) for _ in range(2))
    slots = torch.randperm(2 * tokens, device=DEVICE)[:tokens]
    given = {"keys": keys, "values": values, "slots": slots, "dtype": DTYPE}
    return Work(
        "kv_gather", given, 6 * keys.numel(), peer=lambda: [t.index_select(0, slots).to(DTYPE) for t in (keys, values)]
    )


def trained_norm(rows: int, dim: int, backward: bool = False) -> Work:
    x, weight, bias = (torch.randn(*shape, device=DEVICE) for shape in ((rows, dim), (dim,), (dim,)))
    given = {"x": x, "weight": weight, "bias": bias, "eps": 1e-5, "dtype": DTYPE}
    if not backward:
        peer = lambda: F.layer_norm(x, (dim,), weight, bias).to(DTYPE)  # noqa: E731
        return Work("layer_norm", given, 10 * x.numel(), peer=peer)
    statistics = ops.layer_norm(**given)[2]
    mean, scale = statistics.unsqueeze(-1).unbind(1)
    grad, other = _random(rows, dim), torch.randn(rows, dim, device=DEVICE)
    sums = torch.zeros(SHARES, 2, dim, device=DEVICE)
    given = {"grad_normed": None, "grad_rounded": grad, "other": other, "x": x, "weight": weight}

    def plain() -> torch.Tensor:
        args = grad.float(), x, [dim], mean, scale, weight, bias
        return torch.ops.aten.native_layer_norm_backward(*args, [True] * 3)[0] + other

    given |= {"statistics": statistics, "sums": sums, "dtype": DTYPE}
    return Work("layer_norm_backward", given, 16 * x.numel() + 8 * sums.numel(), peer=plain)


def columns(rows: int, width: int) -> Work:
    x, sums = _random(rows, width), torch.zeros(64, width, device=DEVICE)
    given = {"x": x, "sums": sums}
    return Work("column_sums", given, 2 * x.numel() + 8 * sums.numel(), peer=lambda: x.sum(0, dtype=torch.float32))


def losses(rows: int, vocabulary: int, backward: bool = False) -> Work:
    logits, targets = _random(rows, vocabulary + 44), torch.randint(0, vocabulary, (rows,), device=DEVICE)
    given = {"logits": logits, "targets": targets, "vocabulary": vocabulary}
    cut = logits[:, :vocabulary]
    if not backward:
        peer = lambda: F.cross_entropy(cut, targets, reduction="none")  # noqa: E731
        return Work("cross_entropy", given, 2 * logits.numel(), peer=peer)
    given |= {"statistics": ops.cross_entropy(**given)[1], "grad": torch.ones((), device=DEVICE)}
    leaf = cut.clone().requires_grad_()
    total = F.cross_entropy(leaf, targets, reduction="sum")
    return Work(
        "cross_entropy_backward", given, 4 * logits.numel(),
        peer=lambda: torch.autograd.grad(total, leaf, retain_graph=True), graphed_peer=False,
    )  # fmt: skip


def turned(rows: int, width: int, count: int) -> Work:
    x = [_random(rows, width) for _ in range(count)]
    out = [m.new_zeros(width, rows) for m in x]

    def plain() -> None:
        for source, target in zip(x, out, strict=True):
            target.copy_(source.t())

    return Work("transpose", {"x": x, "out": out}, 4 * count * rows * width, peer=plain)


WORKS: dict[str, Callable[[], Work]] = {
    "kv_append GPT-2, 64 rows": lambda: append(64, 12, 64),
    "kv_append GPT-2, 42k tokens": lambda: append(42_240, 12, 64),
    "decode_attention GPT-2, 1 x 400": lambda: decode(1, 400, 12, 12, 64),
    "decode_attention GPT-2, 64 x 400": lambda: decode(64, 400, 12, 12, 64),
    "decode_attention Llama-1B, 1 x 400": lambda: decode(1, 400, 32, 8, 64),
    "decode_attention Llama-1B, 64 x 1000": lambda: decode(64, 1000, 32, 8, 64),
    "ragged_attention GPT-2, 64 x 330": lambda: prefill(64, 330, 12, 12, 64),
    "ragged_attention Llama-1B, 8 x 2048": lambda: prefill(8, 2048, 32, 8, 64),
    "ragged_attention_backward GPT-2, 64 x 330": lambda: prefill(64, 330, 12, 12, 64, backward=True),
    "ragged_attention_backward Llama-1B, 8 x 2048": lambda: prefill(8, 2048, 32, 8, 64, backward=True),
    "skinny_linear 768 -> 2304, 1 row": lambda: linear(1, 768, 2304),
    "skinny_linear 768 -> 768, 1 row": lambda: linear(1, 768, 768),
    "skinny_linear 768 -> 3072, 1 row": lambda: linear(1, 768, 3072),
    "skinny_linear 3072 -> 768, 1 row": lambda: linear(1, 3072, 768),
    "skinny_linear 768 -> 3072, 16 rows": lambda: linear(16, 768, 3072),
    "skinny_linear 2048 -> 2 x 8192, 1 row": lambda: linear(1, 2048, 8192, activation="swiglu"),
    "skinny_linear 8192 -> 2048, 1 row": lambda: linear(1, 8192, 2048),
    "skinny_linear 8192 -> 2048, 16 rows": lambda: linear(16, 8192, 2048),
    "lm_head_sample GPT-2, greedy, 1 row": lambda: head(1, 768, 50257),
    "lm_head_sample GPT-2, greedy, 64 rows": lambda: head(64, 768, 50257),
    "lm_head_sample GPT-2, sampled, 1 row": lambda: head(1, 768, 50257, temperature=1.0),
    "lm_head_sample GPT-2, top-k top-p, 1 row": lambda: head(1, 768, 50257, temperature=1.0, top_k=50, top_p=0.9),
    "lm_head_sample Llama-1B, greedy, 1 row": lambda: head(1, 2048, 128256),
    "residual_norm 4096 x 768": lambda: norm(4096, 768),
    "gated_mlp 4096 x 8192": lambda: mlp(4096, 8192),
    "kv_gather GPT-2, 13k tokens": lambda: gather(13_568, 12, 64),
    "layer_norm 13568 x 768": lambda: trained_norm(13_568, 768),
    "layer_norm_backward 13568 x 768": lambda: trained_norm(13_568, 768, backward=True),
    "column_sums 13568 x 3072": lambda: columns(13_568, 3072),
    "cross_entropy GPT-2, 2048 rows": lambda: losses(2048, 50_260),
    "cross_entropy_backward GPT-2, 2048 rows": lambda: losses(2048, 50_260, backward=True),
    "transpose 12 x 3072 x 768": lambda: turned(3072, 768, 12),
    "latent_feedback GPT-2, 64 rows": lambda: feedback(64, 768),
    "accept_tokens, 64 rows": lambda: accept(64),
}


@pytest.fixture(scope="module")
def rates(figures) -> tuple[float, float]:
    """Bytes a second of a large copy (read + written) and bf16 operations a second of a large product, measured now."""
    copy, product = gpu_limits()
    figures.card(
        f"measured limits: copy {copy / 1e12:.2f} TB/s (read + written), bf16 product {product / 1e12:.0f} TFLOP/s"
    )
    return copy, product


def _replayed(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """The calls, captured as one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _copied(held: Any) -> Any:
    if isinstance(held, list):
        return [_copied(item) for item in held]
    return held.clone() if isinstance(held, torch.Tensor) else held


def _tensors(held: Any) -> list[torch.Tensor]:
    """The tensors in a value."""
    if isinstance(held, tuple | list):
        return [tensor for item in held for tensor in _tensors(item)]
    return [held] if isinstance(held, torch.Tensor) else []


def _results(work: Work, backend: str) -> list[torch.Tensor]:
    """All that a call returns or writes in place, on copies of the inputs."""
    given = {name: _copied(held) for name, held in work.given.items()}
    result = getattr(ops, work.op)(**given, backend=backend)
    return _tensors([result, *given.values()])


def _gate(work: Work) -> None:
    """Ours against the reference's: copies exactly, in a large one a lost row would not show in a norm."""
    for ours, plain in zip(_results(work, "triton"), _results(work, "torch"), strict=True):
        same = ours.dtype == plain.dtype and ours.shape == plain.shape
        if (same and work.op in COPIES) or not plain.is_floating_point():
            same = torch.equal(ours, plain)
        elif same:
            off = ((ours.double() - plain.double()).norm() / plain.double().norm().clamp_min(1e-30)).item()
            same = off < 1e-2
        assert same, f"{work.op} is off from its reference: nothing is timed"


@pytest.mark.parametrize("name", WORKS)
def test_op(benchmark, figures, rates, name: str) -> None:
    copy, product = rates
    works = [WORKS[name]()]
    _gate(works[0])
    wanted = min(256, max(1, int(SETS_BYTES // works[0].moved)))
    while len(works) < wanted:
        works.append(WORKS[name]())
    calls = [w.run for w in works] * max(1, 40 // len(works))
    replay = _replayed(calls)
    times: list[float] = []
    benchmark.pedantic(lambda: times.append(seconds_of(replay)), rounds=5, warmup_rounds=1)
    seconds = min(times) / len(calls)
    work, peer = works[0], None
    peers = [w.peer for w in works if w.peer is not None]
    if peers and work.graphed_peer:
        peers = peers * max(1, 40 // len(peers))
        again = _replayed(peers)
        peer = min(seconds_of(again) for _ in range(5)) / len(peers)
    elif peers:
        peer = min(seconds_of(peers[0]) for _ in range(5))
    limit = max(work.moved / copy, work.flops / product)
    rate = f"{work.flops / seconds / 1e12:.0f} TFLOP/s" if work.flops / product > work.moved / copy else ""
    note = f"{rate or f'{work.moved / seconds / 1e9:.0f} GB/s'}, {limit / seconds:.0%} of the limit"
    figures.add(name, seconds, note=note, torch=peer, limit=limit)
