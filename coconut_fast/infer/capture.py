"""Capturing launches as a CUDA graph: the stream for it, and one capture at a time.

During a capture nothing may be compiled or loaded, memory may come only from the graph's own pool, and nothing may
synchronise with the device. So callers run the same launches once before, on the same stream: kernels are then compiled
and loaded, and cuBLAS has its workspace, of which it keeps one per stream.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# One warm-up or capture at a time across threads; other work of other threads does not invalidate a capture.
_capturing = threading.Lock()


@contextmanager
def capture_stream(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """Work in the block goes to a side stream that can be captured; yields None where the device is not a GPU.

    Each device has its own: torch's default stream for captures belongs to the device that captured first, and launches
    on another device would run instead of being captured. After the block the previous stream is current again, even if
    a capture in it failed.
    """
    with _capturing:
        if device.type != "cuda":
            yield None
            return
        stream, before = _stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                yield stream
        finally:
            before.wait_stream(stream)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def capture_graph(launches: Callable[[], None], stream: torch.cuda.Stream, pool: object) -> Callable[[], None]:
    """Captures the launches -> a callable that replays them. RuntimeError where they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            launches()
    except BaseException:  # the device's generator may still be waiting for the failed capture to end
        torch.cuda.synchronize(stream.device)
        generator = torch.cuda.default_generators[stream.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay


def first_line(error: Exception) -> str:
    """Why something was not captured, for a sentence that says so."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
