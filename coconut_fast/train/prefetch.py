"""A thread prepares the next batches while the current step is launched and runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

AHEAD = 2  # batches: one ready, one being made


class Prefetcher:
    """`map(ready, source)`, in order, with the next `AHEAD` items made by a thread; errors are raised in their place.

    Only `AHEAD` items are made in advance, so a source that is abandoned before its end leaves no waiting thread.
    """

    def __init__(self, source: Iterator[Any], ready: Callable[[Any], Any]) -> None:
        self.source = source
        self.ready = ready
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.due: deque[Future[list[Any]]] = deque(self.thread.submit(self._make) for _ in range(AHEAD))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        made = self.due[0].result()
        if not made:
            raise StopIteration
        self.due.popleft()
        self.due.append(self.thread.submit(self._make))
        return made[0]

    def _make(self) -> list[Any]:
        """The next item, if there is one."""
        return [self.ready(item) for item in islice(self.source, 1)]
