"""Capturing launches as a CUDA graph: the stream for it, and one capture at a time.

Within a capture nothing may be compiled, loaded or allocated but from the graph's own pool, and nothing may wait for
the device. So whoever captures runs the same launches once before, on the same stream: kernels are then compiled and
loaded, and cuBLAS has its workspace, of which it keeps one a stream.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# One warm-up or capture at a time, for all threads; what other threads do meanwhile does not end a capture.
_capturing = threading.Lock()


@contextmanager
def capture_stream(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """Within the block work goes to a stream of the device that can be captured; elsewhere than on a GPU, None.

    The device's own: torch's default stream for captures belongs to the device that captured first, and launches of
    another one would run instead of being captured. The block may leave a capture that failed behind: the stream that
    was current before is current again all the same.
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
    """What replays the launches. RuntimeError where they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        launches()
    return graph.replay
