"""ragged_attention and its backward: the Triton kernels against the reference in fp64, on odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from coconut_fast.kernels.reference import ragged_attention_ref
from tests.compare import assert_as_good_as_torch
from tests.paged import paged, spread, truth_of, view

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # lanes of padding

CASES = {  # lengths, queries of each row, H, Hkv, K, Kv, page size, options
    "prompts": ([33, 1, 50], [33, 1, 50], 2, 2, 16, None, 16, {}),
    "one query a row, with dropout": ([40, 3], [1, 1], 2, 1, 16, None, 16, {"dropout": 0.3, "seed": 5}),
    "one query a row": ([150, 3, 1], [1, 1, 1], 2, 2, 16, None, 16, {}),
    "one query a row or none": ([40, 20, 3], [1, 0, 1], 2, 1, 16, None, 16, {}),
    "one query a row, everything": (
        *([90, 40], [1, 1], 3, 3, 24, 40, 4),
        {"window": 77, "softcap": 3.0, "dropout": 0.3, "seed": 7},
    ),
    "a row without queries": ([20, 30, 70], [5, 0, 40], 3, 1, 24, 40, 4, {}),
    "tails, grouped, odd width": ([75, 9], [14, 9], 6, 2, 80, None, 16, {}),
    "window": ([90, 70], [90, 3], 2, 2, 16, None, 16, {"window": 17}),
    "many queries": ([300, 5], [270, 2], 2, 1, 8, None, 16, {}),
    "many queries, window": ([300, 5], [270, 2], 2, 1, 8, None, 16, {"window": 33}),
    "window and dropout": ([60, 35], [20, 35], 4, 2, 8, None, 1, {"window": 33, "dropout": 0.5, "seed": -(2**40) - 7}),
    "tiny": ([5, 3], [2, 3], 2, 1, 8, None, 4, {}),
    "softcap": ([40, 50], [40, 2], 2, 1, 32, None, 16, {"softcap": 3.0}),
    "few, everything": (
        *([90, 40, 31], [14, 0, 9], 6, 2, 24, 40, 4),
        {"window": 33, "softcap": 3.0, "dropout": 0.3, "seed": 7},
    ),
}
FEW = ("prompts", "one query a row, with dropout", "few, everything")  # in a large batch one launch handles these


def _as_in_a_large_batch(monkeypatch) -> list[int]:
    """Makes the backward handle few queries in one launch whatever the number of rows; lists such launches."""
    from coconut_fast.kernels import ragged_attention_few

    tiles, launched = ragged_attention_few._few_tiles, []
    monkeypatch.setattr(ragged_attention_few, "PROGRAMS", 1)
    monkeypatch.setattr(ragged_attention_few, "generation", lambda tensor: 90)
    monkeypatch.setattr(ragged_attention_few, "_few_tiles", lambda pairs: launched.append(pairs) or tiles(pairs))
    return launched


def arrange(case: str, dtype: torch.dtype, device: torch.device):
    lengths, queries, heads, kv_heads, head_dim, value_dim, page, options = CASES[case]
    cache = paged(
        lengths, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, page_size=page, dtype=dtype, device=device
    )
    offsets = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32, device=device)
    query = torch.randn(sum(queries), heads, head_dim).to(device, dtype)
    table, rows, length = cache.layout()
    bounds = {"page_size": page, "scaling": head_dim**-0.5, "max_query": max(queries), "max_length": max(lengths)}
    return (query, *cache.store(), table, rows, offsets, length), bounds | options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype, device) -> None:
    arguments, options = arrange(case, dtype, device)
    ours = ops.ragged_attention(*arguments, **options, backend="triton")
    plain = ragged_attention_ref(*arguments, **options)
    truth = ragged_attention_ref(*truth_of(*arguments), **options)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for name, a, b, c in zip(("out", "lse"), ours, plain, truth, strict=True):
        assert_as_good_as_torch(a.cpu(), b.cpu(), c, what=name)


@pytest.mark.parametrize(
    ("case", "dtype", "large"),
    [(case, dtype, False) for case in CASES for dtype in (torch.float32, torch.float16)]
    + [(case, torch.float16, True) for case in FEW],
)
def test_backward_adds_to_the_gradients(monkeypatch, case, dtype, large, device) -> None:
    launched = _as_in_a_large_batch(monkeypatch) if large else None
    arguments, options = arrange(case, dtype, device)
    _, keys, values, *layout = arguments
    out, lse = ragged_attention_ref(*arguments, **options)
    grad_out = torch.randn_like(out)
    runs = []
    for double, backend in ((False, "triton"), (False, "torch"), (True, "torch")):
        inputs = (grad_out, *arguments[:3], out, lse, *layout)
        if double:
            inputs = truth_of(*inputs)
            inputs[4:6] = ragged_attention_ref(*truth_of(*arguments), **options)
        grads = [torch.ones(t.shape, dtype=inputs[5].dtype, device=inputs[5].device) for t in (keys, values)]
        runs.append((ops.ragged_attention_backward(*inputs, *grads, **options, backend=backend), *grads))
    for name, ours, plain, truth in zip(("grad_query", "grad_keys", "grad_values"), *runs, strict=True):
        # the buffers are fp32, but plain PyTorch's gradients of fp16 inputs are fp16
        assert_as_good_as_torch(ours.cpu(), plain.cpu().to(dtype), truth, what=name)
    used = torch.isfinite(keys).all(-1).all(-1).cpu()
    assert (runs[0][1].cpu()[~used] == 1).all(), "slots without a token are left alone"
    assert launched is None or len(launched) == 1


@pytest.mark.parametrize(
    ("case", "large"),
    [*((c, False) for c in ("one query a row", "one query a row, with dropout", "tails, grouped, odd width"))]
    + [(case, True) for case in FEW],
)
def test_gradients_of_earlier_positions_are_left_alone(monkeypatch, case, large, device) -> None:
    if large:
        _as_in_a_large_batch(monkeypatch)
    arguments, options = arrange(case, torch.float16 if large else torch.float32, device)
    _, keys, values, *layout = arguments
    out, lse = ragged_attention_ref(*arguments, **options)
    inputs, lengths = (torch.randn_like(out), *arguments[:3], out, lse, *layout), layout[-1]
    runs = []
    for grads_from in (None, lengths - 2):
        grads = [torch.ones(t.shape, device=device) for t in (keys, values)]
        dq = ops.ragged_attention_backward(*inputs, *grads, **options, grads_from=grads_from, backend="triton")
        runs.append((dq, *grads))
    assert torch.equal(runs[0][0], runs[1][0])
    table, rows, *_ = layout
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        j = torch.arange(length, device=device)
        slots = table[row].long()[j // options["page_size"]] * options["page_size"] + j % options["page_size"]
        for whole, part in zip(runs[0][1:], runs[1][1:], strict=True):
            cut = max(length - 2, 0)
            assert torch.equal(part[slots[cut:]], whole[slots[cut:]]) and (part[slots[:cut]] == 1).all()


def test_strided_queries_and_expanded_gradients(device) -> None:
    (query, *rest), options = arrange("tails, grouped, odd width", torch.float32, device)
    tokens, heads, width = query.shape
    wide = torch.randn(tokens, heads + 4, width, device=device)
    wide[:, :heads] = query
    out, lse = ops.ragged_attention(query, *rest, **options, backend="triton")
    again, _ = ops.ragged_attention(wide[:, :heads], *rest, **options, backend="triton")
    assert torch.equal(out, again)
    grads = [torch.zeros(t.shape, device=device) for t in (*rest[:2], *rest[:2])]
    one = torch.ones((), device=device).expand(out.shape)
    first = ops.ragged_attention_backward(
        one, query, *rest[:2], out, lse, *rest[2:], *grads[:2], **options, backend="triton"
    )
    second = ops.ragged_attention_backward(
        one.contiguous(), wide[:, :heads], *rest[:2], out, lse, *rest[2:], *grads[2:], **options, backend="triton"
    )
    assert torch.equal(first, second) and torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])


def test_a_query_of_another_type_than_the_cache(device) -> None:
    (query, keys, values, *layout), options = arrange("softcap", torch.float32, device)
    arguments = (query, keys.half(), values.half(), *layout)
    ours, _ = ops.ragged_attention(*arguments, **options, backend="triton")
    plain, _ = ragged_attention_ref(*arguments, **options)
    truth, _ = ragged_attention_ref(*truth_of(*arguments), **options)
    assert ours.dtype == torch.float32
    assert_as_good_as_torch(ours.cpu(), plain.cpu(), truth)


def test_one_query_a_row_is_decode_attention(device) -> None:
    cache = paged([70, 5], kv_heads=2, head_dim=16, device=device)
    query = torch.randn(2, 2, 16, device=device)
    table, rows, lengths = cache.layout()
    options = {"page_size": 16, "scaling": 0.25, "max_length": 70, "backend": "triton"}
    offsets = torch.arange(3, dtype=torch.int32, device=device)
    ragged = ops.ragged_attention(query, *cache.store(), table, rows, offsets, lengths, max_query=1, **options)
    decode = ops.decode_attention(query, *cache.store(), table, rows, lengths, **options)
    assert all(torch.equal(a, b) for a, b in zip(ragged, decode, strict=True))


def test_wrong_inputs_are_named(device) -> None:
    arguments, options = arrange("softcap", torch.float32, device)
    with pytest.raises(ValueError, match="dropout is 1.5"):
        ops.ragged_attention(*arguments, **options | {"dropout": 1.5}, backend="triton")
    with pytest.raises(ValueError, match="lengths has shape"):
        ops.ragged_attention(*arguments[:-1], arguments[-1][:1], **options, backend="triton")
    out, lse = ragged_attention_ref(*arguments, **options)
    grads = [torch.zeros_like(t, dtype=torch.float16) for t in arguments[1:3]]
    with pytest.raises(ValueError, match="grad_keys is torch.float16"):
        ops.ragged_attention_backward(
            out, *arguments[:3], out, lse, *arguments[3:], *grads, **options, backend="triton"
        )


def test_what_the_kernels_would_misread_is_refused(device) -> None:
    arguments, options = arrange("softcap", torch.float32, device)
    names = ("query", "keys", "values", "page_table", "rows", "row_offsets", "lengths")
    right = dict(zip(names, arguments, strict=True)) | options
    out, lse = ragged_attention_ref(**right)
    grads = {f"grad_{name}": torch.zeros_like(right[name]) for name in ("keys", "values")}
    behind = {"grad_out": out, "out": out, "lse": lse} | grads
    wrong = [
        ({"keys": view(right["keys"])}, "keys has strides"),
        ({"values": view(right["values"])}, "values has strides"),
        ({"page_table": spread(right["page_table"])}, "page_table has stride 2"),
        ({"rows": spread(right["rows"])}, "rows has stride 2"),
        ({"row_offsets": spread(right["row_offsets"])}, "row_offsets has stride 2"),
        ({"window": -1}, "window is -1"),
        ({"softcap": float("nan")}, "softcap nan"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=f"ragged_attention: .*{message}"):
            ops.ragged_attention(**right | change, backend="triton")
    wrong += [
        ({"out": out[:1]}, "out has shape"),
        ({"lse": lse[:1]}, "lse has shape"),
        ({"grad_keys": view(grads["grad_keys"])}, "grad_keys has strides"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=f"ragged_attention_backward: .*{message}"):
            ops.ragged_attention_backward(**right | behind | change, backend="triton")
    assert not any(grad.any() for grad in grads.values())


def test_opcheck(device) -> None:
    from coconut_fast.kernels import ragged_attention, ragged_attention_backward

    arguments, options = arrange("tiny", torch.float32, device)
    arguments = tuple(t.nan_to_num(0.0) if t.is_floating_point() else t for t in arguments)
    library.opcheck(ragged_attention._OP, arguments, options)
    out, lse = ragged_attention_ref(*arguments, **options)
    grads = [torch.zeros_like(t) for t in arguments[1:3]]
    inputs = (torch.ones_like(out), *arguments[:3], out, lse, *arguments[3:], *grads)
    library.opcheck(ragged_attention_backward._OP, inputs, options)
