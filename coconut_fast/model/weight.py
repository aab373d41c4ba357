"""A weight in the dtype and layout that a training step multiplies it in.

On CPUs with AVX512-BF16 and without AMX the products are our own (csrc/cpu/gemm.h), with the weight packed; elsewhere
they are PyTorch's libraries'. GPT-2's matrices on two Zen 5 cores, in GFLOP/s (oneDNN in brackets; bf16, peak 1,096):
2,648 rows 950 to 990 (800 to 910); 8 rows 480 to 600 (140 to 260); gradients of weights 840 to 880, directly in fp32
(840 to 910 in bf16). fp32, 8 rows through all matrices: 8.6 to 9.3 ms (10.4 to 11.7), transposed 9.9 to 10.8 (13.9);
reading the weights' 340 MB alone takes 5.2 to 6.7. On two Zen 4 cores, which reach 465 in bf16 and 232 in fp32 from
registers alone, 2,648 rows run at 447 to 458 and 221 to 226 (398 to 413 and 204 to 220).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from coconut_fast import ops
from coconut_fast.model.layer_norm import on_gpu

# Rows below which an fp32 weight is used as it is. From there on it is packed again for every product, to save memory;
# a bf16 weight is packed only once.
UNPACKED_ROWS = 384
SHARES = 64  # partial sums of a bias gradient on a GPU: with tiles of 128 columns, 384 programs for 768 columns


class Weight:
    """W (K, N) and a bias (N,), or None, for products in `dtype`; `weight` is W or its transpose. No autograd."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, transposed: bool) -> None:
        self.weight, self.bias, self.dtype, self.transposed = weight, bias, dtype, transposed
        self.own = not (weight.shape[0] % 2 or weight.shape[1] % 2) and has_own_products(weight, dtype)
        matrix = weight.T if transposed else weight
        self.matrix = matrix if self.own else matrix.to(dtype)
        self.vector = bias if bias is None else bias.to(dtype)
        self.packed: dict[bool, Tensor] = {}  # by whether it is for times_transposed()

    def times(self, x: Tensor) -> Tensor:
        """x (M, K) W + bias -> (M, N); both in `dtype`."""
        return self._product(x, self.matrix, self.vector, back=False)

    def times_transposed(self, grad: Tensor) -> Tensor:
        """grad (M, N) W^T -> (M, K); both in `dtype`."""
        return self._product(grad, self.matrix.T, None, back=True)

    def gradients(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None]:
        """Gradients of `weight` and `bias`, in their dtypes: sums over one or more x (M, K) and grad (M, N)."""
        total: Any = None
        sums: Any = None
        together = self.own and self.bias is not None and not self.transposed  # one kernel makes both
        for x, grad in pairs:
            left, right = (grad, x) if self.transposed else (x, grad)
            if together:
                sums = torch.empty(right.shape[1], dtype=torch.float32, device="cpu") if sums is None else sums
                total = ops.weight_gradient(left, right, total, sums)
                continue
            total = ops.weight_gradient(left, right, total) if self.own else ops.matmul(left.T, right, into=total)
            if self.bias is not None and on_gpu(grad):
                sums = grad.new_zeros(SHARES, grad.shape[1], dtype=torch.float32) if sums is None else sums
                ops.column_sums(grad.contiguous(), sums)
            elif self.bias is not None:
                sums = grad.sum(0) if sums is None else sums.add_(grad.sum(0))
        if self.bias is None:
            return total.to(self.weight.dtype), None
        sums = sums if sums.dim() == 1 else sums.sum(0)
        return total.to(self.weight.dtype), sums.to(self.bias.dtype)

    def _product(self, x: Tensor, matrix: Tensor, vector: Tensor | None, back: bool) -> Tensor:
        if not self.own:
            return ops.matmul(x, matrix, vector)
        if len(x) < UNPACKED_ROWS and self.dtype == matrix.dtype == torch.float32:
            return ops.few_rows_matmul(x, matrix, vector)
        packed = self.packed.get(back)
        if packed is None:
            packed = ops.pack_matrix(matrix, self.dtype)
            if self.dtype == torch.bfloat16:
                self.packed[back] = packed
        return ops.packed_matmul(x, packed, matrix.shape[1], vector)


def has_own_products(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether products with this weight are our own here: a question, so no backend by name makes it an error."""
    ours = (torch.float32, torch.bfloat16)
    if weight.dtype not in ours or dtype not in ours or not weight.is_cpu:
        return False
    return ops.asked() in (None, "cpu") and ops.why_not("packed_matmul", "cpu", weight.device) is None
