"""The fused head and loss against the plain one, in value and gradients."""

from __future__ import annotations

import pytest
import torch

from coconut_fast import ops
from coconut_fast.kernels import linear_cross_entropy as kernel
from coconut_fast.kernels.reference import linear_cross_entropy_ref, weight_gradient_ref
from tests.compare import assert_as_good_as_torch


def _inputs(n: int, bias: bool, dtype: torch.dtype) -> list:
    g = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, 24, generator=g), torch.randn(37, 24, generator=g)
    targets = torch.randint(0, 37, (n,), generator=g)
    b = torch.randn(37, generator=g).to(dtype).requires_grad_() if bias else None
    return [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), b, targets]


def _run(op, inputs: list, **options) -> list[torch.Tensor]:
    loss = op(*inputs, **options)
    (loss * 0.37).backward()
    return [loss.detach(), *(x.grad for x in inputs[:3] if x is not None)]


def _on_device(hidden, weight, bias, targets, *, scale: float = 1.0, softcap: float = 0.0) -> torch.Tensor:
    return kernel._OnDevice.apply(hidden, weight, bias, targets, scale, softcap)


def _gradient(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    ours = ops.choose("weight_gradient", left.device)[0] == "cpu"
    return (ops.weight_gradient if ours else weight_gradient_ref)(left, right, into)


@pytest.mark.parametrize("gradient", [None, _gradient], ids=["library", "own"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [0, 1, 5, 64])  # 64: several chunks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_linear_cross_entropy(monkeypatch, dtype: torch.dtype, n: int, bias: bool, softcap: float, gradient) -> None:
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 37 * 4 * 13)
    options = {"scale": 0.6, "softcap": softcap}
    inputs = _inputs(n, bias, dtype)
    double = [x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    truth = _run(linear_cross_entropy_ref, double, **options)
    plain = _run(linear_cross_entropy_ref, _inputs(n, bias, dtype), **options)
    ours = _run(kernel.linear_cross_entropy, inputs, **options, weight_gradient=gradient)
    for name, *tensors in zip(["loss", "dhidden", "dweight", "dbias"], ours, plain, truth, strict=False):
        assert_as_good_as_torch(*tensors, what=name, working=dtype)


@pytest.mark.parametrize("n", [9, 64])  # 64: several chunks
def test_rows_without_a_target_count_for_nothing(monkeypatch, n: int) -> None:
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 37 * 8 * 13)
    whole, part = _inputs(n, True, torch.float64), _inputs(n, True, torch.float64)
    kept = torch.arange(n) % 3 > 0
    whole[3] = whole[3].masked_fill(~kept, -100)
    part = [part[0].detach()[kept].requires_grad_(), *part[1:3], part[3][kept]]
    found, expected = _run(kernel.linear_cross_entropy, whole), _run(linear_cross_entropy_ref, part)
    assert not found[1][~kept].any()
    found[1] = found[1][kept]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gradient", [None, _gradient], ids=["library", "own"])
def test_the_gradient_of_a_bias_is_summed_in_fp32(monkeypatch, gradient) -> None:
    hidden, weight, bias, targets = _inputs(64, True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        kernel.linear_cross_entropy(hidden, weight, bias, targets, weight_gradient=gradient).backward()
    assert (bias.grad != bias.grad.bfloat16()).any(), "rounded to bf16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_of_many_chunks_are_rounded_once(monkeypatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 37 * 4 * 4)
    double = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in _inputs(256, True, dtype)]
    truth = _run(linear_cross_entropy_ref, double)
    plain = _run(linear_cross_entropy_ref, _inputs(256, True, dtype))
    ours = _run(kernel.linear_cross_entropy, _inputs(256, True, dtype))
    for name, *tensors in zip(["dweight", "dbias"], ours[2:], plain[2:], truth[2:], strict=True):
        errors = [((x.double() - tensors[2]).norm() / tensors[2].norm()).item() for x in tensors[:2]]
        assert errors[0] <= 1.5 * errors[1], name


@pytest.mark.parametrize("n", [9, 64])  # 64: several chunks
@pytest.mark.parametrize("gradient", [None, _gradient], ids=["library", "own"])
def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_the_weights(monkeypatch, gradient, n: int) -> None:
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 37 * 4 * 13)

    def run(op, inputs: list, **options) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = op(*inputs, **options)
        loss.backward()
        return [loss.detach(), inputs[0].grad, inputs[1].grad]

    ours = run(kernel.linear_cross_entropy, _inputs(n, False, torch.float32), weight_gradient=gradient)
    plain = run(linear_cross_entropy_ref, _inputs(n, False, torch.float32))
    truth = run(linear_cross_entropy_ref, _inputs(n, False, torch.float64))
    assert all(x.dtype == torch.float32 for x in ours)
    assert 0 < (ours[0] - truth[0]).abs() < 0.02 * truth[0]
    for name, *tensors in zip(["loss", "dhidden", "dweight"], ours, plain, truth, strict=True):
        assert_as_good_as_torch(*tensors, what=name, working=torch.bfloat16)


@pytest.mark.parametrize("n", [14, 64])  # 64: several chunks
@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        (kernel.linear_cross_entropy, torch.float16),
        (kernel.linear_cross_entropy, torch.bfloat16),
        (_on_device, torch.float16),
    ],
)
def test_small_probabilities_have_gradients(monkeypatch, op, dtype: torch.dtype, n: int, device) -> None:
    """A confident model's gradients are too small for fp16 until the loss is scaled."""
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 37 * 4 * 24)
    monkeypatch.setattr(kernel, "DEVICE_CHUNK_BYTES", 64 * 2 * 24)
    g = torch.Generator().manual_seed(n)
    targets, weight = torch.randint(0, 5, (n,), generator=g), torch.eye(37, 40)
    hidden = 18.0 * weight[targets] + torch.randn(n, 40, generator=g) / 2  # other tokens: about 1e-8 each

    def grads(op, of: torch.dtype) -> list[torch.Tensor]:
        where = device if op is _on_device else torch.device("cpu")
        inputs = [x.detach().to(where, of).requires_grad_() for x in (hidden, weight)]
        with torch.autocast(where.type, dtype, enabled=of == torch.float32):
            loss = op(*inputs, None, targets.to(where))
        (loss * 65536 / n).backward()
        return [x.grad.cpu() for x in inputs]

    ours, plain = grads(op, torch.float32), grads(linear_cross_entropy_ref, torch.float32)
    truth = grads(linear_cross_entropy_ref, torch.float64)
    for name, *tensors in zip(["dhidden", "dweight"], ours, plain, truth, strict=True):
        small = [x[5:] for x in tensors] if name == "dweight" else tensors  # rows of tokens that are no target
        errors = [((x.double() - small[2]).norm() / small[2].norm()).item() for x in small[:2]]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps, name


def test_a_loss_of_zero_has_no_gradient_however_it_is_scaled() -> None:
    hidden, weight = torch.full((2, 4), 9.0, requires_grad=True), torch.zeros(3, 4)
    weight[1] = 9.0
    with torch.autocast("cpu", torch.float16):
        loss = kernel.linear_cross_entropy(hidden, weight, None, torch.tensor([1, 1]))
    (loss * 2.0**17).backward()
    assert loss == 0 and not hidden.grad.any()


def test_without_gradients_none_are_computed() -> None:
    inputs = _inputs(9, True, torch.float32)
    with torch.no_grad():
        loss = kernel.linear_cross_entropy(*inputs)
    assert not loss.requires_grad


def test_wrong_shapes_are_refused() -> None:
    hidden, weight, _, targets = _inputs(9, False, torch.float32)
    with pytest.raises(ValueError, match="expected hidden"):
        kernel.linear_cross_entropy(hidden[None], weight, None, targets)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [0, 1, 64])  # 64: several chunks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_on_a_device(monkeypatch, dtype: torch.dtype, n: int, bias: bool, softcap: float, device) -> None:
    """The GPU's code path, which pads the weight from 37 rows to 64."""
    monkeypatch.setattr(kernel, "DEVICE_CHUNK_BYTES", 64 * dtype.itemsize * 25)
    options = {"scale": 0.6, "softcap": softcap}
    inputs = _inputs(n, bias, dtype)
    double = [x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    truth = _run(linear_cross_entropy_ref, double, **options)
    plain = _run(linear_cross_entropy_ref, _inputs(n, bias, dtype), **options)
    moved = [None if x is None else x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs]
    ours = [x.cpu() for x in _run(_on_device, moved, **options)]
    for name, *tensors in zip(["loss", "dhidden", "dweight", "dbias"], ours, plain, truth, strict=False):
        assert_as_good_as_torch(*tensors, what=name, working=dtype)


@pytest.mark.parametrize("chunk", [1 << 20, 64 * 4 * 3])
def test_a_second_backward_on_a_device_gives_the_same(monkeypatch, chunk: int, device) -> None:
    """The first one overwrites the logits."""
    monkeypatch.setattr(kernel, "DEVICE_CHUNK_BYTES", chunk)
    hidden, weight, _, targets = (x if x is None else x.detach().to(device) for x in _inputs(7, False, torch.float32))
    loss = _on_device(hidden.requires_grad_(), weight.requires_grad_(), None, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert first[1].any() and all(map(torch.equal, first, torch.autograd.grad(loss, (hidden, weight))))


def test_rows_that_do_not_count_change_nothing_on_a_device(device) -> None:
    hidden, weight, _, targets = (x if x is None else x.detach().to(device) for x in _inputs(9, False, torch.float32))
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    padded = torch.cat([hidden.detach(), hidden.detach()[:2] * 3]).requires_grad_()
    expected = _on_device(*inputs, None, targets)
    found = _on_device(padded, weight, None, torch.cat([targets, targets.new_full((2,), -100)]))
    assert torch.equal(found, expected)
    of_hidden, of_weight = torch.autograd.grad(found, (padded, weight))
    theirs = torch.autograd.grad(expected, inputs)
    assert torch.equal(of_hidden[:9], theirs[0]) and not of_hidden[9:].any()
    torch.testing.assert_close(of_weight, theirs[1])
