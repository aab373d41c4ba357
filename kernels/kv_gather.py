"""Gather a call's own slots of two buffers, in another dtype: the gradients of its keys and values.

    key[t] = keys[slots[t]],   value[t] = values[slots[t]]

Shapes: keys (S, Hkv, K), values (S, Hkv, Kv), slots int64 (T,); key (T, Hkv, K) and value (T, Hkv, Kv) contiguous.
Bytes: T Hkv (K + Kv) elements read and written once, in 128-bit accesses. Bound: memory bandwidth, launch latency below
about 2 MB: one launch where indexing and casting in torch take four. Registers at most 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import check_dtypes, check_shape, on_device, register


@triton.jit
def _gather(keys, values, slots, key, value, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(keys + slot * KEY + at, mask=at < KEY)
    tl.store(key + token * KEY + at, x.to(tl.float32).to(key.dtype.element_ty), mask=at < KEY)
    x = tl.load(values + slot * VALUE + at, mask=at < VALUE)
    tl.store(value + token * VALUE + at, x.to(tl.float32).to(value.dtype.element_ty), mask=at < VALUE)


def _launch(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    check_dtypes("kv_gather", keys=keys, values=values)
    check_shape("kv_gather", "keys", keys, tuple(keys.shape), contiguous=True)
    check_shape("kv_gather", "values", values, (len(keys), *values.shape[1:]), contiguous=True)
    check_shape("kv_gather", "slots", slots, slots.shape[:1])
    key, value = _fake(keys, values, slots, dtype)
    widths = [keys[0].numel(), values[0].numel()] if len(keys) else [0, 0]
    if len(slots) and max(widths):
        block = min(1024, triton.next_power_of_2(max(widths)))
        with on_device(keys):
            _gather[(len(slots), triton.cdiv(max(widths), block))](
                keys=keys,
                values=values,
                slots=slots,
                key=key,
                value=value,
                KEY=widths[0],
                VALUE=widths[1],
                BLOCK=block,
                num_warps=4,
            )
    return key, value


def _fake(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(x.new_empty((slots.shape[0], *x.shape[1:]), dtype=dtype) for x in (keys, values))  # type: ignore[return-value]


_OP = register(
    "kv_gather(Tensor keys, Tensor values, Tensor slots, ScalarType dtype) -> (Tensor, Tensor)", _launch, _fake
)


def kv_gather(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(key, value) as in the module's docstring. ValueError for inputs that do not fit."""
    return _OP(keys, values, slots, dtype)
