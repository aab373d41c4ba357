"""Runs the persistent kernel's instruction lists in plain Python, and proves what the kernel takes for granted.

Memory records, for every element, which block wrote and read it last, and after how many barriers `a`. An access is
ordered after another block's only if a barrier separates them: the other block arrives for the `a + 1`-th time after
its access, and this one has waited for at least as many arrivals. Anything else is a `Race`, in whatever order the
blocks happened to run here. As barrier counts only grow, the order is irrelevant for deadlock as well: if one order of
running the blocks finishes, all do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from coconut_fast.infer.persistent import ATTEND, BUFFERS, DOWN, FEED, OUT, QKV, SPLIT, UP, ways_of
from coconut_fast.model.plan import LayerPlan, ModelPlan


class Race(Exception):
    """Two blocks access one element, at least one writing, with no barrier in between; or it was never written."""


class Deadlock(Exception):
    """Some blocks wait for ever, or a count does not prove that all blocks have arrived."""


@dataclass
class Instruction:
    """One entry of the list, and the block that runs it."""

    block: int
    arrived: int  # barriers this block has arrived at before
    waited: int  # barriers known to be complete
    opcode: int
    layer: int
    first: int
    last: int
    reads: int
    writes: int


class Memory:
    """Named tensors in which every access is checked against all earlier ones. Starts as NaN that must not be read."""

    def __init__(self, dtype: torch.dtype, **shapes: Sequence[int]) -> None:
        self.data = {n: torch.full(tuple(s), float("nan"), dtype=dtype) for n, s in shapes.items()}
        fields = ("writer", "wrote", "reader", "read")
        self.log = {n: {f: torch.full(t.shape, -1) for f in fields} for n, t in self.data.items()}
        self.now: Instruction | None = None

    def preset(self, name: str, index: object, value: torch.Tensor) -> None:
        """Sets what is there before the launch."""
        self.data[name][index] = value
        self.log[name]["wrote"][index] = -2

    def read(self, name: str, *index: object) -> torch.Tensor:
        now, log = self._declared(name, "reads"), self.log[name]
        writer, wrote = log["writer"][index], log["wrote"][index]
        if (wrote == -1).any():
            raise Race(f"{now}: reads {name}{list(index)}, which nobody has written")
        if ((wrote >= now.waited) & (writer != now.block)).any():
            raise Race(f"{now}: reads {name}{list(index)} beside its writer")
        # -2: several blocks read it after the same barrier; which ones makes no difference.
        reader, read = log["reader"][index], log["read"][index]
        others = (read == now.arrived) & (reader != now.block)
        mine = torch.where(others, -2, now.block)
        log["reader"][index] = torch.where(read > now.arrived, reader, mine)
        log["read"][index] = read.clamp(min=now.arrived)
        return self.data[name][index].clone()

    def write(self, name: str, *index: object, value: torch.Tensor) -> None:
        now, log = self._declared(name, "writes"), self.log[name]
        for who, when in (("writer", "wrote"), ("reader", "read")):
            if ((log[when][index] >= now.waited) & (log[who][index] != now.block)).any():
                raise Race(f"{now}: writes {name}{list(index)} beside its {who}")
        self.data[name][index] = value
        log["writer"][index] = now.block
        log["wrote"][index] = now.arrived

    def _declared(self, name: str, what: str) -> Instruction:
        assert self.now is not None, "an access outside of any instruction"
        mask = getattr(self.now, what)
        if not mask >> BUFFERS.index(name.split("_")[0]) & 1:
            raise Race(f"{self.now}: {what} {name}, which its mask does not say")
        return self.now


def validate(program: torch.Tensor) -> None:
    """Checks that a count of `w * blocks` means that every block has arrived w times, in this pass and the next.

    It does if no block arrives twice without waiting for all others in between: the first one to arrive for the
    (w + 1)-th time has then seen w * blocks arrivals, at most w from each. Raises Deadlock.
    """
    blocks, phases, _ = program.shape
    for block, instructions in enumerate(program.tolist()):
        arrived = waited = 0
        for *_, wait, arrive in instructions:
            if wait > arrived:
                raise Deadlock(f"block {block} waits for {wait} phases, but has itself arrived only {arrived} times")
            waited = max(waited, wait)
            if arrive not in (0, 1) or (arrive and waited < arrived):
                raise Deadlock(f"block {block} arrives for phase {arrived} without having waited for those before it")
            arrived += arrive
        if arrived != phases:
            raise Deadlock(f"block {block} of {blocks} arrives {arrived} times in a pass of {phases} phases")


class Machine:
    """The kernel's blocks, run one at a time in any order that its barriers allow."""

    def __init__(
        self,
        plan: ModelPlan,
        program: torch.Tensor,
        *,
        lengths: Sequence[int],
        remaining: Sequence[int],
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rescale: float = 0.0,
    ) -> None:
        """keys and values: (layers, B, positions, Hkv, K), including those of the thoughts; later ones are not read."""
        self.plan, self.program, self.rescale = plan, program, rescale
        self.layers = [plan.layer(i) for i in range(plan.layers)]
        self.lengths, self.remaining = list(lengths), list(remaining)
        self.dtype = hidden.dtype
        self.at, self.arrived = [0] * len(program), [0] * len(program)  # per block: its next instruction, its arrivals
        batch, positions = len(self.lengths), keys.shape[2]
        self.splits = -(-positions // SPLIT)
        self.ways = ways_of(plan, batch, len(program), self.splits)
        qkv = (plan.heads + 2 * plan.kv_heads) * plan.head_dim
        self.memory = Memory(
            self.dtype,
            hidden=(batch, plan.dim),
            x=(batch, plan.dim),
            qkv=(batch, qkv),
            cache_keys=keys.shape,
            cache_values=keys.shape,
            partial=(batch, plan.heads, self.splits, plan.head_dim),
            partial_stats=(batch, plan.heads, self.splits, 2),
            mid=(batch, plan.inner),
        )
        self.memory.preset("hidden", (), hidden)
        for row, length in enumerate(self.lengths):
            for name, given in (("cache_keys", keys), ("cache_values", values)):
                self.memory.preset(name, (slice(None), row, slice(length)), given[:, row, :length])

    def run(self, passes: int, order: Sequence[int] | None = None, end: int | None = None) -> torch.Tensor:
        """Up to `passes` thoughts of every row, as many as it has left -> states (B, D).

        order: order of the blocks, where several can run. end: stop before this instruction; a later call continues.
        """
        self.passes = passes
        blocks, phases, _ = self.program.shape
        end = passes * phases + 1 if end is None else end
        program = self.program.tolist()
        while min(self.at) < end:
            progress = False
            for block in order if order is not None else range(blocks):
                while self.at[block] < end:
                    step, i = divmod(self.at[block], phases)
                    *fields, wait, arrive = program[block][i]
                    if sum(self.arrived) < (step * phases + wait) * blocks:
                        break
                    self.memory.now = Instruction(block, self.arrived[block], step * phases + wait, *fields)
                    self.step(step)
                    self.arrived[block] += arrive
                    self.at[block] += 1
                    progress = True
            if not progress:
                raise Deadlock(f"blocks stand at instructions {self.at} with {sum(self.arrived)} arrivals")
        return self.memory.data["hidden"].clone()

    def active(self, row: int, step: int) -> bool:
        return step < min(self.remaining[row], self.passes)

    def step(self, step: int) -> None:
        now = self.memory.now
        assert now is not None
        rows = [r for r in range(len(self.lengths)) if self.active(r, step)]
        tiles = slice(now.first, now.last)
        if now.opcode == FEED:
            for row in range(now.first, now.last):
                self._feed(row, step)
        elif now.opcode == ATTEND:
            for tile in range(now.first, now.last):
                row_head, way = divmod(tile, self.ways)
                row, head = divmod(row_head, self.plan.heads)
                if row in rows:
                    self._attend(self.layers[now.layer], now.layer, row, head, way, self.lengths[row] + step)
        elif now.first < now.last:
            for row in rows:
                self._linear(now.opcode, self.layers[now.layer], row, tiles, self.lengths[row] + step, now.layer)

    def _feed(self, row: int, step: int) -> None:
        memory, plan = self.memory, self.plan
        if step > 0 and self.active(row, step - 1):
            state = self._norm(memory.read("x", row), plan.final_norm, plan.final_norm_bias)
            memory.write("hidden", row, value=state)
        if self.active(row, step):
            x = memory.read("hidden", row)
            if self.rescale:
                x = x * (self.rescale / x.norm())
            if plan.positions is not None:
                x = x + plan.positions[self.lengths[row] + step].to(self.dtype)
            memory.write("x", row, value=x)

    def _linear(self, op: int, layer: LayerPlan, row: int, tiles: slice, position: int, index: int) -> None:
        memory, plan = self.memory, self.plan
        if op == QKV:
            x = self._norm(memory.read("x", row), layer.norm1, layer.norm1_bias)
            memory.write("qkv", row, tiles, value=self._product(layer.qkv, layer.qkv_bias, tiles, x))
        elif op == OUT:
            y = self._product(layer.o, layer.o_bias, tiles, self._combine(row, position, index))
            memory.write("x", row, tiles, value=memory.read("x", row, tiles) + y)
        elif op == UP:
            x = self._norm(memory.read("x", row), layer.norm2, layer.norm2_bias)
            y = self._product(layer.up, layer.up_bias, tiles, x)
            if plan.gated:
                shifted = slice(tiles.start + plan.inner, tiles.stop + plan.inner)
                y = functional.silu(y) * self._product(layer.up, layer.up_bias, shifted, x)
            else:
                y = functional.gelu(y, approximate="tanh")
            memory.write("mid", row, tiles, value=y)
        elif op == DOWN:
            y = self._product(layer.down, layer.down_bias, tiles, memory.read("mid", row))
            memory.write("x", row, tiles, value=memory.read("x", row, tiles) + y)
        else:
            raise ValueError(f"unknown opcode {op}")

    def _splits(self, position: int, index: int) -> tuple[int, range]:
        """The first position attended to, and the splits from there on."""
        window = self.plan.window[index]
        low = max(0, position + 1 - window) if window else 0
        return low, range(low // SPLIT, position // SPLIT + 1)

    def _attend(self, layer: LayerPlan, index: int, row: int, head: int, way: int, position: int) -> None:
        memory, plan = self.memory, self.plan
        width, group = plan.head_dim, plan.heads // plan.kv_heads
        kv_head = head // group
        low, splits = self._splits(position, index)
        for split in splits:
            if split % self.ways != way:
                continue
            start = (plan.heads + kv_head) * width
            q = self._rotate(memory.read("qkv", row, slice(head * width, (head + 1) * width)), layer.q_norm, position)
            first, last = max(low, split * SPLIT), min(position + 1, (split + 1) * SPLIT)
            stored = slice(first, min(last, position))
            k = memory.read("cache_keys", index, row, stored, kv_head)
            v = memory.read("cache_values", index, row, stored, kv_head)
            if last == position + 1:  # the token's own key and value: from the projection, not from the cache
                own_k = self._rotate(memory.read("qkv", row, slice(start, start + width)), layer.k_norm, position)
                start += plan.kv_heads * width
                own_v = memory.read("qkv", row, slice(start, start + width))
                k, v = torch.cat([k, own_k[None]]), torch.cat([v, own_v[None]])
                if head % group == 0:
                    memory.write("cache_keys", index, row, position, kv_head, value=own_k)
                    memory.write("cache_values", index, row, position, kv_head, value=own_v)
            scores = k @ q * plan.scaling[index]
            weights = (scores - scores.max()).exp()
            memory.write("partial", row, head, split, value=weights @ v)
            memory.write("partial_stats", row, head, split, value=torch.stack([scores.max(), weights.sum()]))

    def _combine(self, row: int, position: int, index: int) -> torch.Tensor:
        splits = self._splits(position, index)[1]
        chosen = slice(splits.start, splits.stop)
        partial_HSK = self.memory.read("partial", row, slice(None), chosen)
        top_HS, total_HS = self.memory.read("partial_stats", row, slice(None), chosen).unbind(-1)
        weight_HS = (top_HS - top_HS.amax(1, keepdim=True)).exp()
        out_HK = (partial_HSK * weight_HS[..., None]).sum(1) / (total_HS * weight_HS).sum(1, keepdim=True)
        return out_HK.flatten()

    def _product(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: slice, x: torch.Tensor) -> torch.Tensor:
        y = weight[rows].to(self.dtype) @ x
        return y if bias is None else y + bias[rows].to(self.dtype)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.plan.norm == "layer":
            x = x - x.mean()
        y = x * (x.square().mean() + self.plan.eps).rsqrt() * weight.to(self.dtype)
        return y if bias is None else y + bias.to(self.dtype)

    def _rotate(self, x: torch.Tensor, norm: torch.Tensor | None, position: int) -> torch.Tensor:
        if norm is not None:  # the family with these norms uses RMSNorm
            x = self._norm(x, norm, None)
        if self.plan.inv_freq is None:
            return x
        angle = position * self.plan.inv_freq
        cos, sin = (f(angle).to(self.dtype) * self.plan.rope_scaling for f in (torch.cos, torch.sin))
        low, high = x.chunk(2)
        return torch.cat([low * cos - high * sin, high * cos + low * sin])
