"""The one comparison helper of the test suite: errors are judged against an fp64 truth, never by a guessed tolerance.

An implementation may be off by at most twice what plain PyTorch is off by in the same working dtype, plus some units in
the last place of the largest value in the result: 8 in fp32, 1 in 16 bits, where 8 would be 6% of that value. Both
terms come from the data.
"""

from __future__ import annotations

import torch


def assert_as_good_as_torch(
    ours: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    *,
    ulps: int | None = None,
    what: str = "result",
    working: torch.dtype | None = None,
) -> None:
    """ours, plain: the same quantity by us and by plain PyTorch in the working dtype; truth: the same in fp64.

    working: the dtype computed in, where the result is stored in a finer one.
    """
    assert truth.dtype == torch.float64, f"the truth must be fp64, is {truth.dtype}"
    assert ours.shape == plain.shape == truth.shape, f"{what}: {ours.shape}, {plain.shape}, {truth.shape}"
    assert torch.isfinite(ours).all(), f"{what}: {int((~torch.isfinite(ours)).sum())} values are not finite"
    if truth.numel() == 0:
        return
    dtype = working or plain.dtype
    ours_error = (ours.double() - truth).abs().max().item()
    plain_error = (plain.double() - truth).abs().max().item()
    ulp = torch.finfo(dtype).eps * truth.abs().max().item()
    allowed = 2 * plain_error + (ulps or (8 if torch.finfo(dtype).eps < 1e-5 else 1)) * ulp
    assert ours_error <= allowed, (
        f"{what}: off by {ours_error:.3e} from the fp64 truth; plain PyTorch in {dtype} is off by {plain_error:.3e}, "
        f"so {allowed:.3e} is allowed"
    )
