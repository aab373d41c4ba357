"""lm_head_sample: exact ids, for a head whose logits are exact in fp32, greedy and sampled."""

from __future__ import annotations

import pytest
import torch
from torch import library

from coconut_fast import ops
from coconut_fast.infer.sampling import sample_at
from tests.paged import spread


def head(batch: int, dim: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and weights on a coarse grid: every order of summation gives the same logits, with many ties."""
    hidden = torch.randint(-3, 4, (batch, dim)).float()
    return hidden, torch.randint(-3, 4, (vocabulary, dim)).float() * 0.25 / dim**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("batch", "dim", "vocabulary"), [(1, 16, 5), (1, 64, 333), (3, 64, 130), (17, 16, 70)])
def test_greedy_takes_the_lowest_of_the_largest(batch, dim, vocabulary, dtype, device) -> None:
    hidden, weight = head(batch, dim, vocabulary)
    bias = torch.randint(0, 3, (vocabulary,)).float()
    given = [t.to(device, dtype) for t in (hidden, weight, bias)]
    for b in (None, given[2]):
        ours = ops.lm_head_sample(*given[:2], bias=b, backend="triton")
        logits = hidden @ weight.t() + (0 if b is None else bias)
        assert torch.equal(ours.cpu(), logits.argmax(-1))


@pytest.mark.parametrize("batch", [1, 3])
def test_ids_of_a_model_that_has_diverged_are_still_ids(batch, device) -> None:
    """The next pass uses them as indices into the embedding table."""
    hidden, weight = head(batch, 16, 37)
    ids = ops.lm_head_sample((hidden * float("nan")).to(device), weight.to(device), backend="triton")
    assert ((ids >= 0) & (ids < 37)).all()
    weight[:36] *= float("nan")  # whichever of the logits are NaN, the others are compared
    weight[36] = hidden[0]
    ids = ops.lm_head_sample(hidden.to(device), weight.to(device), backend="triton")
    assert (ids == 36).all()


SAMPLED = [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.4), (0, 0.9), (20, 0.7), (3, 0.99), (500, 0.95)]


@pytest.mark.parametrize(("top_k", "top_p"), SAMPLED)
@pytest.mark.parametrize(("batch", "dim", "vocabulary"), [(1, 16, 37), (5, 64, 300)])
def test_sampling_is_that_of_the_engine(batch, dim, vocabulary, top_k, top_p, device) -> None:
    hidden, weight = head(batch, dim, vocabulary)
    for temperature in (0.5, 1.0, 3.0):
        numbers = torch.rand(batch, dtype=torch.float64)
        ours = ops.lm_head_sample(
            hidden.to(device), weight.to(device), numbers=numbers.to(device), temperature=temperature, top_k=top_k,
            top_p=top_p, backend="triton",
        )  # fmt: skip
        plain = ops.lm_head_sample(
            hidden, weight, numbers=numbers, temperature=temperature, top_k=top_k, top_p=top_p, backend="torch"
        )
        assert torch.equal(plain, sample_at(hidden @ weight.t(), numbers, temperature, top_k, top_p))
        assert torch.equal(ours.cpu(), plain)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
@pytest.mark.parametrize(
    ("batch", "vocabulary", "top_k", "top_p"), [(16, 150, 0, 1.0), (2, 150, 4, 1.0), (3, 4990, 0, 0.5)]
)
def test_the_ends_of_the_unit_interval_give_kept_ids(batch, vocabulary, top_k, top_p, number, device) -> None:
    """Sums in another order may fall short of the last number."""
    hidden, weight = head(batch, 16, vocabulary)
    bias = torch.where(torch.arange(vocabulary) < 70, -1e4, 0.0)  # the whole first tile has no probability
    numbers = torch.full((batch,), number, dtype=torch.float64)
    ours = ops.lm_head_sample(
        hidden.to(device), weight.to(device), bias=bias.to(device), numbers=numbers.to(device), temperature=1.0,
        top_k=top_k, top_p=top_p, backend="triton",
    )  # fmt: skip
    assert torch.equal(ours.cpu(), sample_at(hidden @ weight.t() + bias, numbers, 1.0, top_k, top_p))


def test_ties_are_counted_across_blocks_of_the_vocabulary(device) -> None:
    logits = torch.zeros(5000)
    logits[-1] = 1.0
    numbers = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    ids = ops.lm_head_sample(
        torch.ones(4, 1, device=device), logits[:, None].to(device), numbers=numbers.to(device), temperature=1.0,
        top_k=3, backend="triton",
    )  # fmt: skip
    assert ids.tolist() == [0, 1, 4999, 4999]


def test_frequencies_follow_the_probabilities(device) -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    numbers = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    ids = ops.lm_head_sample(
        torch.ones(64, 1, device=device), probabilities.log()[:, None].to(device), numbers=numbers.to(device),
        temperature=1.0, backend="triton",
    )  # fmt: skip
    assert torch.equal(ids.cpu().bincount(minlength=5), (probabilities * 64).long())


def test_wrong_inputs_are_named(device) -> None:
    hidden, weight = (t.to(device) for t in head(2, 16, 9))
    with pytest.raises(ValueError, match="numbers is None, expected float64"):
        ops.lm_head_sample(hidden, weight, temperature=1.0, backend="triton")
    with pytest.raises(ValueError, match="top_p 0"):
        ops.lm_head_sample(hidden, weight, top_p=0.0, backend="triton")
    with pytest.raises(ValueError, match="temperature nan"):
        ops.lm_head_sample(hidden, weight, temperature=float("nan"), backend="triton")
    numbers = torch.rand(2, dtype=torch.float64, device=device)
    for bad, message in ((spread(numbers), "numbers has stride 2"), (numbers[:1], "numbers has shape")):
        with pytest.raises(ValueError, match=message):
            ops.lm_head_sample(hidden, weight, numbers=bad, temperature=1.0, backend="triton")


def test_opcheck(device) -> None:
    from coconut_fast.kernels import lm_head_sample

    hidden, weight = (t.to(device) for t in head(2, 16, 9))
    library.opcheck(lm_head_sample._OP, (hidden, weight))
