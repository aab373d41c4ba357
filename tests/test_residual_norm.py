"""residual_norm: the Triton kernel against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from tests.compare import assert_as_good_as_torch
from tests.paged import truth_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(
    ("rows", "dim", "extras"), [(1, 1, ""), (3, 100, "residual"), (5, 768, "residual bias norm_bias")]
)
def test_against_the_reference(rows, dim, extras, kind, dtype, device) -> None:
    shapes = {"residual": (rows, dim), "bias": (dim,), "norm_bias": (dim,)}
    inputs = {"x": torch.randn(rows, dim) * 3 + 5, "weight": torch.rand(dim) + 0.5}
    inputs |= {name: torch.randn(shapes[name]) for name in extras.split()}
    inputs = {name: t.to(device, torch.float32 if name == "residual" else dtype) for name, t in inputs.items()}
    ours = ops.residual_norm(**inputs, kind=kind, backend="triton")
    plain = ops.residual_norm(**inputs, kind=kind, backend="torch")
    truth = ops.residual_norm(**dict(zip(inputs, truth_of(*inputs.values()), strict=True)), kind=kind, backend="torch")
    for name, a, b, c in zip(("normed", "total"), ours, plain, truth, strict=True):
        assert a.dtype == b.dtype
        assert_as_good_as_torch(a.cpu(), b.cpu(), c, what=name)


def test_wrong_inputs_are_named_and_no_rows_are_fine(device) -> None:
    x = torch.randn(3, 8, device=device)
    with pytest.raises(ValueError, match="kind is 'batch'"):
        ops.residual_norm(x, x[0], kind="batch", backend="triton")
    with pytest.raises(ValueError, match="weight has shape"):
        ops.residual_norm(x, x[0, :4], backend="triton")
    assert ops.residual_norm(x[:0], x[0], backend="triton")[0].shape == (0, 8)


def test_opcheck(device) -> None:
    from coconut_fast.kernels import residual_norm

    x = torch.randn(3, 8, device=device)
    library.opcheck(residual_norm._OP, (x, torch.ones(8, device=device)), {"residual": x.double().float() * 2})
