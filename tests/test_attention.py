"""ragged_attention, its backward and kv_append on CPU: the C++ kernels and kernels/reference.py against dense attention
written out below, in fp64 and with autograd's derivative."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from coconut_fast import ops
from coconut_fast.kernels.reference import dropout_keep
from tests.compare import assert_as_good_as_torch

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAGE = 16


@dataclass
class Case:
    """A ragged call: its tensors as the ops take them, and its keywords."""

    query: Tensor
    keys: Tensor
    values: Tensor
    page_table: Tensor
    rows: Tensor
    row_offsets: Tensor
    lengths: Tensor
    keywords: dict

    def where(self) -> tuple[Tensor, ...]:
        return self.page_table, self.rows, self.row_offsets, self.lengths

    def slots(self, b: int) -> Tensor:
        j = torch.arange(int(self.lengths[b]))
        return self.page_table[self.rows[b]].long()[j // PAGE] * PAGE + j % PAGE

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, query=self.query.to(dtype), keys=self.keys.to(dtype), values=self.values.to(dtype))

    def alone(self, b: int) -> Case:
        """Row b of the call by itself."""
        start, end = self.row_offsets[b], self.row_offsets[b + 1]
        return replace(
            self,
            query=self.query[start:end].contiguous(),
            rows=self.rows[b : b + 1],
            row_offsets=torch.tensor([0, end - start], dtype=torch.int32),
            lengths=self.lengths[b : b + 1],
        )


def make(
    queries: list[int], lengths: list[int], heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = FP32, cache_dtype: torch.dtype | None = None, **keywords,
) -> Case:  # fmt: skip
    """Random rows on shuffled pages; every slot that holds no token of a row is NaN."""
    pages_per_row, (K, Kv) = max(-(-n // PAGE) for n in lengths) + 1, dims
    page_table = torch.randperm((len(queries) + 2) * pages_per_row).int().view(-1, pages_per_row)
    case = Case(
        query=torch.randn(sum(queries), heads[0], K).to(dtype),
        keys=torch.full((page_table.numel() * PAGE, heads[1], K), float("nan"), dtype=cache_dtype or dtype),
        values=torch.full((page_table.numel() * PAGE, heads[1], Kv), float("nan"), dtype=cache_dtype or dtype),
        page_table=page_table,
        rows=torch.randperm(len(page_table))[: len(queries)].int(),
        row_offsets=torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        keywords={"page_size": PAGE, "scaling": K**-0.5, "max_query": max(queries), "max_length": max(lengths)}
        | keywords,
    )
    for b in range(len(queries)):
        slots = case.slots(b)
        case.keys[slots] = torch.randn(len(slots), heads[1], K).to(case.keys.dtype)
        case.values[slots] = torch.randn(len(slots), heads[1], Kv).to(case.keys.dtype)
    return case


def dense(case: Case) -> tuple[Tensor, Tensor]:
    """The op written plainly, all in the dtype of the query, as autograd can differentiate it."""
    query, keywords = case.query, case.keywords
    group, outs, lses = (
        query.shape[1] // case.keys.shape[1],
        [query.new_zeros(0, *query.shape[1:2], case.values.shape[2])],
        [],
    )
    for b, (start, end) in enumerate(zip(case.row_offsets[:-1].tolist(), case.row_offsets[1:].tolist(), strict=True)):
        if start == end:
            continue
        slots = case.slots(b)
        key = case.keys[slots].to(query.dtype).repeat_interleave(group, dim=1)
        value = case.values[slots].to(query.dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("ihd,jhd->hij", query[start:end], key) * keywords["scaling"]
        if cap := keywords.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        j = torch.arange(len(slots))
        distance = j[start - end :, None] - j
        seen = (distance >= 0) & (distance < (keywords.get("window") or len(slots)))
        scores = scores.masked_fill(~seen, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        if rate := keywords.get("dropout"):
            heads = torch.arange(query.shape[1])[:, None, None]
            keep = dropout_keep(keywords["seed"], slots[start - end :][:, None], heads, j, rate)
            weights = weights * keep / (1 - rate)
        outs.append(torch.einsum("hij,jhd->ihd", weights, value))
        lses.append(torch.logsumexp(scores, dim=-1).T)
    return torch.cat(outs), torch.cat(lses)


def dense_with_grads(case: Case, grad_out: Tensor) -> dict[str, Tensor]:
    inputs = [x.detach().requires_grad_() for x in (case.query, case.keys, case.values)]
    out, lse = dense(replace(case, query=inputs[0], keys=inputs[1], values=inputs[2]))
    grads = torch.autograd.grad(out, inputs, grad_out.to(out.dtype))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def run(case: Case, grad_out: Tensor, backend: str = "cpu") -> dict[str, Tensor]:
    """The op and its derivative; gradient buffers start at 1 (not 0) in slots with tokens, at NaN elsewhere."""
    args = (case.query, case.keys, case.values)
    forward = {name: value for name, value in case.keywords.items() if name != "grads_from"}
    out, lse = ops.call("ragged_attention", *args, *case.where(), backend=backend, **forward)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    work = FP64 if case.query.dtype == FP64 else FP32
    grad_keys, grad_values = (torch.where(x.isnan(), x.to(work), 1.0) for x in (case.keys, case.values))
    buffers = (grad_keys.contiguous(), grad_values.contiguous())
    dq = ops.call(
        "ragged_attention_backward",
        grad_out,
        *args,
        out,
        lse,
        *case.where(),
        *buffers,
        backend=backend,
        **case.keywords,
    )
    for buffer, x in zip(buffers, (case.keys, case.values), strict=True):
        assert torch.equal(buffer.isnan(), x.isnan()), "a gradient was written where no token is"
    return {"out": out, "lse": lse, "dq": dq, "dk": buffers[0].nan_to_num(1) - 1, "dv": buffers[1].nan_to_num(1) - 1}


def check(case: Case, backend: str = "cpu") -> None:
    grad_out = torch.randn(case.query.shape[0], case.query.shape[1], case.values.shape[2]).to(case.query.dtype)
    ours, truth = run(case, grad_out, backend), dense_with_grads(case.to(FP64), grad_out)
    if case.query.dtype == FP64:
        for name, value in ours.items():
            torch.testing.assert_close(
                value, truth[name], rtol=0, atol=1e-12 * max(1.0, truth[name].abs().max().item())
            )
        return
    plain = dense_with_grads(case.to(case.query.dtype), grad_out)
    for name, value in ours.items():
        assert_as_good_as_torch(value, plain[name], truth[name], what=name)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that an op allocates and does not write is NaN; one thread, unless the test is about threads."""
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


# One token alone, no token, one query at the end of a page and beyond it, a prefill, a tail, several chunks of lanes.
ROWS = ([1, 0, 1, 1, 40, 9, 200], [1, 20, 16, 33, 40, 170, 251])
OPTIONS = {
    "plain": {},
    "window": {"window": 7},
    "wide window": {"window": 100},
    "softcap": {"softcap": 5.0},
    "dropout": {"dropout": 0.3, "seed": 2**40 + 5},
    "all": {"window": 50, "softcap": 3.0, "dropout": 0.1, "seed": 7},
}
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP64, FP64), (FP32, BF16), (BF16, FP32), (FP32, FP16)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
def test_agrees_with_dense_attention(dtypes, options):
    check(make(*ROWS, dtype=dtypes[0], cache_dtype=dtypes[1], **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_reference_agrees_with_dense_attention(dtype, options):
    check(make(*ROWS, dtype=dtype, **options), backend="torch")


@pytest.mark.parametrize("dims", [(8, 8), (12, 20), (80, 80), (128, 128), (256, 256), (192, 128), (5, 3), (16, 48)])
@pytest.mark.parametrize("heads", [(2, 2), (6, 1), (4, 2), (3, 3)])
def test_every_head_count_and_width(heads, dims):
    check(make([1, 3, 30], [50, 3, 77], heads=heads, dims=dims))
    check(make([1, 3, 30], [50, 3, 77], heads=heads, dims=dims, dtype=FP64, softcap=2.0))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64])
def test_every_instruction_set(dtype):
    for options in OPTIONS.values():
        check(make([1, 50, 20, 100], [90, 50, 333, 101], heads=(6, 2), dims=(80, 48), dtype=dtype, **options))


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("COCONUT_FAST_ISA", "mmx")
    with pytest.raises(ValueError, match=r"COCONUT_FAST_ISA is mmx; expected portable"):
        ops.extension().isa()


def test_random_calls_agree_with_fp64():
    choose = random.Random(0).choice
    for _ in range(40):
        queries = [choose([0, 1, 2, 5, 17, 64, 140]) for _ in range(choose([1, 3]))] + [choose([1, 31])]
        lengths = [n + choose([0, 1, 15, 63, 64, 65, 200]) for n in queries]
        lengths[-1] += 15  # if every row had one token, all true gradients of scores would be 0
        options = {"window": choose([0, 0, 2, 13, 64]), "softcap": choose([0.0, 0.0, 4.0])}
        options |= {"dropout": choose([0.0, 0.0, 0.2]), "seed": choose([0, 1, -3, 2**62])}
        heads, dims = choose([(1, 1), (2, 1), (4, 4), (5, 1), (9, 3)]), (choose([4, 16, 24, 64]), choose([4, 16, 40]))
        check(make(queries, lengths, heads=heads, dims=dims, dtype=choose([FP32, FP64, BF16]), **options))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_grads_from_leaves_gradients_of_earlier_positions_alone(options, dtype, backend):
    case, grads_from = make([1, 1, 5, 70], [40, 200, 150, 90], dtype=dtype, **options), torch.tensor([33, 0, 150, 70])
    grad_out = torch.randn(77, 4, 64).to(dtype)
    whole = run(case, grad_out, backend)
    part = run(replace(case, keywords=case.keywords | {"grads_from": grads_from.int()}), grad_out, backend)
    assert torch.equal(part["dq"], whole["dq"])
    for b, first in enumerate(grads_from.tolist()):
        before, behind = case.slots(b)[:first], case.slots(b)[first:]
        for name in ("dk", "dv"):
            assert torch.equal(part[name][behind], whole[name][behind])
            assert not part[name][before].any()


def test_a_window_of_one_copies_the_value():
    case = make([40], [60], heads=(2, 1), window=1)
    out, _ = ops.ragged_attention(case.query, case.keys, case.values, *case.where(), **case.keywords)
    assert torch.equal(out, case.values[case.slots(0)[20:]].expand(40, 2, 64))
    check(make([1, 40], [1, 60], dtype=FP64, window=1))


def test_large_scores_do_not_overflow():
    case = make([1, 40], [100, 80])
    check(replace(case, query=case.query * 30))
    enormous = replace(case, query=case.query * 1e30)
    out, _ = ops.ragged_attention(enormous.query, case.keys, case.values, *case.where(), **case.keywords)
    assert torch.equal(out, dense(enormous)[0]), "with one weight of 1 the output is its value"


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_a_row_alone_or_in_a_batch_on_any_number_of_threads_is_bit_identical(dtype, options):
    case = make(*ROWS, heads=(6, 2), dims=(64, 48), dtype=dtype, **options)
    grad_out = torch.randn(case.query.shape[0], 6, 48).to(dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(case, grad_out))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())
    for b in range(len(case.rows)):
        mine, slots = slice(case.row_offsets[b], case.row_offsets[b + 1]), case.slots(b)
        single = run(case.alone(b), grad_out[mine].contiguous())
        assert all(torch.equal(single[name], results[0][name][mine]) for name in ("out", "lse", "dq"))
        assert all(torch.equal(single[name][slots], results[0][name][slots]) for name in ("dk", "dv"))


def test_rows_may_share_pages():
    case = make([1, 1, 40], [60, 60, 60])
    case.page_table[case.rows.long()[1:], :3] = case.page_table[case.rows.long()[0], :3]
    last = case.page_table[case.rows.long(), 3].long()[:, None] * PAGE + torch.arange(12)
    case.keys[last[1:]], case.values[last[1:]] = case.keys[last[:1]], case.values[last[:1]]
    case.query[1] = case.query[0]
    out, lse = ops.ragged_attention(case.query, case.keys, case.values, *case.where(), **case.keywords)
    assert torch.equal(out[0], out[1]) and torch.equal(lse[0], lse[1])
    truth, plain = dense(case.to(FP64)), dense(case)
    assert_as_good_as_torch(out, plain[0], truth[0])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("queries", [1, 60])
def test_dropout_drops_what_dropout_keep_says(backend, queries):
    """With unit vectors as values, an output is the row of attention weights itself."""
    case = make([queries], [60], heads=(2, 1), dims=(16, 60), dropout=0.4, seed=11)
    case.values[case.slots(0), 0] = torch.eye(60)
    out, lse = ops.call(
        "ragged_attention", case.query, case.keys, case.values, *case.where(), backend=backend, **case.keywords
    )
    slots, heads = case.slots(0)[-queries:], torch.arange(2)
    keep = dropout_keep(11, slots[:, None, None], heads[:, None], torch.arange(60), 0.4)
    seen = torch.arange(60) <= torch.arange(60)[-queries:, None, None]
    assert torch.equal(out != 0, keep & seen)
    without = replace(case, keywords=case.keywords | {"dropout": 0.0})
    whole, lse_whole = ops.call(
        "ragged_attention",
        without.query,
        without.keys,
        without.values,
        *without.where(),
        backend=backend,
        **without.keywords,
    )
    torch.testing.assert_close(out, torch.where(keep, whole / 0.6, 0.0))
    assert torch.equal(lse, lse_whole)


def test_dropout_keeps_the_right_share_independently():
    slots, heads, keys = torch.arange(300)[:, None, None], torch.arange(12)[None, :, None], torch.arange(300)
    keep = dropout_keep(5, slots, heads, keys, 0.1).double()
    assert abs(keep.mean().item() - 0.9) < 5 * (0.09 / keep.numel()) ** 0.5
    for dim in range(3):
        centred = keep - 0.9
        neighbours = (centred * centred.roll(1, dim)).mean().item() / 0.09
        assert abs(neighbours) < 5 / keep.numel() ** 0.5
    assert not torch.equal(keep, dropout_keep(6, slots, heads, keys, 0.1).double())
    assert not torch.equal(keep, dropout_keep(5 + 2**32, slots, heads, keys, 0.1).double())


def test_calls_without_queries_give_empty_results():
    case = make([0, 0], [5, 40])
    out, lse = ops.ragged_attention(case.query, case.keys, case.values, *case.where(), **case.keywords)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)
    ops.kv_append(
        torch.zeros(0, 2, 64), torch.zeros(0, 2, 64), torch.zeros(0, dtype=torch.int64), case.keys, case.values
    )


INT = torch.int32
WRONG = [
    ({"query": torch.zeros(4, 4, 63)}, r"keys is Float \[\d+, 2, 64\] on cpu; expected .* \[-1, -1, 63\]"),
    ({"query": torch.zeros(4, 3, 64)}, "3 query heads over 2 kv heads"),
    ({"query": torch.zeros(4, 64, 4).transpose(1, 2)}, "query is .* not contiguous"),
    ({"query": torch.zeros(4, 4, 64, dtype=FP64)}, "query is Double and keys are Float; Double goes with Double"),
    ({"query": torch.zeros(4, 4, 64, dtype=torch.int64)}, "query is Long; expected Float, BFloat16, Half or Double"),
    ({"query": torch.zeros(4, 4, 64, device="meta")}, "query is .* on meta; expected a contiguous CPU tensor"),
    ({"rows": torch.tensor([0, 9], dtype=INT)}, r"rows\[1\] is 9; page_table has 4 rows"),
    ({"rows": torch.tensor([0, 1])}, "rows is Long; expected Int"),
    ({"row_offsets": torch.tensor([0, 1], dtype=INT)}, r"row_offsets is Int \[2\].*shape \[3\]"),
    ({"row_offsets": torch.tensor([0, 1, 5], dtype=INT)}, r"row_offsets go from 0 to 5; expected 0 to 4"),
    ({"row_offsets": torch.tensor([0, 5, 4], dtype=INT)}, r"row 0 has 5 queries; expected 0 to max_query = 3"),
    ({"lengths": torch.tensor([20, 2], dtype=INT)}, r"lengths\[1\] is 2; expected at least its 3 queries"),
    ({"lengths": torch.tensor([21, 8], dtype=INT)}, r"lengths\[0\] is 21; .* at most max_length = 20"),
    ({"page_table": torch.full((4, 3), 99, dtype=INT)}, "page 0 of row 0 is 99; the cache has 12 pages"),
    ({"page_size": 7}, "page_size is 7, keys have 192 slots; expected whole pages"),
    ({"dropout": 1.0}, "dropout is 1; expected 0 <= dropout < 1"),
    ({"window": -1}, "window is -1"),
    ({"softcap": -1.0}, "softcap is -1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[m[:30] for _, m in WRONG])
def test_wrong_arguments_are_refused(change, message):
    case = make([1, 3], [20, 8])
    fields = {name: value for name, value in change.items() if hasattr(case, name)}
    bad = replace(case, **fields, keywords=case.keywords | {k: v for k, v in change.items() if k not in fields})
    with pytest.raises(ValueError, match=f"ragged_attention: .*{message}"):
        ops.extension().ragged_attention(bad.query, bad.keys, bad.values, *bad.where(), **bad.keywords)


def test_wrong_buffers_are_refused():
    case = make([1, 3], [20, 8], dtype=BF16)
    out, lse = ops.ragged_attention(case.query, case.keys, case.values, *case.where(), **case.keywords)
    buffers = [torch.zeros_like(case.keys, dtype=FP32), torch.zeros_like(case.values)]
    with pytest.raises(ValueError, match="grad_values is BFloat16; expected Float"):
        ops.ragged_attention_backward(
            out, case.query, case.keys, case.values, out, lse, *case.where(), *buffers, **case.keywords
        )
    with pytest.raises(ValueError, match=r"grads_from is .* expected .* \[2\]"):
        buffers = [torch.zeros_like(x, dtype=FP32) for x in (case.keys, case.values)]
        ops.ragged_attention_backward(
            out,
            case.query,
            case.keys,
            case.values,
            out,
            lse,
            *case.where(),
            *buffers,
            grads_from=torch.zeros(3, dtype=INT),
            **case.keywords,
        )
