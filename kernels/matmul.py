"""Matrix product by oneDNN: a @ b + bias, operands in any layout.

PyTorch hands fp32 products to MKL, which takes its AVX2 path on AMD processors. Measured on two of them, 2,650 to 2,800
rows through GPT-2's matrices on two cores: 200 GFLOP/s with MKL and 340 to 450 with oneDNN's AVX-512 kernels on Zen 5,
190 to 206 and 204 to 220 on Zen 4. Other CPUs take oneDNN too; MKL may be as fast or faster on Intel's. PyTorch hands
bf16 and fp16 products to oneDNN itself where it has kernels for them; elsewhere (no AVX-512) PyTorch's loops run at
0.3 to 16 GFLOP/s, and ours widens both operands to fp32. fp64 products have no alternative. Bound by the rate of
multiply-adds; for a few rows by reading b once.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The operator of Inductor's fused linear layers: X @ W.T + bias with W contiguous or its transpose; X is copied if
# not contiguous. W with gaps, such as some columns of a wider one, would go through a loop of 0.2 GFLOP/s.
_linear = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None


def _widened() -> set[torch.dtype]:
    """The 16-bit types that oneDNN has no kernels for on this CPU."""
    if _linear is None:
        return set()
    runs = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return {dtype for dtype, supported in runs.items() if not supported}


WIDENED = _widened()


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, *, into: Tensor | None = None) -> Tensor:
    """a (M, K), b (K, N), bias (N,) or None, of one dtype -> (M, N), outside of autograd.

    into: (M, N) of the same dtype, to which the product is added in place; not together with a bias.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul: expected (M, K) and (K, N), found {tuple(a.shape)} and {tuple(b.shape)}")
    if bias is not None and into is not None:
        raise ValueError("matmul: expected a bias or a matrix to add to, found both")
    if a.dtype in WIDENED and a.is_cpu:
        product = matmul(a.float(), b.float(), None if bias is None else bias.float())
        return product.to(a.dtype) if into is None else into.add_(product)
    if _linear is None or a.dtype != torch.float32 or not a.is_cpu or not a.numel() or not b.numel():
        if into is not None:
            return into.addmm_(a, b)
        return a @ b if bias is None else torch.addmm(bias, a, b)
    weight = b.T if b.is_contiguous() or b.T.is_contiguous() else b.T.contiguous()
    product = _linear(a, weight, bias, "none", [], "")
    return product if into is None else into.add_(product)
