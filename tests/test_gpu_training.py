"""A training step on a GPU against one on the CPU that uses the plain mathematics of every op.

The same tests run on the CPU with the ops chosen there, which checks the tests where there is no GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from coconut_fast import Coconut, ops
from coconut_fast.model import attention
from coconut_fast.model.attention import num_joined
from coconut_fast.model.batch import collate
from coconut_fast.tokens import IGNORE
from tests.compare import assert_as_good_as_torch
from tests.families import TOKENS, make_pair, make_row

ROWS = [make_row(9, 3, 5, 1), make_row(20, 1, 4, 2), make_row(6, 0, 7, 3)]
JOINED = [make_row(9, 8, 5, 1), make_row(20, 6, 4, 2), make_row(6, 9, 7, 3)]  # five passes of one token a row
MANY = [make_row(5 + i % 9, 2 + i % 2, 4, i) for i in range(130)]  # few queries a row have another backward kernel
ATTENTION = {"cpu": "cpu", "cuda": "triton"}
Step = tuple[torch.Tensor, dict[str, torch.Tensor]]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device, with fp32 products in fp32: some CUDA images turn TF32 on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for op in ("ragged_attention", "ragged_attention_backward", "kv_append"):
        assert ops.choose(op, torch.device(request.param))[0] == ATTENTION[request.param]
    yield request.param
    torch.set_float32_matmul_precision(before)


def step(model: Coconut, where: str, backend: str | None = None, autocast: bool = False, rows=ROWS) -> Step:
    """Loss and gradients of a copy of the model, on the CPU."""
    model = copy.deepcopy(model).to(where).train()
    labels = [[IGNORE] * (len(r) - 4) + r[-4:] for r in rows]
    batch = collate(rows, TOKENS.thought, labels).to(where)
    with ops.use(backend):
        with torch.autocast(where, torch.bfloat16, enabled=autocast):
            loss = model(batch=batch, loss_only=True).loss
        loss.backward()
    return loss.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize("rows", [ROWS, JOINED], ids=["apart", "joined"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_and_gradients_are_the_plain_ones(monkeypatch, family: str, rows, where: str) -> None:
    """In fp32 they differ only by the order of sums: on the CPU by 2e-7 of the loss, 1e-6 of a largest gradient."""
    model = make_pair(family)[0]
    monkeypatch.setitem(attention.WORTH_JOINING, "cpu", 3)
    assert num_joined(collate(rows, TOKENS.thought).to(where), True) == (5 if rows is JOINED else 0)
    plain, expected = step(model, "cpu", "torch", rows=rows)
    (loss, found), (_, again) = (step(model, where, rows=rows) for _ in range(2))
    assert abs(loss / plain - 1) < 1e-5
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
        assert torch.equal(found[name], again[name]), f"{name}: two runs differ"


@pytest.mark.parametrize("rows", [ROWS, MANY], ids=["few rows", "many rows"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_under_autocast_is_as_good_as_torch(family: str, rows, where: str) -> None:
    model = make_pair(family)[0]
    plain, expected = step(model, "cpu", "torch", autocast=True, rows=rows)
    loss, found = step(model, where, autocast=True, rows=rows)
    truth, true_gradients = step(model.double(), "cpu", "torch", rows=rows)
    assert_as_good_as_torch(loss, plain, truth.double(), what="loss", working=torch.bfloat16)
    for name, gradient in true_gradients.items():
        assert found[name].dtype == torch.float32
        assert_as_good_as_torch(found[name], expected[name], gradient, what=name, working=torch.bfloat16)
