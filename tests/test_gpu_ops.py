"""Every Triton op on a GPU, at the shapes of real models: against fp64, under opcheck, torch.compile and CUDA graphs.

One table of cases (gpu_cases.py) drives all of it. The cases also run in the interpreter (smaller, without bf16) where
there is no GPU and somebody asks for `-m gpu`: that checks these tests, not the kernels.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import library

from coconut_fast import ops
from coconut_fast.kernels import reference
from tests.compare import assert_as_good_as_torch
from tests.gpu_cases import CASES, CUDA, EVERY_DTYPE, assert_compiles, cache_of, function_of, fused, same
from tests.paged import truth_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning"),
]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in CASES for d in DTYPES if d == DTYPES[-1] or n in EVERY_DTYPE]
)
def test_against_fp64(name, dtype, device) -> None:
    case = CASES[name](dtype, device)
    ours, plain = case.run("triton"), case.run("torch")
    if case.exact:
        assert all(same(ours[k], plain[k]) for k in plain)
        return
    for key, truth in case.run("torch", double=True).items():
        a, b = ours[key].cpu(), plain[key].cpu()
        assert a.dtype == b.dtype, key
        if not truth.is_floating_point():
            assert torch.equal(a, b), key
            continue
        used = torch.isfinite(truth)
        assert torch.equal(torch.isfinite(a), used), key
        # Sums of 16-bit products kept in fp32 (lse, gradient buffers, the residual stream) are judged as 16-bit ones.
        assert_as_good_as_torch(a[used], b[used].to(dtype), truth[used], what=f"{name}: {key}")


@pytest.mark.parametrize("name", CASES)
def test_twice_the_same_bits(name, device) -> None:
    case = CASES[name](DTYPES[-1], device)
    first = case.run("triton")
    for _ in range(20 if CUDA else 1):
        again = case.run("triton")
        assert all(same(first[k], again[k]) for k in first)


@pytest.mark.parametrize("name", CASES)
def test_compiled(name, device) -> None:
    assert_compiles(name, DTYPES[-1], device)


@needs_cuda
@pytest.mark.parametrize("name", CASES)
def test_in_a_cuda_graph(name, device) -> None:
    case, other = CASES[name](torch.bfloat16, device), CASES[name](torch.bfloat16, device)
    given, function = case.start(), function_of(case.op)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(**given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.results(given, function(**given))
    for source in (case, other, case):  # other values at the same addresses
        expected = source.run("triton")
        for key, value in source.start().items():
            for target, new in zip(*(v if isinstance(v, list) else [v] for v in (given[key], value)), strict=True):
                if isinstance(new, torch.Tensor):
                    target.copy_(new)
        graph.replay()
        assert all(same(expected[k], found[k]) for k in expected)


@pytest.mark.parametrize("name", [n for n in CASES if "GPT-2" in n or "," not in n or "greedy, one" in n])
def test_opcheck(name, device) -> None:
    case = CASES[name](torch.float32, device)
    given = {k: v.nan_to_num(0.0) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
             for k, v in case.start().items()}  # fmt: skip
    op = importlib.import_module(f"coconut_fast.kernels.{case.op}")._OP
    names = [a.name for a in op._schema.arguments if not a.kwarg_only]
    keywords = {k: v for k, v in given.items() if k not in names}
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    library.opcheck(op, tuple(given[n] for n in names), keywords, test_utils=checks)


@needs_cuda
def test_inductor_around_a_chain_of_ops(device) -> None:
    """A norm, a product and attention with its append, with Inductor's own kernels between and around them."""
    given = fused(12, 12, 64, rotary=False, norm=False)(torch.bfloat16, device).start()
    x, weight = torch.randn(4, 768, device=device), torch.rand(768, device=device).bfloat16()
    qkv = (torch.randn(2304, 768) / 28).to(device, torch.bfloat16)
    triton = [function_of(op) for op in ("residual_norm", "skinny_linear", "decode_attention")]
    plain = [getattr(reference, f"{op}_ref") for op in ("residual_norm", "skinny_linear", "decode_attention")]

    def layer(functions: list, x: torch.Tensor, weight: torch.Tensor, qkv: torch.Tensor, given: dict) -> torch.Tensor:
        norm, linear, attention = functions
        normed, _ = norm((x * 2).to(weight.dtype), weight)
        query, key, value = linear(normed.relu(), qkv).view(4, 36, 64).split(12, dim=1)
        out, _ = attention(**given | {"query": query, "key": key, "value": value})
        return out.to(x.dtype).flatten(1) + x

    def copies(double: bool) -> dict:
        return {
            k: (truth_of(v)[0] if double else v.clone()) if isinstance(v, torch.Tensor) else v for k, v in given.items()
        }

    expected = layer(plain, x, weight, qkv, copies(False))
    truth = layer(plain, *truth_of(x, weight, qkv), copies(True))
    found = torch.compile(layer, fullgraph=True)(triton, x, weight, qkv, copies(False))
    assert_as_good_as_torch(found.cpu(), expected.cpu().bfloat16(), truth)


@needs_cuda
def test_slots_beyond_two_billion_elements(device) -> None:
    kv_heads, head_dim, page = 32, 128, 16
    num_slots = 2**31 // (kv_heads * head_dim) + 4 * page
    keys, values = (torch.empty(num_slots, kv_heads, head_dim, dtype=torch.bfloat16, device=device) for _ in range(2))
    table = torch.tensor([[num_slots // page - 1, num_slots // page - 2, 0]], dtype=torch.int32, device=device)
    key, value = (torch.randn(40, kv_heads, head_dim).to(device, torch.bfloat16) for _ in range(2))
    j = torch.arange(40, device=device)
    slots = table[0].long()[j // page] * page + j % page
    ops.kv_append(key, value, slots, keys, values, backend="triton")
    assert torch.equal(keys[slots], key) and torch.equal(values[slots], value)
    query = torch.randn(40, kv_heads, head_dim).to(device, torch.bfloat16)
    rows, lengths = (torch.tensor([x], dtype=torch.int32, device=device) for x in (0, 40))
    small = torch.tensor([[2, 1, 0]], dtype=torch.int32, device=device)
    few = [torch.zeros(48, kv_heads, head_dim, dtype=torch.bfloat16, device=device) for _ in range(2)]
    ops.kv_append(key, value, small[0].long()[j // page] * page + j % page, *few, backend="triton")
    options = {"page_size": page, "scaling": 0.1, "max_length": 40, "backend": "triton"}
    for queries in (1, 40):
        offsets = torch.tensor([0, queries], dtype=torch.int32, device=device)
        far = ops.ragged_attention(
            query[-queries:], keys, values, table, rows, offsets, lengths, max_query=queries, **options
        )
        near = ops.ragged_attention(query[-queries:], *few, small, rows, offsets, lengths, max_query=queries, **options)
        assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


@needs_cuda
def test_many_rows_share_one_counter_buffer(device) -> None:
    cache = cache_of(torch.bfloat16, device, [900] * 64, 8, 64)
    query = torch.randn(64, 32, 64).to(device, torch.bfloat16)
    counters = torch.zeros(64 * 32, dtype=torch.int32, device=device)
    options = {"page_size": 16, "scaling": 0.125, "max_length": 1024, "backend": "triton"}
    first, _ = ops.decode_attention(query, cache.keys, cache.values, *cache.layout(), **options)
    for _ in range(200):
        again, _ = ops.decode_attention(query, cache.keys, cache.values, *cache.layout(), counters=counters, **options)
        assert torch.equal(first, again)
    assert not counters.any()


@pytest.mark.parametrize("name", CASES)
def test_sanitizer(name, device) -> None:
    """One launch of each kernel, for compute-sanitizer to watch."""
    CASES[name](DTYPES[-1], device).run("triton")
    if CUDA:
        torch.cuda.synchronize()
