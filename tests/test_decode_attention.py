"""decode_attention: one query per row, in splits, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from coconut_fast.kernels.reference import decode_attention_ref
from tests.compare import assert_as_good_as_torch
from tests.paged import paged, spread, truth_of, view

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # lanes of padding


@pytest.fixture(params=["one head a program", "heads together"])
def programs(request, monkeypatch) -> None:
    """Both kernels for heads that share keys, whatever the number of rows."""
    from coconut_fast.kernels import decode_attention

    monkeypatch.setattr(decode_attention, "HEAD_BY_HEAD_ROWS", 0 if request.param == "heads together" else 1000)


CASES = [  # lengths, H, Hkv, K, Kv, page size, window, softcap
    ([1, 5], 2, 2, 64, None, 16, 0, 0.0),
    ([130, 64, 65, 3], 2, 1, 16, None, 16, 0, 0.0),
    ([70, 0, 200], 3, 3, 24, 40, 4, 0, 0.0),
    ([150, 20], 6, 2, 80, None, 16, 33, 0.0),
    ([90, 17], 2, 2, 32, None, 1, 0, 5.0),
    ([140, 300], 4, 1, 8, None, 16, 70, 2.0),
    ([260, 700, 256], 4, 2, 16, None, 16, 0, 0.0),
    ([2100, 3200], 2, 1, 8, None, 16, 0, 0.0),  # more splits than are combined at a time
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "head_dim", "value_dim", "page", "window", "softcap"), CASES)
def test_against_the_reference(
    lengths, heads, kv_heads, head_dim, value_dim, page, window, softcap, dtype, programs, device
) -> None:
    cache = paged(
        lengths, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, page_size=page, dtype=dtype, device=device
    )
    query = torch.randn(len(lengths), heads, head_dim).to(device, dtype)
    options = {"page_size": page, "scaling": head_dim**-0.5, "window": window, "softcap": softcap}
    options["max_length"] = max(700, *lengths)
    ours = ops.decode_attention(query, *cache.store(), *cache.layout(), **options, backend="triton")
    plain = decode_attention_ref(query, *cache.store(), *cache.layout(), **options)
    truth = decode_attention_ref(*truth_of(query, *cache.store(), *cache.layout()), **options)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    assert_as_good_as_torch(ours[0].cpu(), plain[0].cpu(), truth[0], what="out")
    live = cache.lengths.cpu() > 0
    assert_as_good_as_torch(ours[1].cpu()[live], plain[1].cpu()[live], truth[1][live], what="lse")
    assert (ours[1].cpu()[~live] == float("-inf")).all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rotary", "norm"), [(2, 2, 0, False), (6, 2, 32, False), (4, 2, 16, True)]
)
def test_the_new_token_is_turned_written_and_attended_to(heads, kv_heads, rotary, norm, programs, device) -> None:
    lengths, head_dim = [129, 1, 64, 0, 257], 32
    cache = paged(lengths, kv_heads=kv_heads, head_dim=head_dim, device=device)
    for b, length in enumerate(lengths):
        if length:
            cache.keys[cache.slots(b)[-1]] = cache.values[cache.slots(b)[-1]] = float("nan")
    fused = torch.randn(5, heads + 2 * kv_heads, head_dim, device=device)
    query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
    extra = {}
    if rotary:
        angles = torch.randn(260, rotary // 2, device=device)
        extra |= {
            "cos": angles.cos(),
            "sin": angles.sin(),
            "positions": torch.tensor([128, 0, 63, 0, 256], device=device),
        }
    if norm:
        extra |= {name: torch.rand(head_dim, device=device) + 0.5 for name in ("query_norm", "key_norm")}
    options = {"page_size": 16, "scaling": 0.2, "softcap": 1.0 if norm else 0.0, "max_length": 320}
    counters = torch.zeros(5 * heads, dtype=torch.int32, device=device)
    runs = []
    for dtype, name in ((None, "triton"), (None, "torch"), (torch.float64, "torch")):
        tensors = [query, *cache.store(), *cache.layout()]
        named = {"key": key, "value": value, **extra}
        if dtype is not None:
            tensors, named = truth_of(*tensors), dict(zip(named, truth_of(*named.values()), strict=True))
        scratch = {"counters": counters} if name == "triton" else {}
        runs.append((*ops.decode_attention(*tensors, **options, **named, **scratch, backend=name), *tensors[1:3]))
    for what, ours, plain, truth in zip(("out", "lse", "keys", "values"), *runs, strict=True):
        ok = torch.isfinite(truth)
        assert torch.equal(torch.isfinite(ours.cpu()), ok), what
        assert_as_good_as_torch(ours.cpu()[ok], plain.cpu()[ok], truth[ok], what=what)
    assert not counters.any(), "the counters are left zero"


def test_a_row_is_the_same_alone_and_in_a_batch(device) -> None:
    cache = paged([300, 7, 130], kv_heads=2, head_dim=16, device=device)
    query = torch.randn(3, 2, 16, device=device)
    options = {"page_size": 16, "scaling": 0.25, "backend": "triton"}
    table, rows, lengths = cache.layout()
    together, _ = ops.decode_attention(query, *cache.store(), table, rows, lengths, max_length=512, **options)
    for b in range(3):
        one = slice(b, b + 1)
        alone, _ = ops.decode_attention(
            query[one], *cache.store(), table, rows[one], lengths[one], max_length=int(lengths[b]), **options
        )
        assert torch.equal(alone, together[one])


def test_mixed_types_and_wrong_inputs(device) -> None:
    cache = paged([40], kv_heads=1, head_dim=16, dtype=torch.float16, device=device)
    query = torch.randn(1, 2, 16, device=device)
    options = {"page_size": 16, "scaling": 0.25, "max_length": 40}
    ours, _ = ops.decode_attention(query, *cache.store(), *cache.layout(), **options, backend="triton")
    plain, _ = decode_attention_ref(query, *cache.store(), *cache.layout(), **options)
    truth, _ = decode_attention_ref(*truth_of(query, *cache.store(), *cache.layout()), **options)
    assert_as_good_as_torch(ours.cpu(), plain.cpu(), truth)
    with pytest.raises(ValueError, match="multiple of the cache's"):
        ops.decode_attention(
            query[:, :1], cache.keys.repeat(1, 2, 1), cache.values.repeat(1, 2, 1), *cache.layout(), **options,
            backend="triton",
        )  # fmt: skip
    with pytest.raises(ValueError, match="expected both or none"):
        ops.decode_attention(query, *cache.store(), *cache.layout(), **options, key=query[:, :1], backend="triton")


def test_what_the_kernel_would_misread_is_refused(device) -> None:
    cache = paged([40, 100], kv_heads=1, head_dim=16, device=device)
    query, positions = torch.randn(2, 2, 16, device=device), torch.tensor([39, 99], device=device)
    table, gain = torch.randn(100, 8, device=device), torch.ones(16, device=device)
    turn = {"cos": table.cos(), "sin": table.sin(), "positions": positions}
    right = {name: getattr(cache, name) for name in ("keys", "values", "page_table", "rows", "lengths")}
    right |= {"page_size": 16, "scaling": 0.25, "max_length": 300}
    wrong = [
        ({"keys": view(cache.keys)}, "keys has strides"),
        ({"values": view(cache.values)}, "values has strides"),
        ({"page_table": spread(cache.page_table)}, "page_table has stride 2"),
        ({"rows": spread(cache.rows)}, "rows has stride 2"),
        ({"lengths": spread(cache.lengths)}, "lengths has stride 2"),
        (turn | {"cos": view(table)}, "cos has strides"),
        (turn | {"positions": positions[:1]}, "positions has shape"),
        ({"query_norm": gain[:8]}, r"query_norm has shape \(8,\), expected \(16,\)"),
        ({"key_norm": spread(gain)}, "key_norm has stride 2"),
        ({"counters": spread(torch.zeros(4, dtype=torch.int32, device=device))}, "counters has strides"),
        ({"window": -1}, "window is -1"),
        ({"softcap": -1.0}, "softcap -1.0, expected 0"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=f"decode_attention: .*{message}"):
            ops.decode_attention(query, **right | change, backend="triton")


def test_opcheck(device) -> None:
    from coconut_fast.kernels import decode_attention

    cache = paged([40, 3], kv_heads=1, head_dim=16, device=device)
    arguments = (torch.randn(2, 2, 16, device=device), *cache.store(), *cache.layout())
    new = {"key": torch.randn(2, 1, 16, device=device), "value": torch.randn(2, 1, 16, device=device)}
    options = {"page_size": 16, "scaling": 0.25, "max_length": 40}
    for named in (options, options | new):
        library.opcheck(
            decode_attention._OP,
            arguments,
            named,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
