"""Seconds on a device (between events on a GPU, by the host's clock elsewhere), and the limits of a GPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from coconut_fast.infer.stats import copy_bandwidth


def seconds_of(call: Callable[[], Any], device: torch.device | str = "cuda") -> float:
    """The second of two calls; on a GPU between two events, with no gap between the calls: launch latency is hidden."""
    call()
    if torch.device(device).type != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def waited(call: Callable[[], Any], device: torch.device | str = "cuda") -> float:
    """Seconds of one call by the host's clock, until the device has finished."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


@functools.cache
def gpu_limits() -> tuple[float, float]:
    """Bytes a second of a large copy (read + written) and bf16 operations a second of a large product, measured now."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / min(seconds_of(lambda: a @ b) for _ in range(5))
    return copy_bandwidth(torch.device("cuda")), product
