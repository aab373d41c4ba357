"""skinny_linear: norm, product, activation and residual against the reference in fp64, for 1 to 64 rows."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from tests.compare import assert_as_good_as_torch
from tests.paged import spread

CASES = [  # rows, in, out, keywords
    (1, 100, 7, {}),
    (1, 1500, 20, {"norm": "layer", "activation": "gelu_tanh"}),
    (3, 64, 33, {"norm": "rms", "activation": "swiglu"}),
    (4, 40, 5, {}),
    (5, 300, 18, {"norm": "layer", "activation": "swiglu"}),
    (8, 72, 50, {"norm": "rms"}),
    (8, 2100, 8, {"norm": "layer"}),  # rows that do not fit in registers: read again for their statistics
    (9, 1100, 20, {"activation": "swiglu"}),  # more tiles than are in flight at once
    (2, 48, 20, {"activation": "gelu"}),
    (33, 48, 20, {"activation": "gelu_tanh"}),
    (64, 200, 40, {"activation": "swiglu"}),
]


def arrange(rows: int, inputs: int, outputs: int, keywords: dict, dtype: torch.dtype, extras: bool):
    wide = 2 * outputs if keywords.get("activation") == "swiglu" else outputs
    given = {"x": torch.randn(rows, inputs) + 0.5, "weight": torch.randn(wide, inputs) * inputs**-0.5}
    if extras:
        given |= {"bias": torch.randn(wide), "residual": torch.randn(rows, outputs)}
    if "norm" in keywords:
        given["norm_weight"] = torch.rand(inputs) + 0.5
        if keywords["norm"] == "layer":
            given["norm_bias"] = torch.randn(inputs)
    return {k: v.to(torch.float32 if k == "residual" else dtype) for k, v in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs", "keywords"), CASES)
def test_against_the_reference(rows, inputs, outputs, keywords, extras, dtype, device) -> None:
    given = arrange(rows, inputs, outputs, keywords, dtype, extras)
    ours = ops.skinny_linear(**{k: v.to(device) for k, v in given.items()}, **keywords, backend="triton")
    plain = ops.skinny_linear(**given, **keywords, backend="torch")
    truth = ops.skinny_linear(**{k: v.double() for k, v in given.items()}, **keywords, backend="torch")
    assert ours.dtype == (torch.float32 if extras else dtype)
    # tensor cores take x in the weights' type, as plain PyTorch in that type does
    assert_as_good_as_torch(ours.cpu(), plain.to(dtype), truth)


@pytest.mark.parametrize("row_size", [2, 4])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("outputs", [768, 14336])
def test_stages_fit_into_a_block_of_99_kb(outputs, parts, row_size) -> None:
    """Triton has one stage less in shared memory than are in flight."""
    from coconut_fast.kernels.skinny_linear import tiles

    cut = tiles(64, outputs, 4096, row_size, 2, parts, 99 << 10)
    assert (cut.ahead - 1) * cut.block_k * (cut.block_m * row_size + cut.block_n * parts * 2) <= 99 << 10


def test_a_norm_of_rows_far_from_zero(device) -> None:
    given = arrange(2, 512, 8, {"norm": "layer"}, torch.float32, False)
    given["x"] = given["x"] + 300
    given["x"][:, 0] = 3000  # GPT-2's residual stream has such components
    ours = ops.skinny_linear(**{k: v.to(device) for k, v in given.items()}, norm="layer", backend="triton")
    plain = ops.skinny_linear(**given, norm="layer", backend="torch")
    truth = ops.skinny_linear(**{k: v.double() for k, v in given.items()}, norm="layer", backend="torch")
    assert_as_good_as_torch(ours.cpu(), plain, truth)


def test_wrong_inputs_are_named(device) -> None:
    x, weight = torch.randn(65, 8, device=device), torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match="65 rows, expected at most 64"):
        ops.skinny_linear(x, weight, backend="triton")
    with pytest.raises(ValueError, match="9 rows, expected at most 8 with a norm"):
        ops.skinny_linear(x[:9], weight, norm="rms", norm_weight=x[0], backend="triton")
    with pytest.raises(ValueError, match="norm_weight is absent"):
        ops.skinny_linear(x[:1], weight, norm="rms", backend="triton")
    with pytest.raises(ValueError, match="has stride 4 in its last dimension"):
        ops.skinny_linear(x[:1, :4], torch.randn(4, 4, device=device).t(), backend="triton")
    gain = torch.ones(8, device=device)
    wrong = [
        ({"norm": "rms", "norm_weight": gain[:4]}, r"norm_weight has shape \(4,\), expected \(8,\)"),
        ({"norm": "rms", "norm_weight": spread(gain)}, "norm_weight has stride 2"),
        ({"norm": "layer", "norm_weight": gain, "norm_bias": gain[:4]}, "norm_bias has shape"),
        ({"norm_bias": gain}, "norm_bias is given with norm 'none'"),
        ({"weight": weight[:3], "activation": "swiglu"}, "weight has 3 rows, expected an even number"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            ops.skinny_linear(**{"x": x[:1], "weight": weight} | change, backend="triton")


def test_opcheck(device) -> None:
    from coconut_fast.kernels import skinny_linear

    x, weight = torch.randn(2, 8, device=device), torch.randn(4, 8, device=device)
    library.opcheck(skinny_linear._OP, (x, weight), {"activation": "swiglu"})
