"""few_rows_linear against fp64 on every instruction set, and the models whose linear layers run on it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from coconut_fast import Coconut, generate, ops
from coconut_fast.infer import linears
from coconut_fast.infer.linears import fast_linears, plain_linears
from coconut_fast.kernels import matmul
from tests.compare import assert_as_good_as_torch
from tests.families import TOKENS, make_hf

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = [(0, 4, 3), (1, 1, 1), (1, 768, 64), (2, 31, 16), (5, 100, 37), (6, 64, 5), (13, 129, 33), (64, 2050, 18)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("isa")
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    x, w, bias = draw(m, k).to(dtype), draw(n, k, seed=1).to(dtype), draw(n, seed=2).to(dtype)
    exact = x.double() @ w.double().T
    plain, biased = (ops.call("few_rows_linear", x, w, *b, backend="cpu") for b in ((), (bias,)))
    assert plain.dtype == dtype and plain.shape == (m, n)
    assert_as_good_as_torch(plain, ops.call("few_rows_linear", x, w, backend="torch"), exact, what="product")
    expected = ops.call("few_rows_linear", x, w, bias, backend="torch")
    assert_as_good_as_torch(biased, expected, exact + bias.double(), what="with bias")


@pytest.mark.usefixtures("isa")
@DTYPES
def test_a_row_has_the_same_bits_in_any_batch_on_any_number_of_threads(dtype: torch.dtype) -> None:
    x, w, bias = draw(64, 777).to(dtype), draw(300, 777, seed=1).to(dtype), draw(300, seed=2).to(dtype)
    whole = ops.few_rows_linear(x, w, bias)
    for parts in ([1] * 64, [2, 3, 59], [4, 5, 6, 7, 42]):
        assert torch.equal(torch.cat([ops.few_rows_linear(part, w, bias) for part in x.split(parts)]), whole)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):  # `make test` gives each process one
            torch.set_num_threads(threads)
            assert torch.equal(ops.few_rows_linear(x, w, bias), whole)
    finally:
        torch.set_num_threads(before)


def test_any_shape_and_layout_of_x() -> None:
    x, w = draw(3, 4, 10), draw(6, 10, seed=1)
    for turned in (x, x.transpose(0, 1), x[:, ::2], x[0, 0], x[:0]):
        ours = ops.call("few_rows_linear", turned, w, backend="cpu")
        torch.testing.assert_close(ours, nn.functional.linear(turned, w))
    bias = draw(6)
    assert torch.equal(ops.few_rows_linear(torch.zeros(2, 0), torch.zeros(6, 0), bias), bias.expand(2, 6))


REFUSED = {
    "x is Half": lambda: (torch.zeros(2, 4).half(), torch.zeros(3, 4).half()),
    r"weight is Float \[3, 5\].*shape \[-1, 4\]": lambda: (torch.zeros(2, 4), torch.zeros(3, 5)),
    "weight is .*not contiguous": lambda: (torch.zeros(2, 4), torch.zeros(4, 3).T),
    "weight is BFloat16; expected Float": lambda: (torch.zeros(2, 4), torch.zeros(3, 4).bfloat16()),
    r"bias is .*shape \[3\]": lambda: (torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(4)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_arguments_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=f"few_rows_linear: {message}"):
        ops.call("few_rows_linear", *REFUSED[message](), backend="cpu")


# ---- models ----------------------------------------------------------------------------------------------------------


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.fixture
def model() -> Coconut:
    return Coconut(make_hf("gemma2"), TOKENS)


PROMPTS = [[5, 6, 7, TOKENS.start, TOKENS.thought, TOKENS.thought, TOKENS.end], [9, 8, TOKENS.thought]]


def test_passes_of_one_token_a_row_run_on_it_and_no_others(model: Coconut, monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.use("torch"):
        expected = generate(model, PROMPTS, max_new_tokens=5)
    rows: dict[str, set[int]] = {"ours": set(), "PyTorch's": set()}

    def spy(whose: str, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *rest: rows[whose].add(x.numel() // x.shape[-1]) or product(x, *rest)

    monkeypatch.setattr(ops.extension(), "few_rows_linear", spy("ours", ops.extension().few_rows_linear))
    monkeypatch.setattr(nn.functional, "linear", spy("PyTorch's", nn.functional.linear))
    output = generate(model, PROMPTS, max_new_tokens=5)
    assert output.token_ids == expected.token_ids
    assert output.stats.backend == "eager"
    # The prompts have 4 and 2 tokens before their thoughts. The last thoughts run with the token after them.
    assert rows == {"ours": {1, 2}, "PyTorch's": {6, 3}}
    assert replaced(model) == []


@pytest.mark.parametrize("widened", [True, False])
def test_prompts_run_in_fp32_where_the_cpu_has_no_bf16(widened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, exact = (Coconut(make_hf("gemma2", torch.bfloat16), TOKENS) for _ in range(2))
    monkeypatch.setattr(matmul, "WIDENED", {torch.bfloat16} if widened else set())
    monkeypatch.setattr(ops.extension(), "has_tiles", lambda: False)
    options = {"max_new_tokens": 2, "return_thoughts": True}
    with ops.use("torch"):
        theirs, truth = (generate(m, PROMPTS, **options).thoughts for m in (model, exact.double()))
    rows: set[int] = set()
    product = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: rows.add(x.shape[-2]) or product(x, *rest))
    ours = generate(model, PROMPTS, **options).thoughts
    assert rows == (set() if widened else {6, 3})
    assert_as_good_as_torch(torch.cat(ours), torch.cat(theirs), torch.cat(truth), what="thoughts")
    assert replaced(model) == []


@torch.inference_mode()
def test_which_calls_it_takes(model: Coconut) -> None:
    layer = model.hf.model.layers[0].self_attn.q_proj
    with fast_linears(plain_linears(model)):
        x, calls = draw(3, layer.in_features), []
        product = layer.forward.product
        layer.forward.product = lambda *args: calls.append(args) or product(*args)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight))
        assert len(calls) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with torch.inference_mode(False), torch.enable_grad():
            assert layer(x.clone()).requires_grad
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
        torch.testing.assert_close(layer(torch._neg_view(x)), -layer(x))
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 3 * layer.in_features * layer.out_features
        assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's compiler, of its own parts
def test_layers_it_leaves_alone(model: Coconut) -> None:
    class Own(nn.Linear):
        pass

    mlp, attention = model.hf.model.layers[0].mlp, model.hf.model.layers[1].self_attn
    mlp.up_proj.__class__ = Own
    mlp.gate_proj.half()
    mlp.down_proj.weight.data = mlp.down_proj.weight.data.T.contiguous().T
    attention.q_proj.forward = attention.q_proj.forward  # a forward of its own
    with fast_linears(plain_linears(model)):
        names = {name.removeprefix("hf.model.layers.") for name in replaced(model)}
    assert names & {"0.mlp.up_proj", "0.mlp.gate_proj", "0.mlp.down_proj"} == set()
    assert {"0.self_attn.q_proj", "1.self_attn.k_proj", "1.mlp.up_proj", "hf.lm_head"} <= names
    assert replaced(model) == ["hf.model.layers.1.self_attn.q_proj"]
    model.hf.model.layers[0].compile()
    with fast_linears(plain_linears(model)):
        assert replaced(model) == ["hf.model.layers.1.self_attn.q_proj"]


def test_bf16_is_left_alone_where_the_cpu_has_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    half, whole = (Coconut(make_hf("gemma2", dtype), TOKENS) for dtype in (torch.bfloat16, torch.float32))
    monkeypatch.setattr(ops.extension(), "has_tiles", lambda: False)
    assert len(plain_linears(half)) == len(plain_linears(whole)) == 15
    monkeypatch.setattr(ops.extension(), "has_tiles", lambda: True)
    assert plain_linears(half) == [] and len(plain_linears(whole)) == 15


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_another_backend_that_is_asked_for_runs(model: Coconut, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(model, PROMPTS, max_new_tokens=2).token_ids
    monkeypatch.setattr(ops.extension(), "few_rows_linear", lambda *_: pytest.fail("our product ran"))
    with ops.use(backend):
        assert generate(model, PROMPTS, max_new_tokens=2).token_ids == expected


def test_a_compiled_forward_compiles(model: Coconut) -> None:
    expected = generate(model, PROMPTS, max_new_tokens=3).token_ids
    mlp = model.hf.model.layers[0].mlp
    mlp.forward = torch.compile(mlp.forward, backend="eager", fullgraph=True)
    assert generate(model, PROMPTS, max_new_tokens=3).token_ids == expected


def test_a_forward_that_changes_during_a_pass_stays(model: Coconut) -> None:
    layer, own = model.hf.lm_head, model.hf.lm_head.forward
    model.hf.model.layers[0].register_forward_hook(lambda *_: setattr(layer, "forward", own))
    generate(model, PROMPTS, max_new_tokens=3)
    assert replaced(model) == ["hf.lm_head"] and layer.forward is own


def test_an_interrupt_while_layers_are_replaced_restores_them(model: Coconut, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Linear] = []
    original = linears._Forward.__init__

    def interrupted(self: object, layer: nn.Linear) -> None:
        made.append(layer)
        if len(made) == 5:
            raise KeyboardInterrupt
        original(self, layer)

    monkeypatch.setattr(linears._Forward, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt), fast_linears(plain_linears(model)):
        pass
    assert len(made) == 5 and replaced(model) == [] and not linears._users and not linears._thread.inside


def test_hooks_are_called(model: Coconut, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    weights: list[Tensor] = []
    product = ops.extension().few_rows_linear
    monkeypatch.setattr(ops.extension(), "few_rows_linear", lambda x, w, b: weights.append(w) or product(x, w, b))
    layer = model.hf.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, args, result: seen.append(tuple(result.shape)))
    generate(model, [[5, 6, 7]], max_new_tokens=3)
    assert seen == [(1, 3, 48), (1, 1, 48), (1, 1, 48)]
    assert sum(w is layer.weight for w in weights) == 2


def test_the_last_of_several_users_restores_the_model(model: Coconut) -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fast_linears(plain_linears(model)):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    before, layer, called = replaced(model), model.hf.lm_head, []
    layer.forward.product = lambda *args: called.append(args)
    with torch.inference_mode():
        layer(torch.zeros(1, layer.in_features))
    assert called == []  # this thread is outside
    with pytest.raises(RuntimeError, match="as a test"), fast_linears(plain_linears(model)):
        raise RuntimeError("as a test")
    assert before and replaced(model) == before
    leave.set()
    thread.join()
    assert replaced(model) == []
