"""What a training step on the CPU frees goes back to the system at once.

glibc keeps freed blocks of up to 32 MB for later. A step's activations, gradients and temporaries have many sizes and
lifetimes, so the holes they leave fit little of what comes next: on GPT-2, 8 rows of 352 tokens, a step peaked at
4.8 GB, and with blocks of 8 MiB and more returned at 4.3 GB. The price is fresh pages, which the kernel must clear:
from 1 MiB on (3.9 GB) a step took half as long again, and one of the demo's small model 1.6 times as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools

M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 8 << 20


@functools.cache
def return_freed_memory() -> None:
    """Blocks of 8 MiB and more come from mmap from now on, in the whole process, where there is glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # musl, macOS, Windows
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
