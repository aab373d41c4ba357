"""The persistent kernel: all thoughts of a small batch, all layers, in one launch (csrc/cuda/persistent.cu).

A pass is a list of phases. Every thread block runs its own share of each, counts up one number in memory, and goes on
when all blocks have: a grid barrier. What a block does is data, `schedule(plan, ...)`: the kernel interprets it on the
device, tests/persistent_vm.py in Python, where it is proved free of races and deadlocks.

    FEED      state = final norm(x); x = feedback(state) + position embedding        one block a row
    QKV       qkv = norm1(x) qkv' + bias                                             outputs, shared evenly
    ATTEND    partial sums of each (row, head, 256 positions); appends the token     (row, head, way)
    OUT       x += o(partial sums, added up) + bias                                  outputs
    UP        mid = act(norm2(x) up' + bias), gated where the model is               outputs
    DOWN      x += mid down' + bias                                                  outputs

Five barriers a layer and one a pass: 61 for GPT-2 124M. The floor of a pass is 170 MB / 4.3 TB/s = 40 us; a barrier
costs about 1 us, and behind it a phase waits for its inputs to come from L2 (about 1 us more), so 60 phases are
predicted at 100 to 130 us, were the weights free. That they nearly are is the design: a block's share of a phase is 9
to 36 KB of weights, fetched into L2 one phase ahead, and its first 64 bytes per thread (32 KB of a block) are in
registers before the block waits. Norms are computed anew by every block, from at most 8 rows of x: a phase less.
Llama-3.2-1B (122 MB a layer) is bound by memory instead: its 81 barriers are 15% of the 453 us floor.

It is off at run time until a committed measurement shows it faster than the graph: see `enabled`.
"""

from __future__ import annotations

import torch

from coconut_fast.model.plan import ModelPlan

FEED, QKV, ATTEND, OUT, UP, DOWN = range(6)
OPCODES = ("feed", "qkv", "attend", "out", "up", "down")
BUFFERS = ("state", "x", "qkv", "cache", "partial", "mid")  # bit i of an instruction's reads and writes is the i-th
FIELDS = ("opcode", "layer", "first", "last", "reads", "writes", "wait", "arrive")
SPLIT = 256  # positions of one partial sum: fixed, so that a row's bits do not depend on its batch

_READS = {
    FEED: ("x", "state"),
    QKV: ("x",),
    ATTEND: ("qkv", "cache"),
    OUT: ("partial", "x"),
    UP: ("x",),
    DOWN: ("mid", "x"),
}
_WRITES = {
    FEED: ("x", "state"),
    QKV: ("qkv",),
    ATTEND: ("partial", "cache"),
    OUT: ("x",),
    UP: ("mid",),
    DOWN: ("x",),
}


def ways_of(plan: ModelPlan, batch: int, blocks: int, splits: int) -> int:
    """How many blocks share the splits of one (row, head): as many as there are for each, at most one per split."""
    return max(1, min(splits, blocks // (batch * plan.heads)))


def schedule(plan: ModelPlan, *, batch: int, blocks: int, splits: int) -> torch.Tensor:
    """One pass as instructions, int32 (blocks, 1 + 5 layers, 8), the last axis as FIELDS names it.

    first and last bound the block's tiles: rows of FEED, outputs of a linear layer, and of ATTEND the numbers
    (row * heads + head) * ways + way, a way taking every ways-th split. A block starts an instruction when `wait` phases
    of the pass are complete, and adds `arrive` to the count when it has finished it. The kernel repeats the list for
    each thought and runs its first instruction once more at the end, which leaves the last states.
    """
    tiles = {
        FEED: batch,
        QKV: (plan.heads + 2 * plan.kv_heads) * plan.head_dim,
        ATTEND: batch * plan.heads * ways_of(plan, batch, blocks, splits),
        OUT: plan.dim,
        UP: plan.inner,
        DOWN: plan.dim,
    }
    phases = [(FEED, 0), *((op, layer) for layer in range(plan.layers) for op in (QKV, ATTEND, OUT, UP, DOWN))]
    program = torch.zeros(blocks, len(phases), len(FIELDS), dtype=torch.int32)
    for i, (op, layer) in enumerate(phases):
        bounds = torch.arange(blocks + 1) * tiles[op] // blocks
        program[:, i, 0] = op
        program[:, i, 1] = layer
        program[:, i, 2] = bounds[:-1]
        program[:, i, 3] = bounds[1:]
        program[:, i, 4] = _mask(_READS[op])
        program[:, i, 5] = _mask(_WRITES[op])
        program[:, i, 6] = i
        program[:, i, 7] = 1
    return program


def _mask(names: tuple[str, ...]) -> int:
    return sum(1 << BUFFERS.index(name) for name in names)
