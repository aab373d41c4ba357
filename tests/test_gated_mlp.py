"""gated_mlp: the Triton kernel against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from tests.compare import assert_as_good_as_torch
from tests.paged import truth_of, view


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "swiglu"])
@pytest.mark.parametrize(("rows", "width", "biased"), [(1, 2, False), (3, 200, True), (2, 2500, False)])
def test_against_the_reference(rows, width, biased, activation, dtype, device) -> None:
    x = view((torch.randn(rows, width) * 3).to(device, dtype))
    bias = torch.randn(width).to(device, dtype) if biased else None
    truth_x, truth_bias = x.cpu().double(), None if bias is None else bias.cpu().double()
    ours = ops.gated_mlp(x, activation=activation, bias=bias, backend="triton")
    plain = ops.gated_mlp(x, activation=activation, bias=bias, backend="torch")
    truth = ops.gated_mlp(truth_x, activation=activation, bias=truth_bias, backend="torch")
    assert_as_good_as_torch(ours.cpu(), plain.cpu(), truth)


def test_small_arguments_of_gelu_keep_their_relative_accuracy(device) -> None:
    x = torch.logspace(-6, 1, 400, device=device)[None].contiguous()
    ours = ops.gated_mlp(x, activation="gelu_tanh", backend="triton")
    truth = ops.gated_mlp(*truth_of(x), activation="gelu_tanh", backend="torch")
    assert ((ours.cpu().double() / truth - 1).abs() < 16 * torch.finfo(torch.float32).eps).all()


def test_wrong_inputs_are_named(device) -> None:
    with pytest.raises(ValueError, match="activation is 'relu'"):
        ops.gated_mlp(torch.randn(2, 4, device=device), activation="relu", backend="triton")
    with pytest.raises(ValueError, match="3 columns"):
        ops.gated_mlp(torch.randn(2, 3, device=device), activation="swiglu", backend="triton")


def test_opcheck(device) -> None:
    from coconut_fast.kernels import gated_mlp

    library.opcheck(gated_mlp._OP, (torch.randn(2, 6, device=device),), {"activation": "swiglu"})
