"""The product of the training step against fp64, in every layout its callers hand over."""

from __future__ import annotations

import pytest
import torch

from coconut_fast import ops
from tests.compare import assert_as_good_as_torch


@pytest.mark.parametrize("backend", ["onednn", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("shape", [(1, 5, 3), (7, 1, 33), (64, 300, 65), (0, 4, 3), (3, 0, 4), (3, 4, 0)])
@pytest.mark.parametrize("layouts", ["nn", "nt", "tn", "tt"])
def test_matmul(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], layouts: str) -> None:
    (m, k, n), g = shape, torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(s, generator=g).to(dtype) for s in ((m, k), (k, n), (n,)))
    a, b = (x.T.contiguous().T if layout == "t" else x for x, layout in zip((a, b), layouts, strict=True))
    start = torch.randn(m, n, generator=g).to(dtype)
    exact = a.double() @ b.double()
    into = start.clone()
    assert ops.call("matmul", a, b, into=into, backend=backend) is into
    results = {
        "product": (ops.call("matmul", a, b, backend=backend), a @ b, exact),
        "with bias": (ops.call("matmul", a, b, bias, backend=backend), torch.addmm(bias, a, b), exact + bias.double()),
        "added": (into, torch.addmm(start, a, b), exact + start.double()),
    }
    for what, (ours, plain, truth) in results.items():
        assert_as_good_as_torch(ours, plain, truth, what=what)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matmul: expected \(M, K\) and \(K, N\), found \(2, 3\) and \(2, 3\)"):
        ops.call("matmul", torch.zeros(2, 3), torch.zeros(2, 3), backend="onednn")
