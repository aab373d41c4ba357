"""The paged KV cache: keys and values of all layers, in slots that the C++ layout assigns.

The layout (csrc/cache_layout.h) decides which row owns which page; this file owns the memory. A slot is one row of a
layer's `keys` and `values`, (slots, kv heads, head dim), allocated when the layer first writes and never moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch

from coconut_fast import ops
from coconut_fast.model.batch import PAGE_SIZE, UsedPositions


@dataclass(frozen=True)
class Ragged:
    """One ragged forward: which rows, how many tokens of each, and where their keys and values go.

    Passed through the Hugging Face model as the keyword `ragged`, for model/attention.py.
    """

    cache: Storage
    rows: torch.Tensor  # (B,) int32: rows of the cache
    row_offsets: torch.Tensor  # (B + 1,) int32: where each row's tokens start in this call
    lengths: torch.Tensor  # (B,) int32: tokens in the cache, those of this call included
    slots: torch.Tensor  # (T,) int64: where this call's tokens are written
    max_query: int
    max_length: int
    seeds: torch.Tensor | None = None  # (layers,) int64: dropout seed of each layer; None: no dropout
    rewritten: bool = False  # whether other passes write the same slots (model/parallel.py)
    used: UsedPositions | None = None  # positions where the last layer computes more than keys and values; None: all
    # (B,) int32: each row's length after the first pass, whose backward adds this pass's dK and dV to the first
    # pass's slots; None: this pass's own backward does.
    joined: torch.Tensor | None = None
    calls: list[tuple[int, int | None]] | None = None  # if given, every call appends its layer and its window


class Storage:
    """Keys and values of every layer in `num_slots` slots, and in training their gradients.

    page_table: (rows, pages) int32, which pages of slots a row has.
    """

    def __init__(
        self, num_layers: int, *, num_slots: int, page_table: torch.Tensor, page_size: int = PAGE_SIZE
    ) -> None:
        self.num_slots = num_slots
        self.page_table = page_table
        self.page_size = page_size
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers
        # Training only, per layer: the gradient buffers, and `order`, a dummy tensor that keeps backward in reverse
        # pass order.
        self.grad_keys: list[torch.Tensor | None] = [None] * num_layers
        self.grad_values: list[torch.Tensor | None] = [None] * num_layers
        self.waiting: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(num_layers)]  # inputs of _add_joined
        # By number of passes: the token layout of that call (_joined_layout).
        self.joins: dict[int, tuple[torch.Tensor, ...]] = {}
        self.tasks = [-1] * num_layers  # the backward call that each layer's buffers belong to
        self.order: list[torch.Tensor | None] | None = [None] * num_layers

    def storage(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The (slots, kv heads, head dim) tensors of a layer; made on its first write, shaped as `key` and `value`."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            keys = self.keys[layer] = value.new_empty((self.num_slots, *key.shape[1:]))
            values = self.values[layer] = value.new_empty((self.num_slots, *value.shape[1:]))
        return keys, values

    def gradients(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's accumulation buffers for dK and dV, fp32 (fp64 for an fp64 cache).

        Zeroed at the first request of each backward call: a backward that stops at a thought leaves sums that no pass
        has consumed.
        """
        grad_keys, grad_values = self.grad_keys[layer], self.grad_values[layer]
        task = torch._C._current_graph_task_id()
        if grad_keys is None or grad_values is None or task != self.tasks[layer]:
            self.tasks[layer] = task
            keys, values = self.keys[layer], self.values[layer]
            assert keys is not None and values is not None, "backward before any forward"
            dtype = torch.promote_types(keys.dtype, torch.float32)
            grad_keys = self.grad_keys[layer] = torch.zeros_like(keys, dtype=dtype)
            grad_values = self.grad_values[layer] = torch.zeros_like(values, dtype=dtype)
            self.waiting[layer] = []
        return grad_keys, grad_values

    def seal(self) -> None:
        """Ends the forward: the autograd graph now holds the order of backward, and the cache drops it.

        The graph refers to the cache; if the cache still referred to the graph, neither would ever be freed.
        """
        self.order = None


class KVCache(Storage):
    """Rows that grow token by token, are forked, rolled back and freed.

    num_slots: tokens it can hold; max_rows: rows at a time; max_length: tokens of the longest row (default:
    `num_slots`). Slots and length are rounded up to whole pages. Raises ValueError, and changes nothing, when it is
    full or does not have a row.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        num_slots: int,
        max_rows: int = 64,
        max_length: int | None = None,
        page_size: int = PAGE_SIZE,
        device: torch.device | str = "cpu",
    ) -> None:
        max_length = num_slots if max_length is None else max_length
        sizes = {"num_layers": num_layers, "num_slots": num_slots, "max_rows": max_rows, "max_length": max_length}
        for name, size in (sizes | {"page_size": page_size}).items():
            if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: found {size!r}, expected a whole number of 1 or more")
        num_pages = -(-num_slots // page_size)
        self.layout = ops.extension().CacheLayout(
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_pages_per_row=-(-max_length // page_size),
        )
        self.device = torch.device(device)
        # On a GPU the kernels read a copy of the page table at an address that never changes (graphs capture it).
        on_cpu = self.device.type == "cpu"
        table = self.layout.page_table if on_cpu else self.layout.page_table.to(self.device)
        super().__init__(num_layers, num_slots=num_pages * page_size, page_table=table, page_size=page_size)

    def alloc(self, count: int) -> list[int]:
        """`count` new, empty rows."""
        return self.layout.alloc(count)

    def append(
        self,
        rows: Sequence[int],
        counts: Sequence[int],
        seeds: torch.Tensor | None = None,
        used: UsedPositions | None = None,
    ) -> Ragged:
        """Places `counts[i]` new tokens at the end of `rows[i]`; the forward they belong to writes them."""
        if not len(rows):
            raise ValueError("rows: found none, expected one or more")
        slots = self.reserve(rows, counts)
        index = torch.tensor(list(rows), dtype=torch.int32, device="cpu")
        lengths = self.layout.lengths[index]
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int32, device="cpu")
        offsets[1:] = torch.tensor(list(counts), dtype=torch.int32, device="cpu").cumsum(0)
        return Ragged(
            cache=self,
            rows=index.to(self.device, non_blocking=True),
            row_offsets=offsets.to(self.device, non_blocking=True),
            lengths=lengths.to(self.device, non_blocking=True),
            slots=slots.to(self.device, non_blocking=True),
            max_query=max(counts),
            max_length=int(lengths.max()),
            seeds=seeds,
            used=used,
        )

    def reserve(self, rows: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """Places tokens like `append`, for passes that find their slots on the device. Returns them, on the CPU."""
        slots, copies = self.layout.append(list(rows), list(counts))
        if len(copies):
            self._copy_pages(copies)
        if self.device.type == "cuda":  # page-locked: copying a large pageable table would synchronise
            self.page_table.copy_(self.layout.page_table.pin_memory(), non_blocking=True)
        return slots

    def fork(self, rows: Sequence[int]) -> list[int]:
        """New rows that share the tokens of `rows` until one of them appends (copy on write)."""
        return self.layout.fork(list(rows))

    def truncate(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Rolls `rows[i]` back to its first `lengths[i]` tokens."""
        self.layout.truncate(list(rows), list(lengths))

    def free(self, rows: Sequence[int]) -> None:
        """Frees rows and the pages that only they hold."""
        self.layout.free(list(rows))

    def _copy_pages(self, copies: torch.Tensor) -> None:
        source, target = copies.to(self.device).unbind(1)
        for storage in (*self.keys, *self.values):
            if storage is not None:
                pages = storage.view(-1, self.page_size, *storage.shape[1:])
                pages[target] = pages[source]
