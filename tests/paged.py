"""Ragged rows in a paged cache for tests: pages in random order, NaN in every slot that holds no token."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Paged:
    """A cache of len(lengths) rows. `truth()` is the same in fp64 on the CPU."""

    keys: torch.Tensor
    values: torch.Tensor
    page_table: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    page_size: int

    def layout(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.page_table, self.rows, self.lengths

    def slots(self, b: int) -> torch.Tensor:
        """Slots of the tokens of row b."""
        j = torch.arange(int(self.lengths[b]), device=self.rows.device)
        pages = self.page_table[int(self.rows[b])].long()
        return pages[j // self.page_size] * self.page_size + j % self.page_size

    def store(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys.clone(), self.values.clone()


def paged(
    lengths: list[int],
    *,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Paged:
    """Rows of the given lengths, at shuffled places of a page table with more rows than are in use."""
    value_dim = value_dim or head_dim
    pages = [-(-n // page_size) for n in lengths]
    table_rows, per_row = len(lengths) + 3, max([*pages, 1]) + 2
    order = torch.randperm(sum(pages) + 4)
    table = torch.full((table_rows, per_row), -1, dtype=torch.int32)
    rows = torch.randperm(table_rows)[: len(lengths)].to(torch.int32)
    keys = torch.full(((sum(pages) + 4) * page_size, kv_heads, head_dim), float("nan"), dtype=torch.float64)
    values = torch.full((keys.shape[0], kv_heads, value_dim), float("nan"), dtype=torch.float64)
    taken = 0
    for row, n, count in zip(rows.tolist(), lengths, pages, strict=True):
        table[row, :count] = order[taken : taken + count]
        taken += count
        j = torch.arange(n)
        slots = table[row].long()[j // page_size] * page_size + j % page_size
        keys[slots] = torch.randn(n, kv_heads, head_dim, dtype=torch.float64)
        values[slots] = torch.randn(n, kv_heads, value_dim, dtype=torch.float64)
    layout = [t.to(device) for t in (table, rows, torch.tensor(lengths, dtype=torch.int32))]
    return Paged(keys.to(device, dtype), values.to(device, dtype), *layout, page_size)


def truth_of(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Floating tensors in fp64, the others as they are, all on the CPU."""
    return [t.detach().cpu().double() if t.is_floating_point() else t.cpu() for t in tensors]


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values as every second element of a larger tensor's last dimension."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def view(x: torch.Tensor) -> torch.Tensor:
    """The same values as a slice of wider rows: contiguous within a row, with gaps between rows."""
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
