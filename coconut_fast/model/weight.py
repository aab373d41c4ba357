"""A weight in the dtype and layout that a training step multiplies it in.

On CPUs with AVX512-BF16 and without AMX the products are our own (csrc/cpu/gemm.h), with the weight packed; elsewhere
they are PyTorch's libraries'. GPT-2's matrices on two Zen 5 cores, in GFLOP/s (bf16, peak 1,096): 2,648 rows 950 to 990
where oneDNN reaches 800 to 910; 8 rows 480 to 600 where it reaches 140 to 260; gradients of weights 840 to 880, in fp32
at once, where it reaches 840 to 910 in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coconut_fast import ops

FEW = (
    64  # rows for which an fp32 weight is not packed: bf16 ones are packed once for all passes, fp32 for every product
)


class Weight:
    """W (K, N), multiplied in `dtype`. `weight` is W, or W^T where `transposed`, in any floating dtype. No autograd."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, transposed: bool) -> None:
        matrix, self.transposed = weight.T if transposed else weight, transposed
        self.own = _have_own_products(dtype, matrix.device) and not (matrix.shape[0] % 2 or matrix.shape[1] % 2)
        self.matrix, self.dtype = matrix if self.own else matrix.to(dtype), dtype
        self.packed: dict[bool, Tensor] = {}  # by the direction

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (M, K) W + bias (N,) -> (M, N); all of the dtype."""
        return self._product(x, self.matrix, bias, back=False)

    def times_transposed(self, grad: Tensor) -> Tensor:
        """grad (M, N) W^T -> (M, K), of the dtype."""
        return self._product(grad, self.matrix.T, None, back=True)

    def add_gradient(self, x: Tensor, grad: Tensor, into: Tensor | None) -> Tensor:
        """The gradient of `weight` for x (M, K) and grad (M, N), new or added to `into`, which comes from here."""
        left, right = (grad, x) if self.transposed else (x, grad)
        return ops.weight_gradient(left, right, into) if self.own else ops.matmul(left.T, right, into=into)

    def _product(self, x: Tensor, matrix: Tensor, bias: Tensor | None, back: bool) -> Tensor:
        if not self.own or (self.dtype == torch.float32 and len(x) < FEW):
            return ops.matmul(x, matrix, bias)
        packed = self.packed.get(back)
        if packed is None:
            packed = ops.pack_matrix(matrix, self.dtype)
            if self.dtype == torch.bfloat16:
                self.packed[back] = packed
        return ops.packed_matmul(x, packed, matrix.shape[1], bias)


def _have_own_products(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype not in (torch.float32, torch.bfloat16) or device.type != "cpu":
        return False
    return ops.choose("packed_matmul", device)[0] == "cpu" and ops.extension().gemm_runs()
