"""What the C++ module refuses instead of reading or running it: tensors whose values are not in their memory,
impossible chains, impossible numbers of threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from coconut_fast import ops

_C = ops.extension()
ROOT = Path(__file__).parents[1]


class Wrapper(Tensor):
    """Has sizes but no memory, like a DTensor."""

    @staticmethod
    def __new__(cls, like: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        raise AssertionError(f"{func} was called")


def fake(like: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(like)


ABSENT = {"wrapper": Wrapper, "fake": fake, "functional": torch._to_functional_tensor, "negated": torch._neg_view}
MATRIX, CACHE, SLOTS, INTS = torch.ones(4, 4), torch.ones(4, 1, 4), torch.arange(4), torch.zeros(1, dtype=torch.int32)
# Calls that are refused when `absent` takes a tensor's memory away.
CALLS: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "gelu: x": lambda absent: _C.gelu(absent(MATRIX)),
    "gelu_backward: grad": lambda absent: _C.gelu_backward(absent(MATRIX), MATRIX),
    "few_rows_linear: x": lambda absent: _C.few_rows_linear(absent(MATRIX), MATRIX),
    "few_rows_linear: weight": lambda absent: _C.few_rows_linear(MATRIX, absent(MATRIX)),
    "few_rows_linear: bias": lambda absent: _C.few_rows_linear(MATRIX, MATRIX, absent(torch.ones(4))),
    "kv_append: slots": lambda absent: _C.kv_append(CACHE, CACHE, absent(SLOTS), CACHE, CACHE),
    "kv_append: key": lambda absent: _C.kv_append(absent(CACHE), CACHE, SLOTS, CACHE, CACHE),
    "kv_append: values": lambda absent: _C.kv_append(CACHE, CACHE, SLOTS, CACHE, absent(CACHE)),
    "native chain: norm2": lambda absent: make_chain().set_layer(0, layer(norm2=absent(torch.ones(8))), 1.0, 0),
    "native chain: head": lambda absent: make_chain().set_embeddings(ends(head=absent(torch.ones(5, 8)))),
    "native chain: hidden": lambda absent: think(whole_chain(), hidden=absent(torch.zeros(1, 8))),
    "native chain: cache": lambda absent: think(whole_chain(), keys=absent(torch.zeros(16, 2, 4))),
}
PRODUCTS: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "pack_matrix: matrix": lambda absent: _C.pack_matrix(absent(MATRIX), torch.float32),
    "few_rows_matmul: x": lambda absent: _C.few_rows_matmul(absent(MATRIX), MATRIX),
    "weight_gradient: right": lambda absent: _C.weight_gradient(MATRIX, absent(MATRIX)),
    "weight_gradient: into": lambda absent: _C.weight_gradient(MATRIX, MATRIX, absent(MATRIX)),
}
SHAPE = {"layers": 1, "dim": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "inner": 8, "vocab": 5, "max_positions": 16}
KIND = {"norm": "layer", "eps": 1e-5, "activation": "gelu", "gated": False, "rope_scaling": 1.0}


def make_chain(threads: int = 1, max_tokens: int = 2, **changes: object) -> Any:
    return _C.NativeChain(SHAPE | KIND | changes, "fp32", threads, max_tokens)


def layer(**changes: Tensor) -> dict[str, Tensor]:
    matrices = {"qkv": torch.ones(24, 8), "o": torch.ones(8, 8), "up": torch.ones(8, 8), "down": torch.ones(8, 8)}
    return matrices | {"norm1": torch.ones(8), "norm2": torch.ones(8)} | changes


def ends(**changes: Tensor) -> dict[str, Tensor]:
    return {"embed": torch.ones(5, 8), "head": torch.ones(5, 8), "final_norm": torch.ones(8)} | changes


def whole_chain(threads: int = 1, max_tokens: int = 2) -> Any:
    chain = make_chain(threads, max_tokens)
    chain.set_layer(0, layer(), 1.0, 0)
    chain.set_embeddings(ends())
    return chain


def think(chain: Any, hidden: Tensor | None = None, keys: Tensor | None = None) -> None:
    layout = _C.CacheLayout(1, 16, 1)
    layout.append(layout.alloc(1), [2])
    keys, hidden = (torch.zeros(s) if t is None else t for t, s in ((keys, (16, 2, 4)), (hidden, (1, 8))))
    chain.think(layout, [keys], [torch.zeros(16, 2, 4)], INTS, INTS, INTS + 2, hidden)


@pytest.mark.parametrize("absent", ABSENT.values(), ids=ABSENT)
@pytest.mark.parametrize("what", [*CALLS, *PRODUCTS])
def test_tensors_without_their_values_in_memory_are_refused(what: str, absent: Callable[[Tensor], Tensor]) -> None:
    if what in PRODUCTS and not _C.gemm_runs():
        pytest.skip("the products need a CPU with AVX512-BF16 and without AMX")
    with pytest.raises(ValueError, match=f"{what} is .* with no memory that holds its values"):
        (CALLS | PRODUCTS)[what](absent)


def test_empty_tensors_and_plain_subclasses_are_not() -> None:
    assert _C.gelu(torch.ones(0)).shape == (0,)
    assert torch.equal(_C.gelu(torch.nn.Parameter(MATRIX)), _C.gelu(MATRIX))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, f"{name} must be at least 1, found 0") for name in SHAPE),
        ({"dim": -3}, "dim must be at least 1, found -3"),
        ({"kv_heads": 3}, "kv_heads must divide heads = 2, found 3"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, found 0"),
        ({"threads": -1}, "threads must be at least 1, found -1"),
        ({"activation": "swish"}, "activation must be gelu_tanh, gelu, silu or relu, found swish"),
    ],
)
def test_impossible_chains_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_chain(**changes)


def test_unfinished_chains_are_refused() -> None:
    chain = make_chain()
    with pytest.raises(ValueError, match="not every weight is set; expected set_layer of all 1 layers and set_emb"):
        think(chain)
    for index in (-1, 1):
        with pytest.raises(ValueError, match=f"layer must be from 0 to 0, found {index}"):
            chain.set_layer(index, layer(), 1.0, 0)
    with pytest.raises(ValueError, match="window must be 0 .none. or more, found -1"):
        chain.set_layer(0, layer(), 1.0, -1)
    for name in ("norm1", "norm2", "qkv"):
        with pytest.raises(ValueError, match=f"native chain: the tensor {name} is missing"):
            chain.set_layer(0, {key: tensor for key, tensor in layer().items() if key != name}, 1.0, 0)
    chain.set_layer(0, layer(), 1.0, 0)
    with pytest.raises(ValueError, match="not every weight is set"):
        think(chain)
    with pytest.raises(ValueError, match="native chain: the tensor final_norm is missing"):
        chain.set_embeddings({key: tensor for key, tensor in ends().items() if key != "final_norm"})
    chain.set_embeddings(ends())
    think(chain)


SET_WHILE_THINKING = """
import threading
import torch
from tests import test_bindings as t

weights, embeddings, chain = t.layer(), t.ends(), t.whole_chain(2, 64)
layout, storage = t._C.CacheLayout(64, 16, 64), [torch.zeros(1024, 2, 4)]
layout.append(layout.alloc(64), [16] * 64)
rows, hidden_BD = torch.arange(64, dtype=torch.int32), torch.randn(64, 8)

def think():
    for _ in range(200):
        chain.think(layout, storage, storage, rows, 0 * rows, 0 * rows + 16, hidden_BD)

thread = threading.Thread(target=think)
thread.start()
while thread.is_alive():
    chain.set_layer(0, weights, 1.0, 0)
    chain.set_embeddings(embeddings)
print("done")
"""


def test_weights_that_are_set_during_a_call_take_their_turn() -> None:
    command = [sys.executable, "-c", SET_WHILE_THINKING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "done\n", done.stderr


TOO_MANY_THREADS = """
import resource
from coconut_fast import ops

module = ops.extension()
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 28), resource.RLIM_INFINITY))  # 2 GiB of stacks do not fit
try:
    module.read_bandwidth(256, 1 << 20, 1)
except RuntimeError as error:
    print(error)
print(module.read_bandwidth(2, 1 << 20, 1) > 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and a limit of address space")
def test_more_threads_than_can_be_started_are_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", TOO_MANY_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, works = done.stdout.splitlines()
    assert refused.startswith("256 threads cannot be started (") and "ask for fewer" in refused
    assert works == "True"


def little_memory(bytes: int) -> None:
    """From now on this process gets no more than so many bytes besides those it has."""
    import resource

    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + bytes, resource.RLIM_INFINITY))


def refuse_threads() -> None:
    """Fewer threads would start, but there is no memory for their buffers."""
    chain, rows = whole_chain(8, 4096), torch.arange(64, dtype=torch.int32)
    layout, storage = _C.CacheLayout(64, 16, 64), [torch.zeros(1024, 2, 4)]
    layout.append(layout.alloc(64), [2] * 64)
    before_BD = torch.randn(64, 8)
    after_BD = before_BD.clone()
    chain.think(layout, storage, storage, rows, 0 * rows, 0 * rows + 2, before_BD)
    little_memory(30 << 20)
    with pytest.raises(MemoryError):
        chain.set_threads(2)
    assert chain.threads == 8
    chain.think(layout, storage, storage, rows, 0 * rows, 0 * rows + 2, after_BD)
    assert torch.equal(before_BD, after_BD)


def refuse_prompt() -> None:
    """Attention to a prompt takes 60 MB a thread for such a head, which malloc maps: no hole in its heap has them."""
    import resource

    size = 16384
    shapes = {"qkv": (3 * size, 8), "o": (8, size), "up": (8, 8), "down": (8, 8), "norm1": (8,), "norm2": (8,)}
    weights, embeddings = {name: torch.randn(shape) for name, shape in shapes.items()}, ends(embed=torch.randn(5, 8))
    chains = [make_chain(2, 7, heads=1, kv_heads=1, head_dim=size) for _ in range(2)]
    for chain in chains:
        chain.set_layer(0, weights, 0.01, 0)
        chain.set_embeddings(embeddings)
    layout, keys, values = _C.CacheLayout(2, 16, 2), torch.zeros(32, 1, size), torch.zeros(32, 1, size)
    layout.append(layout.alloc(2), [4, 3])
    lists = ([0, 1], [4, 3], [0, 1, 2, 3, 4, 0, 1])
    rows, counts, ids = (torch.tensor(numbers, dtype=torch.int32) for numbers in lists)
    states = [torch.zeros(2, 8) for _ in chains]
    little_memory(1 << 20)
    with pytest.raises(MemoryError):
        chains[0].prefill(layout, [keys], [values], rows, 0 * rows, ids, counts, states[0])
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for chain, hidden_BD in zip(chains, states, strict=True):
        chain.prefill(layout, [keys], [values], rows, 0 * rows, ids, counts, hidden_BD)
    assert states[0].any() and torch.equal(*states)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and a limit of address space")
@pytest.mark.parametrize("case", [refuse_threads, refuse_prompt])
def test_a_chain_that_got_no_memory_works_as_before(case: Callable[[], None]) -> None:
    command = [sys.executable, "-c", f"from tests import test_bindings; test_bindings.{case.__name__}()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
