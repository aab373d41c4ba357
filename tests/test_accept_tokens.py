"""accept_tokens: the state after a token pass, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from tests.paged import spread


def arrange(device: torch.device) -> dict[str, torch.Tensor]:
    def ints(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return {
        "ids": ints(7, 8, 9, 2, 2),
        "tokens": ints(1, 1, 1, 1, 1),
        "written": torch.full((5, 4), -5, dtype=torch.int64, device=device),
        "remaining": ints(3, 0, 2, 6, 0, dtype=torch.int32),
        "attended": ints(12, 0, 3, 40, 0, dtype=torch.int32),
        "step": ints(2),
    }


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_active_rows_keep_their_token_and_end_at_end_of_text(backend, device) -> None:
    given = arrange(device)
    ops.accept_tokens(**given, eos=2, backend=backend)
    assert given["tokens"].tolist() == [7, 1, 9, 2, 1]
    assert given["written"][:, 2].tolist() == [7, -1, 9, 2, -1]
    assert (given["written"][:, [0, 1, 3]] == -5).all()
    assert given["remaining"].tolist() == [3, 0, 2, 0, 0]
    assert given["step"].tolist() == [3]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_without_end_of_text_no_row_ends(backend, device) -> None:
    given = arrange(device)
    before = given["remaining"].clone()
    ops.accept_tokens(**given, eos=-1, backend=backend)
    assert torch.equal(given["remaining"], before)


@pytest.mark.parametrize("eos", [2, -1])
def test_nothing_is_written_beyond_the_rows(eos: int, device) -> None:
    given = arrange(device)
    step = given.pop("step")
    longer = {name: torch.cat([x, x.new_full((3, *x.shape[1:]), 6)]) for name, x in given.items()}
    ops.accept_tokens(**{name: x[:5] for name, x in longer.items()}, step=step, eos=eos, backend="triton")
    assert all((x[5:] == 6).all() for x in longer.values())


def test_wrong_inputs_are_named(device) -> None:
    given = arrange(device)
    with pytest.raises(ValueError, match=r"attended has shape \(4,\), expected \(5,\)"):
        ops.accept_tokens(**given | {"attended": given["attended"][:4]}, eos=2, backend="triton")
    for name in ("ids", "tokens", "remaining", "attended"):
        with pytest.raises(ValueError, match=f"{name} has stride 2"):
            ops.accept_tokens(**given | {name: spread(given[name])}, eos=2, backend="triton")


def test_opcheck(device) -> None:
    from coconut_fast.kernels import accept_tokens

    library.opcheck(accept_tokens._OP, tuple(arrange(device).values()), {"eos": 2})
