"""A call of every Triton op at the shapes of real models, smaller where there is no GPU; for tests/test_gpu_ops.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from coconut_fast import ops
from tests.paged import Paged, paged, truth_of

CUDA = torch.cuda.is_available()


@dataclass
class Case:
    """One call of an op. `written`: names of the arguments that it changes in place."""

    op: str
    arguments: dict[str, Any]
    written: tuple[str, ...] = ()
    exact: bool = False  # integers, or bits moved unchanged

    def start(self) -> dict[str, Any]:
        """The arguments, with copies of those that the op writes."""
        return {k: copied(v) if k in self.written else v for k, v in self.arguments.items()}

    def results(self, given: dict[str, Any], returned: Any) -> dict[str, torch.Tensor]:
        """Everything the call computed, by name."""
        out = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
        lists = {k: given[k] if isinstance(given[k], list) else [given[k]] for k in self.written}
        return {f"result {i}": t for i, t in enumerate(out)} | {
            f"{k} {i}": t for k, v in lists.items() for i, t in enumerate(v)
        }

    def run(self, backend: str, double: bool = False) -> dict[str, torch.Tensor]:
        given = self.start()
        if double:
            given = {k: truth_of(v)[0] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            given = {k: torch.float64 if isinstance(v, torch.dtype) else v for k, v in given.items()}
        return self.results(given, getattr(ops, self.op)(**given, backend=backend))


def copied(value: Any) -> Any:
    """Tensors, and lists of them, cloned."""
    if isinstance(value, list):
        return [t.clone() for t in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def cache_of(dtype: torch.dtype, device: torch.device, lengths: list[int], kv_heads: int, head_dim: int) -> Paged:
    return paged(lengths, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=device)


def _attention(heads: int, kv_heads: int, head_dim: int, **options: Any) -> Callable[..., Case]:
    def make(dtype: torch.dtype, device: torch.device) -> Case:
        lengths = [700, 64, 1, 333] if CUDA else [70, 64, 1]
        cache = cache_of(dtype, device, lengths, kv_heads, head_dim)
        table, rows, length = cache.layout()
        query = torch.randn(len(lengths), heads, head_dim).to(device, dtype)
        bounds = {"page_size": 16, "scaling": head_dim**-0.5, "max_length": 1024 if CUDA else 128}
        places = {"page_table": table, "rows": rows, "lengths": length}
        return Case(
            "decode_attention", {"query": query, "keys": cache.keys, "values": cache.values} | places | bounds | options
        )

    return make


def fused(heads: int, kv_heads: int, head_dim: int, rotary: bool, norm: bool) -> Callable[..., Case]:
    def make(dtype: torch.dtype, device: torch.device) -> Case:
        case = _attention(heads, kv_heads, head_dim)(dtype, device)
        batch = len(case.arguments["rows"])
        fused = torch.randn(batch, heads + 2 * kv_heads, head_dim).to(device, dtype)
        query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
        case.arguments |= {"query": query, "key": key, "value": value}
        case.arguments["keys"], case.arguments["values"] = (
            case.arguments[n].nan_to_num(0.0) for n in ("keys", "values")
        )
        if rotary:
            angles = torch.randn(1024, head_dim // 2, device=device)
            positions = case.arguments["lengths"].long() - 1
            case.arguments |= {"cos": angles.cos(), "sin": angles.sin(), "positions": positions}
        if norm:
            case.arguments |= {n: torch.rand(head_dim).to(device, dtype) + 0.5 for n in ("query_norm", "key_norm")}
        case.written = ("keys", "values")
        return case

    return make


def _ragged(
    heads: int, kv_heads: int, head_dim: int, backward: bool, many: int = 0, **options: Any
) -> Callable[..., Case]:
    def make(dtype: torch.dtype, device: torch.device) -> Case:
        lengths, queries = ([330, 64, 500, 9], [330, 1, 14, 9]) if CUDA else ([40, 20], [40, 3])
        if many:
            lengths, queries = (
                [60 + 7 * b % 50 for b in range(many)],
                [b % (64 * kv_heads // heads) for b in range(many)],
            )
        cache = cache_of(dtype, device, lengths, kv_heads, head_dim)
        table, rows, length = cache.layout()
        offsets = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32, device=device)
        given = {
            "query": torch.randn(sum(queries), heads, head_dim).to(device, dtype), "keys": cache.keys,
            "values": cache.values, "page_table": table, "rows": rows, "row_offsets": offsets, "lengths": length,
            "page_size": 16, "scaling": head_dim**-0.5, "max_query": max(queries), "max_length": max(lengths),
        } | options  # fmt: skip
        if not backward:
            return Case("ragged_attention", given)
        out, lse = ops.ragged_attention(**given, backend="torch")
        given |= {"grad_out": torch.randn_like(out), "out": out, "lse": lse}
        given |= {f"grad_{n}": torch.zeros(given[n].shape, device=device) for n in ("keys", "values")}
        return Case("ragged_attention_backward", given, ("grad_keys", "grad_values"))

    return make


def _one_query(rows: int) -> Callable[..., Case]:
    """A latent pass that leaves dK and dV of earlier positions to the first pass."""

    def make(dtype: torch.dtype, device: torch.device) -> Case:
        lengths = [(1, 70, 64, 333 if CUDA else 33)[b % 4] for b in range(rows)]
        cache = cache_of(dtype, device, lengths, 12, 64)
        table, used, length = cache.layout()
        offsets = torch.arange(rows + 1, dtype=torch.int32, device=device)
        given = {
            "query": torch.randn(rows, 12, 64).to(device, dtype), "keys": cache.keys, "values": cache.values,
            "page_table": table, "rows": used, "row_offsets": offsets, "lengths": length, "page_size": 16,
            "scaling": 0.125, "max_query": 1, "max_length": max(lengths),
        }  # fmt: skip
        out, lse = ops.ragged_attention(**given, backend="torch")
        given |= {"grad_out": torch.randn_like(out), "out": out, "lse": lse, "grads_from": (length - 3).clamp_min(0)}
        given |= {f"grad_{n}": torch.zeros(given[n].shape, device=device) for n in ("keys", "values")}
        return Case("ragged_attention_backward", given, ("grad_keys", "grad_values"))

    return make


def _gather(dtype: torch.dtype, device: torch.device) -> Case:
    given = {name: torch.randn(1000, 12, 64, device=device) for name in ("keys", "values")}
    return Case("kv_gather", given | {"slots": torch.randperm(1000, device=device)[:300], "dtype": dtype}, exact=True)


def _append(dtype: torch.dtype, device: torch.device) -> Case:
    fused = torch.randn(300, 36, 64).to(device, dtype)
    _, key, value = fused.split(12, dim=1)
    slots = torch.randperm(1000, device=device)[:300]
    slots[7] = -1
    store = {name: torch.zeros(1000, 12, 64, dtype=dtype, device=device) for name in ("keys", "values")}
    return Case("kv_append", {"key": key, "value": value, "slots": slots} | store, ("keys", "values"), exact=True)


def _append_turned(dtype: torch.dtype, device: torch.device) -> Case:
    fused = torch.randn(50, 32, 128).to(device, dtype)
    query, key, value = fused.split([16, 8, 8], dim=1)
    angles, positions = torch.randn(99, 64, device=device), torch.randint(0, 99, (50,), device=device)
    given = {"key": key, "value": value, "slots": torch.randperm(60, device=device)[:50]}
    given |= {name: torch.zeros(60, 8, 128, dtype=dtype, device=device) for name in ("keys", "values")}
    given |= {"query": query, "cos": angles.cos(), "sin": angles.sin(), "positions": positions}
    given |= {name: torch.rand(128).to(device, dtype) + 0.5 for name in ("query_norm", "key_norm")}
    return Case("kv_append", given, ("keys", "values", "query"))


def _feedback(dtype: torch.dtype, device: torch.device) -> Case:
    given = {
        "source": torch.randn(9, 768).to(device, dtype), "last": torch.tensor([8, 0, 3, 5], device=device),
        "next_input": torch.zeros(4, 768, device=device), "positions": torch.tensor([15, 0, 30, 2], device=device),
        "lengths": torch.tensor([16, 1, 31, 3], dtype=torch.int32, device=device),
        "norm": "layer",
        "weight": torch.rand(768).to(device, dtype), "bias": torch.randn(768).to(device, dtype), "target": 3.0,
        "position_embedding": torch.randn(64, 768).to(device, dtype), "thought": torch.zeros(4, 768, device=device),
        "remaining": torch.tensor([2, 0, 1, 5], dtype=torch.int32, device=device),
        "attended": torch.tensor([16, 1, 31, 0], dtype=torch.int32, device=device),
    }  # fmt: skip
    written = ("next_input", "positions", "lengths", "thought", "remaining", "attended")
    return Case("latent_feedback", given, written)


def _accept(dtype: torch.dtype, device: torch.device) -> Case:
    given = {name: torch.randint(0, 9, (64,), device=device) for name in ("ids", "tokens")}
    given |= {name: torch.randint(0, 3, (64,), dtype=torch.int32, device=device) for name in ("remaining", "attended")}
    given |= {"written": torch.zeros(64, 8, dtype=torch.int64, device=device), "eos": 4}
    given["step"] = torch.tensor([3], device=device)
    return Case("accept_tokens", given, ("tokens", "written", "remaining", "step"), exact=True)


def _trained_norm(backward: bool) -> Callable[..., Case]:
    def make(dtype: torch.dtype, device: torch.device) -> Case:
        rows, dim = (1201, 768) if CUDA else (7, 100)
        x, weight, bias = torch.randn(rows, dim) * 3 + 5, torch.rand(dim) + 0.5, torch.randn(dim)
        given = {"x": x.to(device), "weight": weight.to(device)}
        if not backward:
            return Case("layer_norm", given | {"bias": bias.to(device), "eps": 1e-5, "dtype": dtype})
        statistics = ops.layer_norm(**given, bias=None, eps=1e-5, dtype=dtype, backend="torch")[2]
        given |= {"grad_normed": None, "grad_rounded": torch.randn(rows, dim).to(device, dtype)}
        given |= {"other": torch.randn(rows, dim, device=device), "statistics": statistics, "dtype": dtype}
        return Case("layer_norm_backward", given | {"sums": torch.randn(512, 2, dim, device=device)}, ("sums",))

    return make


def _columns(dtype: torch.dtype, device: torch.device) -> Case:
    x = torch.randn(1201 if CUDA else 77, 2304 if CUDA else 200)
    given = {"x": x.to(device, dtype), "sums": torch.randn(64, x.shape[1], device=device)}
    return Case("column_sums", given, ("sums",))


def _losses(backward: bool) -> Callable[..., Case]:
    def make(dtype: torch.dtype, device: torch.device) -> Case:
        vocabulary, width = (50260, 50304) if CUDA else (300, 320)
        logits, targets = torch.randn(9, width) * 4, torch.randint(0, vocabulary, (9,))
        targets[4] = -100
        given = {"logits": logits.to(device, dtype), "targets": targets.to(device), "vocabulary": vocabulary}
        if not backward:
            return Case("cross_entropy", given)
        _, statistics = ops.cross_entropy(**given, backend="torch")
        grad = torch.tensor(0.4, device=device)
        return Case("cross_entropy_backward", given | {"statistics": statistics, "grad": grad}, ("logits",))

    return make


def _transpose(dtype: torch.dtype, device: torch.device) -> Case:
    shape = (768, 2304) if CUDA else (70, 130)
    matrices = [torch.randn(shape).to(device, dtype) for _ in range(3)]
    return Case("transpose", {"x": matrices, "out": [m.new_zeros(shape[::-1]) for m in matrices]}, ("out",), exact=True)


def _norm(kind: str) -> Callable[..., Case]:
    def make(dtype: torch.dtype, device: torch.device) -> Case:
        given = {"x": torch.randn(37, 768).to(device, dtype), "weight": torch.rand(768).to(device, dtype), "kind": kind}
        return Case("residual_norm", given | {"residual": torch.randn(37, 768, device=device) * 30})

    return make


def _mlp(activation: str) -> Callable[..., Case]:
    def make(dtype: torch.dtype, device: torch.device) -> Case:
        given = {"x": torch.randn(37, 6144).to(device, dtype), "bias": torch.randn(6144).to(device, dtype)}
        return Case("gated_mlp", given | {"activation": activation})

    return make


def _linear(rows: int, activation: str, norm: str) -> Callable[..., Case]:
    def make(dtype: torch.dtype, device: torch.device) -> Case:
        outputs = 3000 if CUDA else 50
        wide = 2 * outputs if activation == "swiglu" else outputs
        given = {
            "x": torch.randn(rows, 768).to(device, dtype), "bias": torch.randn(wide).to(device, dtype),
            "weight": (torch.randn(wide, 768) / 28).to(device, dtype),
            "residual": torch.randn(rows, outputs, device=device), "activation": activation, "norm": norm,
        }  # fmt: skip
        return Case(
            "skinny_linear", given | {"norm_weight": torch.rand(768).to(device, dtype)} if norm != "none" else given
        )

    return make


def _head(batch: int, **options: Any) -> Callable[..., Case]:
    def make(dtype: torch.dtype, device: torch.device) -> Case:
        # Small integers: logits are exact in every type, so ids are too.
        given = {
            "hidden": torch.randint(-3, 4, (batch, 256)),
            "weight": torch.randint(-3, 4, (50257 if CUDA else 300, 256)),
        }
        given = {k: v.to(device, dtype) for k, v in given.items()}
        if options.get("temperature"):
            given["numbers"] = torch.rand(batch, dtype=torch.float64, device=device)
        return Case("lm_head_sample", given | options, exact=True)

    return make


CASES: dict[str, Callable[[torch.dtype, torch.device], Case]] = {
    "kv_append": _append,
    "kv_append, rotary and norms": _append_turned,
    "decode_attention, GPT-2": _attention(12, 12, 64),
    "decode_attention, grouped": _attention(32, 8, 64),
    "decode_attention, window and softcap": _attention(4, 2, 80, window=100, softcap=20.0),
    "decode_attention, GPT-2, new token": fused(12, 12, 64, rotary=False, norm=False),
    "decode_attention, Llama, new token": fused(32, 8, 64, rotary=True, norm=False),
    "decode_attention, Qwen3, new token": fused(16, 8, 128, rotary=True, norm=True),
    "ragged_attention, GPT-2": _ragged(12, 12, 64, False),
    "ragged_attention, dropout": _ragged(12, 12, 64, False, dropout=0.1, seed=2**35 + 3),
    "ragged_attention, grouped, wide": _ragged(16, 8, 128, False),
    "ragged_attention, window and softcap": _ragged(4, 2, 256, False, window=50, softcap=20.0),
    "ragged_attention_backward, GPT-2": _ragged(12, 12, 64, True),
    "ragged_attention_backward, dropout": _ragged(12, 12, 64, True, dropout=0.1, seed=2**35 + 3),
    "ragged_attention_backward, grouped, wide": _ragged(16, 8, 128, True),
    "ragged_attention_backward, window and softcap": _ragged(4, 2, 256, True, window=50, softcap=20.0),
    "ragged_attention_backward, few queries, many rows": _ragged(12, 12, 64, True, many=32),
    "ragged_attention_backward, few queries, grouped": _ragged(32, 8, 64, True, many=32, dropout=0.1, seed=5),
    "ragged_attention_backward, one query, many rows": _one_query(64),
    "ragged_attention_backward, one query of GPT-2": _one_query(4),
    "kv_gather": _gather,
    "layer_norm": _trained_norm(False),
    "layer_norm_backward": _trained_norm(True),
    "column_sums": _columns,
    "cross_entropy": _losses(False),
    "cross_entropy_backward": _losses(True),
    "latent_feedback": _feedback,
    "accept_tokens": _accept,
    "transpose": _transpose,
    "residual_norm, layer": _norm("layer"),
    "residual_norm, rms": _norm("rms"),
    "gated_mlp, gelu": _mlp("gelu_tanh"),
    "gated_mlp, swiglu": _mlp("swiglu"),
    "skinny_linear, one row": _linear(1, "gelu_tanh", "layer"),
    "skinny_linear, four rows": _linear(4, "swiglu", "rms"),
    "skinny_linear, tensor cores": _linear(8, "swiglu", "rms"),
    "skinny_linear, 64 rows": _linear(64, "none", "none"),
    "lm_head_sample, greedy, one row": _head(1),
    "lm_head_sample, greedy": _head(9),
    "lm_head_sample, sampled, one row": _head(1, temperature=40.0),
    "lm_head_sample, sampled": _head(9, temperature=40.0),
    "lm_head_sample, top-k and top-p": _head(9, temperature=40.0, top_k=50, top_p=0.8),
}

# Each dtype costs a compilation of a second or so; the other cases run in the last one, bf16.
EVERY_DTYPE = (
    "kv_append", "decode_attention, GPT-2", "decode_attention, Llama, new token", "ragged_attention, GPT-2",
    "ragged_attention_backward, GPT-2", "ragged_attention_backward, dropout", "ragged_attention, grouped, wide",
    "latent_feedback", "residual_norm, layer", "gated_mlp, swiglu", "skinny_linear, one row",
    "skinny_linear, tensor cores", "lm_head_sample, greedy", "lm_head_sample, sampled, one row",
)  # fmt: skip


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits; NaN (in slots without a token) equals NaN."""
    return torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


def function_of(op: str) -> Callable[..., Any]:
    """The public function of kernels/<op>.py."""
    return getattr(importlib.import_module(f"coconut_fast.kernels.{op}"), op)


def assert_compiles(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Traced as one graph with its writes functionalized (what Inductor gets), it gives the same bits."""
    case = CASES[name](dtype, device)
    function = function_of(case.op)
    given = case.start()
    expected = case.run("triton")
    torch._dynamo.reset()
    compiled = torch.compile(lambda tensors: function(**tensors), backend="aot_eager", fullgraph=True)
    found = case.results(given, compiled(given))
    assert all(same(expected[k], found[k]) for k in expected)
