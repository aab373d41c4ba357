"""Attention on CPU at the far ends of its keywords: windows beyond int32, scores near the end of fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coconut_fast import ops
from coconut_fast.infer.native import NativeModel
from tests.compare import assert_as_good_as_torch
from tests.test_attention import BF16, FP32, FP64, dense, make, run
from tests.test_native import native_chains, wrap
from tests.test_plan import llama_like

QUERIES, LENGTHS = [1, 40], [70, 90]  # a row by dot products, one by tiles


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_window_that_no_row_leaves_is_none(dtype: torch.dtype, window: int) -> None:
    case, grad_out = make(QUERIES, LENGTHS, dtype=dtype), torch.randn(sum(QUERIES), 4, 64).to(dtype)
    wide = replace(case, keywords=case.keywords | {"window": window, "max_length": 2**45})
    ours, expected = run(wide, grad_out), run(case, grad_out)
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("window", [64, 2**31, 2**40])
def test_nor_does_a_row_of_the_native_chain(window: int) -> None:
    """The model has 64 positions."""
    chains = []
    for sliding in (window, None):
        torch.manual_seed(0)
        chains.append(native_chains(NativeModel(wrap(llama_like("Mistral", sliding_window=sliding)), threads=1)))
    assert torch.equal(*chains)


def test_scores_near_the_end_of_fp32() -> None:
    """Equal ones, so that every key seen has the same weight."""
    case = make(QUERIES, LENGTHS, scaling=1.0)
    case.query[:], case.keys[:] = torch.eye(1, 64), -3e38 * torch.eye(1, 64)
    out, lse = ops.ragged_attention(case.query, case.keys, case.values, *case.where(), **case.keywords)
    truth, plain = dense(case.to(FP64)), dense(case)
    assert_as_good_as_torch(out, plain[0], truth[0], what="out")
    assert (lse == case.keys.min()).all(), "log n is far below one unit in the last place"
