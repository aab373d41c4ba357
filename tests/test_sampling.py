"""The sampler: its definition, its distribution, and its independence of the batch."""

from __future__ import annotations

import pytest
import torch

from coconut_fast.infer.sampling import sample, sample_at, uniform


def test_uniform_is_splitmix64() -> None:
    # the generator's published first outputs for seed 1234567
    first = [6457827717110365317 >> 11, 3203168211198807973 >> 11, 9817491932198370423 >> 11]
    numbers = uniform([1234567, 2**64 - 1, 1234567], [0, 5, 1], 3) * 2**53
    assert numbers[0].tolist() == first and numbers[2, :2].tolist() == first[1:]


@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1])
def test_uniform_is_arithmetic_modulo_two_to_the_64(seed: int) -> None:
    mask = 2**64 - 1
    for n, number in enumerate(uniform([seed], [3], 5)[0].tolist()):
        z = (seed + (3 + n + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        assert number == ((z ^ (z >> 31)) >> 11) / 2**53


def test_greedy_takes_the_lowest_of_ties() -> None:
    assert sample(torch.tensor([[0.0, 2.0, 2.0]]), [0], [0]).tolist() == [1]


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(0, 1.0, {0, 1, 2, 3}), (2, 1.0, {1, 3}), (0, 0.7, {1, 3}), (3, 0.99, {1, 2, 3})]
)
def test_frequencies_follow_the_kept_probabilities(top_k: int, top_p: float, kept: set[int]) -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3], dtype=torch.float64)
    n = 20000
    logits = (probabilities.log() * 0.7).expand(n, -1)
    ids = sample(logits, list(range(n)), [0] * n, temperature=0.7, top_k=top_k, top_p=top_p)
    expected = torch.where(torch.tensor([i in kept for i in range(4)]), probabilities, 0)
    expected = expected / expected.sum()
    seen = torch.bincount(ids, minlength=4) / n
    assert set(ids.tolist()) == kept
    error = (expected * (1 - expected) / n).sqrt()
    assert ((seen - expected).abs() <= 4.5 * error).all()


def test_no_more_tokens_are_kept_than_reach_top_p() -> None:
    ids = sample(torch.zeros(64, 4), list(range(64)), [0] * 64, temperature=1.0, top_p=0.5)
    assert set(ids.tolist()) == {0, 1}, "a quarter each: two reach a half"


def test_a_token_is_drawn_where_the_sum_exceeds_the_number() -> None:
    logits, numbers = torch.tensor([[-torch.inf, 0.0, 0.0]] * 2), torch.tensor([0.0, 0.5], dtype=torch.float64)
    assert sample_at(logits, numbers, 1.0).tolist() == [1, 2], "one without probability never"


def test_rows_are_independent() -> None:
    logits = torch.randn(6, 50)
    together = sample(logits, list(range(6)), [3] * 6, 1.3, 12, 0.9)
    alone = [sample(logits[i : i + 1], [i], [3], 1.3, 12, 0.9).item() for i in range(6)]
    assert together.tolist() == alone
