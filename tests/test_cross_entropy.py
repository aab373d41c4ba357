"""cross_entropy and its backward: the Triton kernels against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from tests.compare import assert_as_good_as_torch
from tests.paged import truth_of

CASES = {  # rows, vocabulary, width, options
    "one": (1, 1, 16, {}),
    "padded": (5, 37, 64, {"scale": 0.6}),
    "blocks": (3, 9001, 9008, {}),  # more than two blocks
    "softcap": (4, 100, 112, {"softcap": 5.0, "scale": 1.5}),
    "bias": (4, 100, 112, {"bias": True, "softcap": 4.0}),
}


def arrange(case: str, dtype: torch.dtype, device: torch.device):
    rows, vocabulary, width, options = CASES[case]
    logits = (torch.randn(rows, width) * 4).to(dtype)
    logits[:, vocabulary:] = float("nan")  # not read
    targets = torch.randint(0, vocabulary, (rows,))
    targets[rows // 2] = -100 if rows > 1 else 0
    options = dict(options)
    if options.pop("bias", False):
        options["bias"] = torch.randn(vocabulary).to(device, dtype)
    return logits.to(device), targets.to(device), {"vocabulary": vocabulary, **options}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case, dtype, device) -> None:
    logits, targets, options = arrange(case, dtype, device)
    grad = torch.tensor(0.37, device=device)
    runs = []
    for double, backend in ((False, "triton"), (False, "torch"), (True, "torch")):
        x, g, keywords = logits.clone(), grad, dict(options)
        if double:
            x, g = truth_of(logits, grad)
            keywords |= {"bias": truth_of(options["bias"])[0]} if "bias" in options else {}
        at = targets.to(x.device)
        losses, statistics = ops.cross_entropy(x, at, **keywords, backend=backend)
        ops.cross_entropy_backward(x, at, statistics, g, **keywords, backend=backend)
        runs.append((losses, statistics, x))
    for name, ours, plain, truth in zip(("losses", "statistics", "gradient"), *runs, strict=True):
        assert ours.dtype == plain.dtype
        assert_as_good_as_torch(ours.cpu(), plain.cpu(), truth, what=name)
    assert not runs[0][2][:, options["vocabulary"] :].any() and not runs[0][2][targets < 0].any()
    assert not runs[0][0][targets < 0].any()


def test_a_sure_rows_loss_is_not_rounded_like_its_logits(device) -> None:
    logits = torch.zeros(1, 16, device=device)
    logits[0, 3] = 30.0
    target = torch.tensor([3], device=device)
    losses, _ = ops.cross_entropy(logits, target, vocabulary=16, backend="triton")
    exact = torch.log1p(15 * torch.exp(torch.tensor(-30.0, dtype=torch.float64)))
    assert losses.item() == 0 or abs(losses.item() / exact.item() - 1) < 1e-3


def test_wrong_inputs_are_named_and_no_rows_are_fine(device) -> None:
    logits, targets, _ = arrange("padded", torch.float32, device)
    with pytest.raises(ValueError, match="cross_entropy: vocabulary is 65, expected 1 to 64"):
        ops.cross_entropy(logits, targets, vocabulary=65, backend="triton")
    with pytest.raises(ValueError, match="targets has shape"):
        ops.cross_entropy(logits, targets[:2], vocabulary=37, backend="triton")
    with pytest.raises(ValueError, match="bias has shape"):
        ops.cross_entropy(logits, targets, vocabulary=37, bias=logits[0], backend="triton")
    losses, statistics = ops.cross_entropy(logits[:0], targets[:0], vocabulary=37, backend="triton")
    assert losses.shape == (0,) and statistics.shape == (0, 2)
    with pytest.raises(ValueError, match="cross_entropy_backward: statistics has shape"):
        ops.cross_entropy_backward(logits, targets, statistics, logits.sum(), vocabulary=37, backend="triton")


def test_opcheck(device) -> None:
    from coconut_fast.kernels import cross_entropy, cross_entropy_backward

    logits, targets, options = arrange("padded", torch.float32, device)
    logits = logits.nan_to_num()
    library.opcheck(cross_entropy._OP, (logits, targets), options)
    _, statistics = cross_entropy.cross_entropy(logits, targets, **options)
    grad = torch.ones((), device=device)
    library.opcheck(cross_entropy_backward._OP, (logits, targets, statistics, grad), options)
