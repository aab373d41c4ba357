"""transpose: the Triton kernel against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from tests.paged import view


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (3, (64, 128)), (2, (65, 200)), (5, (130, 7))])
def test_against_the_reference(count, shape, dtype, device) -> None:
    matrices = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    ours, plain = ([torch.zeros(shape[::-1], dtype=dtype, device=device) for _ in matrices] for _ in range(2))
    ops.transpose(matrices, ours, backend="triton")
    ops.transpose(matrices, plain, backend="torch")
    for matrix, a, b in zip(matrices, ours, plain, strict=True):
        assert torch.equal(a, b) and torch.equal(a, matrix.t())


def test_wrong_inputs_are_named_and_empty_matrices_are_fine(device) -> None:
    one, other = torch.randn(3, 5, device=device), torch.zeros(5, 3, device=device)
    wrong = [
        ("found 2 matrices and 1", [one, one], [other]),
        ("out has shape", [one], [one]),
        ("x has shape", [one, other], [other, other]),
        ("x has strides", [view(one)], [other]),
        ("expected torch.float32 throughout", [one], [other.half()]),
    ]
    for message, x, out in wrong:
        with pytest.raises(ValueError, match=message):
            ops.transpose(x, out, backend="triton")
    ops.transpose([one[:0]], [other[:, :0]], backend="triton")


def test_opcheck(device) -> None:
    from coconut_fast.kernels import transpose

    matrices = [torch.randn(3, 5, device=device) for _ in range(2)]
    library.opcheck(transpose._OP, (matrices, [torch.zeros(5, 3, device=device) for _ in matrices]))
