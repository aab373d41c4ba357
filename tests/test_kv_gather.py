"""kv_gather: the Triton kernel against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from tests.paged import view


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "widths"), [(1, (1, 3)), (3, (24, 40)), (12, (64, 64)), (40, (64, 16))])
def test_against_the_reference(heads, widths, dtype, device) -> None:
    keys, values = (torch.randn(9, heads, width, device=device) for width in widths)
    slots = torch.tensor([8, 0, 3, 5], device=device)
    ours = ops.kv_gather(keys, values, slots, dtype, backend="triton")
    plain = ops.kv_gather(keys, values, slots, dtype, backend="torch")
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)


def test_wrong_inputs_are_named_and_no_tokens_are_fine(device) -> None:
    keys = torch.randn(9, 2, 4, device=device)
    slots = torch.tensor([1], device=device)
    with pytest.raises(ValueError, match="values has strides"):
        ops.kv_gather(keys, view(keys), slots, torch.float32, backend="triton")
    assert ops.kv_gather(keys, keys, slots[:0], torch.float32, backend="triton")[0].shape == (0, 2, 4)


def test_opcheck(device) -> None:
    from coconut_fast.kernels import kv_gather

    keys = torch.randn(9, 2, 4, device=device)
    library.opcheck(kv_gather._OP, (keys, keys * 2, torch.tensor([1, 4], device=device), torch.float16))
