"""latent_feedback: next inputs, positions and lengths, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from tests.compare import assert_as_good_as_torch
from tests.paged import spread, truth_of, view


def arrange(dtype: torch.dtype, device: torch.device, dim: int = 100):
    batch = 4
    return {
        "source": torch.randn(9, dim).to(device, dtype) * 4 + 1,
        "last": torch.tensor([8, 0, 3, 5], device=device),
        "next_input": torch.full((batch, dim), 7.0, device=device),
        "positions": torch.tensor([15, 0, 30, 2], device=device),
        "lengths": torch.tensor([16, 1, 31, 3], dtype=torch.int32, device=device),
    }


CASES = {
    "identity": {},
    "layer norm and positions": {"norm": "layer", "position_embedding": True, "bias": True},
    "rms norm, rescaled": {"norm": "rms", "target": 2.5, "eps": 3.0},
    "rescaled, counted, thoughts kept": {"target": 0.5, "remaining": True, "thought": True, "position_embedding": True},
    "between two passes": {
        "norm": "layer", "bias": True, "eps": 3.0, "remaining": True, "attended": True, "thought": True,
        "position_embedding": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case, dtype, device) -> None:
    inputs, options = arrange(dtype, device), dict(CASES[case])
    inputs["source"][5] = 0
    dim = inputs["source"].shape[1]
    made = {
        "bias": torch.randn(dim), "position_embedding": torch.randn(40, dim), "thought": torch.zeros(4, dim),
        "remaining": torch.tensor([2, 0, 1, 5], dtype=torch.int32),
        "attended": torch.tensor([16, 1, 0, 0], dtype=torch.int32),
    }  # fmt: skip
    for name in options.keys() & made.keys():
        options[name] = made[name].to(device, dtype if made[name].is_floating_point() else torch.int32)
    if "norm" in options:
        options["weight"] = (torch.rand(dim) + 0.5).to(device, dtype)
    runs = []
    for backend, double in (("triton", False), ("torch", False), ("torch", True)):
        given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in (inputs | options).items()}
        if double:
            given = {k: truth_of(v)[0] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        ops.latent_feedback(**given, backend=backend)
        runs.append(given)
    for name in {"next_input", "thought"} & runs[0].keys():
        assert_as_good_as_torch(runs[0][name].cpu(), runs[1][name].cpu(), runs[2][name], what=name)
    for name in {"positions", "lengths", "remaining", "attended"} & runs[0].keys():
        assert torch.equal(runs[0][name], runs[1][name]), name


def test_a_row_that_is_done_stays_as_it_is(device) -> None:
    inputs = arrange(torch.float32, device)
    before = {name: t.clone() for name, t in inputs.items()}
    remaining = torch.tensor([1, 0, 0, 3], dtype=torch.int32, device=device)
    ops.latent_feedback(**inputs, remaining=remaining, backend="triton")
    assert remaining.tolist() == [0, 0, 0, 2]
    assert torch.equal(inputs["next_input"][1:3], before["next_input"][1:3])
    assert inputs["lengths"].tolist() == [17, 1, 31, 4] and inputs["positions"].tolist() == [16, 0, 30, 3]


def test_the_launch_between_two_passes_ends_one_and_starts_the_next(device) -> None:
    inputs = arrange(torch.float32, device)
    remaining = torch.tensor([1, 1, 0, 0], dtype=torch.int32, device=device)
    attended = torch.tensor([16, 0, 31, 0], dtype=torch.int32, device=device)
    thought = torch.full((4, 100), 3.0, device=device)
    marks = {"remaining": remaining, "attended": attended, "thought": thought}
    ops.latent_feedback(**inputs, **marks, target=2.0, backend="triton")
    kept = inputs["source"][inputs["last"]]
    assert torch.equal(thought[[0, 2]], kept[[0, 2]]) and torch.equal(thought[[1, 3]], torch.full_like(kept[:2], 3.0))
    assert attended.tolist() == [17, 2, 0, 0] and (inputs["next_input"][2:] == 7).all()
    assert torch.allclose(torch.linalg.vector_norm(inputs["next_input"][:2], dim=-1), torch.tensor(2.0, device=device))


def test_a_token_is_fed_from_the_embedding_table(device) -> None:
    inputs = arrange(torch.float32, device)
    ops.latent_feedback(**inputs, backend="triton")
    assert torch.equal(inputs["next_input"], inputs["source"][inputs["last"]])


def test_wrong_inputs_are_named(device) -> None:
    inputs = arrange(torch.float32, device)
    with pytest.raises(ValueError, match="weight is absent with norm 'rms'"):
        ops.latent_feedback(**inputs, norm="rms", backend="triton")
    with pytest.raises(ValueError, match="norm is 'batch'"):
        ops.latent_feedback(**inputs, norm="batch", backend="triton")
    weight, wide = torch.ones(100, device=device), torch.zeros(4, 100, device=device)
    wrong = [
        ({"norm": "rms", "weight": weight[:50]}, r"weight has shape \(50,\), expected \(100,\)"),
        ({"norm": "rms", "weight": spread(weight)}, "weight has stride 2"),
        ({"norm": "layer", "weight": weight, "bias": weight[:50]}, "bias has shape"),
        ({"bias": weight}, "bias is given with norm 'none'"),
        ({"target": -1.0}, "target is -1.0"),
        ({"thought": wide[:2]}, r"thought has shape \(2, 100\), expected \(4, 100\)"),
        ({"thought": view(wide)}, "thought has strides"),
        ({"next_input": view(wide)}, "next_input has strides"),
        ({"position_embedding": view(wide)}, "position_embedding has strides"),
        ({"last": spread(inputs["last"])}, "last has stride 2"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            ops.latent_feedback(**inputs | change, backend="triton")


def test_opcheck(device) -> None:
    from coconut_fast.kernels import latent_feedback

    library.opcheck(latent_feedback._OP, tuple(arrange(torch.float32, device, 8).values()))
