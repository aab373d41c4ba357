"""The product of the training step against fp64, in every layout its callers hand over."""

from __future__ import annotations

import pytest
import torch

from coconut_fast import ops
from coconut_fast.kernels import matmul
from tests.compare import assert_as_good_as_torch


def lay(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x in memory as it is, its transpose, or with gaps."""
    if layout == "g":
        return torch.cat([x, x], dim=1)[:, : x.shape[1]]
    return x.T.contiguous().T if layout == "t" else x


@pytest.mark.parametrize("backend", ["onednn", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("shape", [(1, 5, 3), (7, 1, 33), (64, 300, 65), (0, 4, 3), (3, 0, 4), (3, 4, 0)])
@pytest.mark.parametrize("layouts", ["nn", "nt", "tn", "tt", "gg"])
def test_matmul(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], layouts: str) -> None:
    (m, k, n), g = shape, torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(s, generator=g).to(dtype) for s in ((m, k), (k, n), (n,)))
    a, b = (lay(x, layout) for x, layout in zip((a, b), layouts, strict=True))
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


@pytest.mark.parametrize("layout", ["n", "t", "g"])
def test_onednn_sees_no_gaps_and_no_needless_copy(layout: str, monkeypatch) -> None:
    """With gaps oneDNN falls back to a loop that is a thousand times slower."""
    seen, linear = [], matmul._linear
    monkeypatch.setattr(matmul, "_linear", lambda a, w, *rest: seen.append(w) or linear(a, w, *rest))
    b = lay(torch.randn(6, 8), layout)
    ops.call("matmul", torch.randn(4, 6), b, backend="onednn")
    assert seen[0].is_contiguous() or seen[0].T.is_contiguous()
    assert (seen[0].data_ptr() == b.data_ptr()) == (layout != "g")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_types_the_cpu_lacks_are_widened(dtype: torch.dtype, monkeypatch) -> None:
    seen, linear = [], matmul._linear
    monkeypatch.setattr(matmul, "_linear", lambda a, w, *rest: seen.append((a.dtype, w.dtype)) or linear(a, w, *rest))
    monkeypatch.setattr(matmul, "WIDENED", {dtype})
    a, b, bias, start = (torch.randn(s, dtype=dtype) for s in ((4, 60), (60, 8), (8,), (4, 8)))
    exact, into = a.double() @ b.double(), start.clone()
    product, added = ops.call("matmul", a, b, bias, backend="onednn"), torch.addmm(start, a, b)
    assert_as_good_as_torch(product, torch.addmm(bias, a, b), exact + bias.double(), what="product")
    assert ops.call("matmul", a, b, into=into, backend="onednn") is into
    assert_as_good_as_torch(into, added, exact + start.double(), what="added")
    assert product.dtype == dtype and seen == [(torch.float32, torch.float32)] * 2


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matmul: expected \(M, K\) and \(K, N\), found \(2, 3\) and \(2, 3\)"):
        ops.call("matmul", torch.zeros(2, 3), torch.zeros(2, 3), backend="onednn")
