"""The products of a training step on the CPU: our own kernels and the reference, against fp64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from coconut_fast import ops
from coconut_fast.model.weight import UNPACKED_ROWS, Weight, has_own_products
from tests.compare import assert_as_good_as_torch
from tests.families import make_pair, make_row
from tests.test_few_rows_linear import draw

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = [(0, 4, 3), (1, 2, 1), (7, 64, 33), (15, 96, 48), (70, 2050, 100), (300, 768, 96), (32, 8192, 48)]
own_products = pytest.mark.skipif(not ops.extension().gemm_runs(), reason="needs AVX512-BF16 and no AMX")


@pytest.fixture(params=[pytest.param("cpu", marks=own_products), "torch"])
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("asked", [None, "cpu", "torch", "triton"])
@pytest.mark.parametrize("reason", [None, "it needs another CPU"])
def test_whether_products_are_our_own_is_a_question(reason: str | None, asked: str | None, monkeypatch) -> None:
    """What a named backend cannot run, the op itself refuses when it is called."""
    monkeypatch.setattr(ops, "why_not", lambda op, backend, device: reason)
    with ops.use(asked):
        assert has_own_products(draw(4, 4), torch.float32) == (reason is None and asked in (None, "cpu"))


def test_a_training_step_needs_ops_that_only_torch_has() -> None:
    ids = torch.tensor([make_row(5, 2, 3, 1)])
    for backend in ("torch", "cpu"):
        model, _ = make_pair("gpt2")
        refused = pytest.raises(ValueError, match="ops.*: backend 'cpu' was asked for, but .* has no cpu impl")
        with ops.use(backend), nullcontext() if backend == "torch" else refused:
            model(ids, labels=ids).loss.backward()
            assert model.hf.lm_head.weight.grad is not None


@DTYPES
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=["from fp32", "from bf16"])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_matmul(backend: str, dtype: torch.dtype, source: torch.dtype, turned: bool, shape: tuple) -> None:
    m, k, n = shape
    x, w, bias = draw(m, k).to(dtype), draw(k, n, seed=1).to(source), draw(n, seed=2).to(dtype)
    packed = ops.call("pack_matrix", w.T.contiguous().T if turned else w, dtype, backend=backend)
    w = w.to(dtype)
    exact = x.double() @ w.double()
    plain = ops.call("packed_matmul", x, packed, n, backend=backend)
    biased = ops.call("packed_matmul", x, packed, n, bias, backend=backend)
    assert plain.dtype == biased.dtype == dtype
    assert_as_good_as_torch(plain, x @ w, exact, what="product")
    assert_as_good_as_torch(biased, torch.addmm(bias, x, w), exact + bias.double(), what="with bias")


@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("shape", [*SHAPES, (13, 300, 130), (3, 0, 5), (2, 129, 1)], ids=str)
def test_few_rows_matmul(backend: str, layout: str, shape: tuple) -> None:
    m, k, n = shape
    x, w, bias = draw(m, k), draw(k, n, seed=1), draw(n, seed=2)
    laid = {"rows": w, "columns": w.T.contiguous().T, "neither": draw(2 * k, 3 * n)[::2, ::3].copy_(w)}[layout]
    exact = x.double() @ w.double()
    plain = ops.call("few_rows_matmul", x, laid, backend=backend)
    biased = ops.call("few_rows_matmul", x, laid, bias, backend=backend)
    assert_as_good_as_torch(plain, x @ w, exact, what="product")
    assert_as_good_as_torch(biased, torch.addmm(bias, x, w), exact + bias.double(), what="with bias")
    if backend == "cpu":  # the same sums as the packed product's
        packed = ops.call("pack_matrix", w, torch.float32, backend=backend)
        assert torch.equal(biased, ops.call("packed_matmul", x, packed, n, bias, backend=backend))


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 33, 2049, 5001])
@pytest.mark.parametrize("widths", [(8, 48), (21, 50)], ids=str)
def test_weight_gradient(backend: str, dtype: torch.dtype, rows: int, widths: tuple[int, int]) -> None:
    left, right = draw(rows, widths[0]).to(dtype), draw(rows, widths[1], seed=1).to(dtype)
    exact = left.double().T @ right.double()
    fresh = ops.call("weight_gradient", left, right, backend=backend)
    start, sums, added = draw(*widths, seed=2), torch.full((widths[1],), torch.nan), draw(widths[1], seed=3)
    into, truth = start.clone(), added.double() + right.double().sum(0)
    assert torch.equal(ops.call("weight_gradient", left, right, None, sums, backend=backend), fresh)
    assert ops.call("weight_gradient", left, right, into, added, backend=backend) is into
    assert_as_good_as_torch(sums, right.float().sum(0), right.double().sum(0), what="column sums")
    assert_as_good_as_torch(added, truth.float(), truth, what="column sums, added")
    assert fresh.dtype == torch.float32
    plain = left.float().T @ right.float()
    assert_as_good_as_torch(fresh, plain, exact, what="gradient")
    assert_as_good_as_torch(into, start + plain, exact + start.double(), what="added")


@own_products
@DTYPES
def test_a_row_does_not_depend_on_its_batch_or_on_threads(dtype: torch.dtype) -> None:
    x, w = draw(150, 320).to(dtype), ops.call("pack_matrix", draw(320, 200, seed=1), dtype, backend="cpu")
    whole = ops.call("packed_matmul", x, w, 200, backend="cpu")
    parts = [ops.call("packed_matmul", part, w, 200, backend="cpu") for part in x.split([1, 6, 79, 64])]
    assert torch.equal(torch.cat(parts), whole)
    gradient, threads = ops.call("weight_gradient", x, whole, backend="cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.call("packed_matmul", x, w, 200, backend="cpu"), whole)
        assert torch.equal(ops.call("weight_gradient", x, whole, backend="cpu"), gradient)
    finally:
        torch.set_num_threads(threads)


@own_products
def test_nan_and_inf_survive() -> None:
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [2.0, 1.0]], dtype=torch.bfloat16)
    w = ops.call("pack_matrix", torch.tensor([[1.0], [float("nan")]]), torch.bfloat16, backend="cpu")
    assert ops.call("packed_matmul", x, w, 1, backend="cpu").isnan().all()
    w = ops.call("pack_matrix", torch.tensor([[1.0], [1.0]]), torch.bfloat16, backend="cpu")
    y = ops.call("packed_matmul", x, w, 1, backend="cpu").flatten()
    assert y[0].isnan() and y[1] == float("inf") and y[2] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(64, 96), (63, 96)], ids=str)  # odd: never packed
def test_every_product_of_a_weight(dtype: torch.dtype, transposed: bool, shape: tuple[int, int]) -> None:
    """All products of a Weight, few rows and many, the second one with what the first has packed."""
    k, n = shape
    w, bias = (x.to(torch.promote_types(dtype, torch.float32)) for x in (draw(k, n), draw(n, seed=1)))
    weight = Weight(w.T.contiguous() if transposed else w, bias, dtype, transposed)
    w, bias, pairs = w.to(dtype), bias.to(dtype), []
    for rows in (3, UNPACKED_ROWS + 5):
        x, grad = draw(rows, k, seed=2).to(dtype), draw(rows, n, seed=3).to(dtype)
        pairs.append((x, grad))
        truth = x.double() @ w.double() + bias.double()
        assert_as_good_as_torch(weight.times(x), torch.addmm(bias, x, w), truth, what="times")
        truth = grad.double() @ w.double().T
        assert_as_good_as_torch(weight.times_transposed(grad), grad @ w.T, truth, what="times_transposed")
    of_weight, of_bias = weight.gradients(pairs)
    assert of_weight.shape == weight.weight.shape and of_weight.dtype == weight.weight.dtype
    x, grad = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    truth, of_weight = x.double().T @ grad.double(), of_weight.T if transposed else of_weight
    assert_as_good_as_torch(of_weight, x.T @ grad, truth, what="gradient of the weight")
    assert_as_good_as_torch(of_bias, grad.sum(0), grad.double().sum(0), what="gradient of the bias")
    assert Weight(w, None, dtype, transposed).gradients([(grad, x) if transposed else (x, grad)])[1] is None


@pytest.mark.parametrize("stored", [torch.float16, torch.float64])
def test_a_weight_stored_in_another_dtype(stored: torch.dtype) -> None:
    w, x = draw(64, 48).to(stored), draw(80, 64, seed=1).bfloat16()
    weight = Weight(w, None, torch.bfloat16, False)
    truth = x.double() @ w.bfloat16().double()
    assert_as_good_as_torch(weight.times(x), x @ w.bfloat16(), truth, what="times")
    assert weight.gradients([(x, x[:, :48])])[0].dtype == stored


@own_products
def test_wrong_arguments_are_refused() -> None:
    w = ops.call("pack_matrix", torch.zeros(4, 3), torch.bfloat16, backend="cpu")
    for message, call in {
        "matrix is Double": lambda: ops.call("pack_matrix", torch.zeros(2, 2).double(), torch.float32, backend="cpu"),
        "dtype is Half": lambda: ops.call("pack_matrix", torch.zeros(2, 2), torch.float16, backend="cpu"),
        "packed is BFloat16": lambda: ops.call("packed_matmul", torch.zeros(2, 4), w, 3, backend="cpu"),
        "packed is .*expected": lambda: ops.call("packed_matmul", torch.zeros(2, 6).bfloat16(), w, 3, backend="cpu"),
        "matrix is .*3 rows": lambda: ops.call("few_rows_matmul", torch.zeros(2, 3), torch.zeros(4, 3), backend="cpu"),
        "x is BFloat16": lambda: ops.call("few_rows_matmul", w, torch.zeros(4, 3), backend="cpu"),
        "bias is": lambda: ops.call(
            "few_rows_matmul", torch.zeros(2, 4), torch.zeros(4, 3), torch.zeros(2), backend="cpu"
        ),
        "3 columns": lambda: ops.call("packed_matmul", torch.zeros(2, 3).bfloat16(), w, 3, backend="cpu"),
        "as many rows": lambda: ops.call("weight_gradient", torch.zeros(2, 3), torch.zeros(3, 3), backend="cpu"),
        "column_sums is": lambda: ops.call(
            "weight_gradient", torch.zeros(2, 3), torch.zeros(2, 3), None, torch.zeros(2), backend="cpu"
        ),
        "into is": lambda: ops.call(
            "weight_gradient", torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 2), backend="cpu"
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_other_cpus_use_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCONUT_FAST_ISA", "avx2")
    x, matrix = torch.randn(3, 8), torch.randn(8, 6)
    torch.testing.assert_close(ops.few_rows_matmul(x, matrix, None), x @ matrix)
    backend, reason = ops.choose("weight_gradient", x.device)
    assert backend == "torch" and "needs a CPU with AVX512-BF16" in reason
    assert not Weight(matrix, None, torch.float32, transposed=False).own
