"""kv_append: the Triton kernel against the reference, on odd shapes, strided views, skipped tokens; the CPU's skips."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from coconut_fast.kernels.reference import kv_append_ref
from tests.compare import assert_as_good_as_torch
from tests.paged import spread, truth_of, view


def inputs(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    fused = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(device, dtype)
    return fused.split([heads, kv_heads, kv_heads], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "kv_heads", "head_dim"), [(1, 1, 1), (5, 12, 64), (3, 3, 80), (2, 2, 128)])
def test_plain_append_moves_the_bits(tokens, kv_heads, head_dim, dtype, device) -> None:
    _, key, value = inputs(tokens, kv_heads, kv_heads, head_dim, dtype, device)
    slots = torch.randperm(tokens + 4)[:tokens].to(device)
    slots[0] = -1 if tokens > 1 else slots[0]
    ours = [torch.full((tokens + 4, kv_heads, head_dim), float("nan"), dtype=dtype, device=device) for _ in range(2)]
    theirs = [t.clone() for t in ours]
    ops.kv_append(key, value, slots, *ours, backend="triton")
    kv_append_ref(key, value, slots, *theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_values_may_be_wider_than_keys_heads_apart_and_the_cache_narrower_than_both(device) -> None:
    key, value = (torch.randn(2, 3, width, device=device).transpose(0, 1) for width in (24, 40))
    ours = [torch.zeros(9, 2, 24, device=device).half(), torch.zeros(9, 2, 40, device=device).half()]
    theirs, slots = [t.clone() for t in ours], torch.tensor([8, 0, 3], device=device)
    ops.kv_append(key, value, slots, *ours, backend="triton")
    kv_append_ref(key, value, slots, *theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (80, 32), (16, 16)])
def test_rotary_and_norms(head_dim, rotary, norm, device) -> None:
    tokens, heads, kv_heads = 4, 6, 3
    query, key, value = inputs(tokens, heads, kv_heads, head_dim, torch.float32, device)
    angles = torch.randn(50, rotary // 2, device=device)
    extra = {"cos": angles.cos(), "sin": angles.sin(), "positions": torch.randint(0, 50, (tokens,), device=device)}
    if norm:
        extra |= {name: torch.rand(head_dim, device=device) + 0.5 for name in ("query_norm", "key_norm")}
    slots = torch.tensor([3, 0, 6, 5], device=device)
    results = []
    for dtype, run in ((None, "triton"), (None, "torch"), (torch.float64, "torch")):
        q, k, v = (t.clone() if dtype is None else t.cpu().double() for t in (query, key, value))
        store = [torch.zeros(8, kv_heads, head_dim, dtype=v.dtype, device=v.device) for _ in range(2)]
        named = extra if dtype is None else dict(zip(extra, truth_of(*extra.values()), strict=True))
        ops.kv_append(k, v, slots.to(v.device), *store, query=q, **named, backend=run)
        results.append((q, store[0], store[1]))
    for name, ours, plain, truth in zip(("query", "keys", "values"), *results, strict=True):
        assert_as_good_as_torch(ours.cpu(), plain.cpu(), truth, what=name)


def test_wrong_inputs_are_named(device) -> None:
    key = torch.randn(3, 2, 8, device=device)
    store = torch.zeros(4, 2, 8, device=device)
    slots = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="keys has shape"):
        ops.kv_append(key, key, slots, store[:, :1], store, backend="triton")
    with pytest.raises(ValueError, match="key is torch.float64"):
        ops.kv_append(key.double(), key, slots, store, store, backend="triton")
    with pytest.raises(ValueError, match="without sin, positions, expected"):
        ops.kv_append(key, key, slots, store, store.clone(), cos=key[0], backend="triton")
    with pytest.raises(ValueError, match="without cos"):
        ops.kv_append(key, key, slots, store, store.clone(), sin=key[0], backend="triton")


def test_what_the_kernel_would_misread_is_refused(device) -> None:
    key, store = torch.randn(3, 2, 8, device=device), torch.zeros(4, 2, 8, device=device)
    slots, table = torch.arange(3, device=device), torch.randn(9, 4, device=device)
    right = {
        "slots": slots, "keys": store, "values": store.clone(), "cos": table.cos(), "sin": table.sin(),
        "positions": slots, "query_norm": table[0].repeat(2), "key_norm": table[1].repeat(2),
    }  # fmt: skip
    wrong = [
        ({"keys": view(store)}, r"keys has strides \(32, 16, 1\), expected a contiguous tensor"),
        ({"values": view(store)}, "values has strides"),
        ({"cos": view(table)}, "cos has strides"),
        ({"sin": view(table)}, "sin has strides"),
        ({"sin": table[:, :2]}, r"sin has shape \(9, 2\), expected \(9, 4\)"),
        ({"cos": table.repeat(1, 2)}, "cos has 8 columns, expected at most half of a head's 8 components"),
        ({"positions": slots[:2]}, "positions has shape"),
        ({"positions": spread(slots)}, "positions has stride 2"),
        ({"slots": spread(slots)}, "slots has stride 2"),
        ({"query_norm": table[0]}, r"query_norm has shape \(4,\), expected \(8,\)"),
        ({"key_norm": spread(right["key_norm"])}, "key_norm has stride 2"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            ops.kv_append(key, key, **right | change, query=key.clone(), backend="triton")
    assert not right["keys"].any() and not right["values"].any()


def test_the_cpu_kernel_skips_tokens_and_refuses_what_it_does_not_do() -> None:
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 4)
    for dtype in (torch.float32, torch.bfloat16):
        ours = [torch.full((5, 2, width), 7.0, dtype=dtype) for width in (8, 4)]
        theirs, slots = [t.clone() for t in ours], torch.tensor([4, -1, 0])
        ops.kv_append(key, value, slots, *ours, query=None, eps=1e-5, backend="cpu")
        kv_append_ref(key, value, slots, *theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for name in ("query", "cos", "sin", "positions", "query_norm", "key_norm"):
        with pytest.raises(ValueError, match=f"kv_append: {name} is given, which the CPU's own kernel does not take"):
            ops.kv_append(key, value, slots, *ours, **{name: key}, backend="cpu")
    with pytest.raises(ValueError, match=r"slots\[2\] is 5; the cache has 5 slots"):
        ops.kv_append(key, value, torch.tensor([0, -1, 5]), *ours, backend="cpu")


def test_opcheck(device) -> None:
    from coconut_fast.kernels import kv_append

    key = torch.randn(3, 2, 8, device=device)
    store = [torch.zeros(4, 2, 8, device=device) for _ in range(2)]
    library.opcheck(kv_append._OP, (key, key.clone(), torch.arange(3, device=device), *store))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_append_on_the_cpu(dtype, cache_dtype):
    key, value = torch.randn(50, 3, 10).to(dtype), torch.randn(50, 3, 7).to(dtype) * 1e-5
    key[0, 0, :6] = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 65519.9])
    slots = torch.randperm(80)[:50]
    made = []
    for backend in ("cpu", "torch"):
        keys, values = torch.zeros(80, 3, 10, dtype=cache_dtype), torch.zeros(80, 3, 7, dtype=cache_dtype)
        ops.call("kv_append", key, value, slots, keys, values, backend=backend)
        made.append((keys, values))
    # strided heads, as a rotation returns them, and a slice of a fused projection
    keys, values = torch.zeros(80, 3, 10, dtype=cache_dtype), torch.zeros(80, 3, 7, dtype=cache_dtype)
    apart = key.transpose(0, 1).contiguous().transpose(0, 1)
    fused = torch.cat([value, value, value], dim=1)[:, 3:6]
    assert not apart.is_contiguous() and not fused.is_contiguous()
    ops.call("kv_append", apart, fused, slots, keys, values, backend="cpu")
    assert torch.equal(keys.nan_to_num(7), made[0][0].nan_to_num(7)) and torch.equal(values, made[0][1])
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_wrong_arguments_are_refused_on_the_cpu() -> None:
    keys, values = torch.zeros(192, 2, 64), torch.zeros(192, 2, 64)
    with pytest.raises(ValueError, match="key is .* whose last dimension is contiguous"):
        ops.kv_append(torch.zeros(2, 64, 2).mT, torch.zeros(2, 2, 64), torch.tensor([0, 1]), keys, values)
    with pytest.raises(ValueError, match=r"value is .* expected a CPU tensor of shape \[2, 2, 64\]"):
        ops.kv_append(torch.zeros(2, 2, 64), torch.zeros(2, 2, 63), torch.tensor([0, 1]), keys, values)
    with pytest.raises(ValueError, match=r"slots\[1\] is 200; the cache has 192 slots"):
        ops.kv_append(torch.zeros(2, 2, 64), torch.zeros(2, 2, 64), torch.tensor([0, 200]), keys, values)
