"""layer_norm, its backward, and column_sums: the Triton kernels against the references in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from tests.compare import assert_as_good_as_torch
from tests.paged import truth_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "dim", "shares"), [(1, 17, 4), (3, 100, 4), (11, 768, 4)])
def test_against_the_reference(rows, dim, shares, bias, dtype, device) -> None:
    # With fewer components the gradient nearly cancels: with one it is 0, apart from a fused multiply-add's rounding.
    x, weight = (torch.randn(rows, dim) * 3 + 5).to(device), (torch.rand(dim) + 0.5).to(device)
    b = torch.randn(dim).to(device) if bias else None
    grads = [torch.randn(rows, dim).to(device), torch.randn(rows, dim).to(device, dtype)]
    sums = torch.randn(shares, 2, dim).to(device)
    runs = []
    for double, backend in ((False, "triton"), (False, "torch"), (True, "torch")):
        given = [x, weight, *([] if b is None else [b]), *grads, sums.clone()]
        given = truth_of(*given) if double else given
        results = ops.layer_norm(
            *given[:2], given[2] if bias else None, eps=1e-5, dtype=torch.float64 if double else dtype, backend=backend
        )
        found = list(results)
        for wanted in ((0, 1), (0, 2), (1,)):
            three = [(*given[-3:-1], given[0] * 2)[i] if i in wanted else None for i in (0, 1, 2)]
            copy = {"dtype": torch.float64 if double else dtype} if 2 in wanted else {}
            of_x, again = ops.layer_norm_backward(*three, *given[:2], results[2], given[-1], **copy, backend=backend)
            found += [of_x, given[-1].clone(), *([again] if copy else [])]
            assert copy or again.shape == (0,)
        runs.append(found)
    names = ["normed", "rounded", "statistics", "grad_x", "sums", "grad_x", "sums", "grad_x copied", "grad_x", "sums"]
    for name, ours, plain, truth in zip(names, *runs, strict=True):
        assert ours.dtype == plain.dtype
        assert_as_good_as_torch(ours.cpu(), plain.cpu(), truth.double(), what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "width", "shares"), [(1, 1, 4), (3, 130, 4), (75, 256, 4), (5, 8, 64)])
def test_column_sums(rows, width, shares, dtype, device) -> None:
    x, sums = torch.randn(rows, width).to(device, dtype), torch.randn(shares, width).to(device)
    runs = []
    for double, backend in ((False, "triton"), (False, "torch"), (True, "torch")):
        a, b = truth_of(x, sums) if double else (x, sums.clone())
        ops.column_sums(a, b, backend=backend)
        runs.append(b)
    assert_as_good_as_torch(*(run.cpu() for run in runs))


def test_wrong_inputs_are_named_and_no_rows_are_fine(device) -> None:
    x, weight, sums = (torch.zeros(shape, device=device) for shape in ((3, 8), (8,), (4, 2, 8)))
    with pytest.raises(ValueError, match="layer_norm: weight has shape"):
        ops.layer_norm(x, weight[:4], None, eps=1e-5, dtype=torch.float16, backend="triton")
    assert ops.layer_norm(x[:0], weight, None, eps=1e-5, dtype=torch.float16, backend="triton")[1].shape == (0, 8)
    with pytest.raises(ValueError, match="layer_norm_backward: statistics has shape"):
        ops.layer_norm_backward(x, None, None, x, weight, x[:, :3], sums, backend="triton")
    with pytest.raises(ValueError, match="layer_norm_backward: sums has shape"):
        ops.layer_norm_backward(x, None, None, x, weight, x[:, :2].contiguous(), sums[:, :1], backend="triton")
    with pytest.raises(ValueError, match="column_sums: sums has shape"):
        ops.column_sums(x, sums[0, :, :4], backend="triton")


def test_opcheck(device) -> None:
    from coconut_fast.kernels import column_sums, layer_norm, layer_norm_backward

    x, weight, sums = torch.randn(3, 8, device=device), torch.ones(8, device=device), torch.zeros(4, 2, 8).to(device)
    options = {"eps": 1e-5, "dtype": torch.float16}
    library.opcheck(layer_norm._OP, (x, weight, weight), options)
    statistics = layer_norm.layer_norm(x, weight, None, **options)[2]
    library.opcheck(layer_norm_backward._OP, (x, None, x, x, weight, statistics, sums), {"dtype": torch.float16})
    library.opcheck(column_sums._OP, (x, sums[:, 0].contiguous()))
