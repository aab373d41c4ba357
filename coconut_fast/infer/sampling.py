"""Choosing the next token: greedy, or from the likeliest tokens with random numbers that belong to the answer.

The random number of an answer's n-th token is a pure function of (the answer's seed, n), so what is sampled does not
depend on the batch, its order, or the backend's own generator. The C++ sampler (csrc/cpu) has the same definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else from the top_k (0: all) and top_p likeliest."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def uniform(seeds: Sequence[int], steps: Sequence[int], count: int) -> np.ndarray:
    """(B, count) fp64: numbers in [0, 1) from 64-bit seeds[i] and steps[i], steps[i] + 1, ...: splitmix64 (Steele, Lea,
    Flood 2014), its top 53 bits. Arithmetic is modulo 2**64."""
    step_BN = np.array(steps, np.uint64)[:, None] + np.arange(1, count + 1, dtype=np.uint64)
    z: np.ndarray = np.array(seeds, np.uint64)[:, None] + step_BN * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / (1 << 53)


def sample(
    logits_BV: torch.Tensor,
    seeds: Sequence[int],
    steps: Sequence[int],
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.Tensor:
    """(B, V) logits -> (B,) int64 ids. Greedy at temperature 0, ties to the lowest id.

    Otherwise: probabilities softmax(logits / temperature) in fp64; of these the top_k likeliest (0: all), renormalised;
    of these the fewest likeliest that reach top_p together; ties go to lower ids. The token is the first id, in order
    of ids, at which the kept probabilities add up to more than `uniform(seed, step)` of their sum.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    numbers_B = torch.from_numpy(uniform(seeds, steps, 1)[:, 0]).to(logits_BV.device)
    return sample_at(logits_BV, numbers_B, temperature, top_k, top_p)


def sample_at(
    logits_BV: torch.Tensor, numbers_B: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """`sample` at a temperature above 0 with its random numbers given, (B,) fp64: no host sync."""
    scaled_BV = logits_BV.double() / temperature
    if top_k or top_p < 1:
        ranked_BV, ids_BV = torch.sort(scaled_BV, dim=-1, descending=True, stable=True)
        if top_k:
            ranked_BV[:, top_k:].fill_(float("-inf"))  # assigning a number would copy it to the device
        weights_BV = ranked_BV.softmax(-1)
        before_BV = weights_BV.cumsum(-1) - weights_BV
        ranked_BV = ranked_BV.masked_fill(before_BV >= top_p, float("-inf"))
        scaled_BV = torch.empty_like(scaled_BV).scatter_(-1, ids_BV, ranked_BV)
    sums_BV = scaled_BV.softmax(-1).cumsum(-1)
    at_B1 = numbers_B[:, None] * sums_BV[:, -1:]
    return (sums_BV <= at_B1).sum(-1).clamp_max(logits_BV.shape[-1] - 1)
