"""The persistent kernel: all thoughts of a small batch, all layers, in one launch (csrc/cuda/persistent.cu).

Off: for one row of GPT-2 on an H200 a pass takes 255 us and the CUDA graph's 155; see `enabled`.

A pass is a list of phases. Every thread block runs its share of each, increments a counter in memory, and continues
when all blocks have: a grid barrier. The instructions of a block are data, made by `schedule(plan, ...)`: the kernel
interprets them on the device, tests/persistent_vm.py in Python, where they are proved free of races and deadlocks.

    FEED      hidden = final norm(x); x = feedback(hidden) + position embedding      rows
    QKV       qkv = norm1(x) qkv' + bias                                             outputs, shared evenly
    ATTEND    partial sums of each (row, head, 256 positions); appends the token     (row, head, way)
    OUT       x += o(partial sums, added up) + bias                                  outputs
    UP        mid = act(norm2(x) up' + bias), gated where the model is               outputs
    DOWN      x += mid down' + bias                                                  outputs

Five barriers a layer and one a pass: 61 for GPT-2 124M, whose memory bound is 170 MB / 4.3 TB/s = 40 us. At batch 1 a
phase is bound by latency, not by bandwidth: the barrier, inputs from L2, sums over the block. So weights are copied to
shared memory up to a layer ahead of their use (csrc/cuda/linear.h), keys and values are loaded before the barrier, and
every block recomputes norms from at most 4 rows of x, which saves a phase each. Llama-3.2-1B (122 MB a layer, bound 453
us) is bound by memory, which the copies ahead keep busy through its 81 barriers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch

from coconut_fast import ops
from coconut_fast.infer import fused
from coconut_fast.infer.fused import FusedPasses
from coconut_fast.infer.passes import StaticBatch
from coconut_fast.infer.sampling import Sampling
from coconut_fast.model.cache import KVCache
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.feedback import Identity, Rescale
from coconut_fast.model.plan import ModelPlan, describe

# Device name -> the file under benchmarks/results that shows the kernel faster than the graph there.
FASTER_ON: dict[str, str] = {}

MAX_ROWS = 4  # of a batch
THREADS = 512  # of a block; one block an SM
STORAGE = {torch.float32: 0, torch.bfloat16: 1}
LAYER = struct.Struct("16Qfi")  # csrc/cuda/program.h: pointers in this order, then scaling and window
LAYER_POINTERS = (
    "norm1", "norm1_bias", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias",
    "norm2", "norm2_bias", "up", "up_bias", "down", "down_bias", "keys", "values",
)  # fmt: skip

FEED, QKV, ATTEND, OUT, UP, DOWN = range(6)
OPCODES = ("feed", "qkv", "attend", "out", "up", "down")
BUFFERS = ("hidden", "x", "qkv", "cache", "partial", "mid")  # bit i of an instruction's reads and writes: BUFFERS[i]
FIELDS = ("opcode", "layer", "first", "last", "reads", "writes", "wait", "arrive")
SPLIT = 256  # positions of one partial sum: fixed, so that a row's bits do not depend on its batch

_READS = {
    FEED: ("x", "hidden"),
    QKV: ("x",),
    ATTEND: ("qkv", "cache"),
    OUT: ("partial", "x"),
    UP: ("x",),
    DOWN: ("mid", "x"),
}
_WRITES = {
    FEED: ("x", "hidden"),
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

    first and last bound the block's tiles: rows in FEED, outputs in a linear layer, and in ATTEND the numbers
    (row * heads + head) * ways + way, where a way takes every ways-th split. A block starts an instruction when `wait`
    phases of the pass are complete, and adds `arrive` to the count when it has finished. The kernel repeats the list
    for each thought and runs its first instruction once more at the end, which stores the last states.
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
    program = torch.zeros(blocks, len(phases), len(FIELDS), dtype=torch.int32, device="cpu")
    for i, (op, layer) in enumerate(phases):
        bounds = torch.arange(blocks + 1, device="cpu") * tiles[op] // blocks
        values = {"opcode": op, "layer": layer, "first": bounds[:-1], "last": bounds[1:], "wait": i, "arrive": 1}
        values |= {"reads": _mask(_READS[op]), "writes": _mask(_WRITES[op])}
        for name, value in values.items():
            program[:, i, FIELDS.index(name)] = value
    return program


def _mask(names: tuple[str, ...]) -> int:
    return sum(1 << BUFFERS.index(name) for name in names)


def enabled(device_name: str) -> tuple[bool, str]:
    """Whether thoughts run through the kernel by default on this device, and why (not)."""
    if device_name in FASTER_ON:
        return True, f"faster than the graph: {FASTER_ON[device_name]}"
    return False, "no committed measurement shows it faster than the graph on this device"


def reason_not(model: Coconut) -> str | None:
    """Why the kernel cannot think for this model; None where it can."""
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}, the persistent kernel runs on cuda"
    if not hasattr(ops.extension(), "persistent_launch"):
        return f"the C++ module is built without CUDA: {ops.extension().build_info()['cuda_reason']}"
    capability = torch.cuda.get_device_capability(model.device)
    if capability < (8, 0):
        return f"the device is sm_{capability[0]}{capability[1]}, sm_80 is needed"
    return _unfit(model)


def _unfit(model: Coconut) -> str | None:
    """Why the kernel does not support this model, whatever the device; None where it does."""
    reason = fused.reason_not(model)
    if reason:
        return reason
    if model.dtype not in STORAGE:
        return f"the model is {model.dtype}, the persistent kernel takes float32 and bfloat16"
    if fused.compute_dtype(model) != model.dtype:
        return f"autocast computes in {fused.compute_dtype(model)}, the persistent kernel in the weights' {model.dtype}"
    if type(model.feedback) not in (Identity, Rescale):
        return f"feedback {type(model.feedback).__name__} is not one of Identity, Rescale"
    plan = describe(model.hf)
    assert isinstance(plan, ModelPlan)
    if not plan.gated and plan.activation != "gelu_tanh":
        return f"activation {plan.activation!r}: the persistent kernel has gelu_tanh, and silu behind a gate"
    vector = 16 // model.dtype.itemsize
    for name in ("dim", "inner", "head_dim"):
        if getattr(plan, name) % vector:
            return f"{name} is {getattr(plan, name)}, not a multiple of {vector} ({model.dtype} in 16-byte loads)"
    if plan.head_dim > 32 * vector:
        return f"head_dim is {plan.head_dim}, the persistent kernel takes up to {32 * vector} in {model.dtype}"
    if plan.inv_freq is not None and plan.head_dim % 8:
        return f"head_dim is {plan.head_dim}, not a multiple of 8 (rotary halves in 16-byte loads of floats)"
    # The kernel reads these in place, by copies of 16 bytes, and assumes the model's dtype.
    tensors: dict[str, torch.Tensor | None] = dict(plan.blocks.named_parameters())
    tensors |= {"positions": plan.positions, "final_norm": plan.final_norm, "final_norm_bias": plan.final_norm_bias}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != model.dtype:
            return f"{name} is {tensor.dtype} and the model {model.dtype}, the persistent kernel takes one for all"
        if tensor is not None and tensor.data_ptr() % 16:
            return f"{name} does not begin at a multiple of 16 bytes"
    return None


Launch = Callable[[dict[str, torch.Tensor], dict[str, float], int, int], None]


class PersistentChain(FusedPasses):
    """The fused passes (infer/fused.py) whose thoughts, in batches of up to 4 rows, are one launch of the kernel.

    launch(tensors, numbers, blocks, threads): default the C++ module's; blocks: default one per SM. The tests pass
    both. Raises ValueError where `reason_not` has a reason.
    """

    def __init__(
        self,
        model: Coconut,
        cache: KVCache,
        sampling: Sampling,
        *,
        launch: Launch | None = None,
        blocks: int | None = None,
        threads: int = THREADS,
    ) -> None:
        reason = reason_not(model) if launch is None else _unfit(model)
        if reason:
            raise ValueError(f"model: the persistent kernel cannot think for it: {reason}")
        super().__init__(model, cache, sampling)
        self.reason = f"up to {MAX_ROWS} rows think in one launch of the persistent kernel; {self.reason}"
        self.launch: Launch = launch or ops.extension().persistent_launch
        self.blocks = blocks or torch.cuda.get_device_properties(model.device).multi_processor_count
        self.threads = threads
        self.phases = 1 + 5 * self.plan.layers
        self.splits = -(-self.limit // SPLIT)
        self.table = self._layer_table()
        self.made: dict[int, dict[str, torch.Tensor]] = {}  # rows of a batch -> its program and scratch

    def think(self, batch: StaticBatch, count: int) -> None:
        if batch.size > MAX_ROWS:
            super().think(batch, count)
        else:
            self.run(batch, count, 0, count * self.phases + 1)

    def run(self, batch: StaticBatch, count: int, begin: int, end: int) -> None:
        """Runs instructions [begin, end) of a chain, which has count * phases + 1; it may be run in several ranges."""
        plan, size = self.plan, batch.size
        if size not in self.made:
            self.made[size] = self._make(size)
        tensors = {
            **self.made[size],
            "layers": self.table,
            "embedding": plan.positions,
            "final_norm": plan.final_norm,
            "final_norm_bias": plan.final_norm_bias,
            "cos": self.cos,
            "sin": self.sin,
            "page_table": self.cache.page_table,
            "rows": batch.rows,
            "positions": batch.positions,
            "lengths": batch.lengths,
            "remaining": batch.remaining,
            "hidden": batch.hidden,
            "x": batch.stream,
        }
        numbers = {
            "phases": self.phases,
            "passes": count,
            "begin": begin,
            "end": end,
            "bf16": STORAGE[self.dtype],
            "depth": plan.layers,
            "batch": size,
            **{n: getattr(plan, n) for n in ("dim", "heads", "kv_heads", "head_dim", "inner", "gated", "eps")},
            "layer_norm": plan.norm == "layer",
            "page_size": self.cache.page_size,
            "pages_per_row": self.cache.page_table.shape[1],
            "splits": self.splits,
            "ways": ways_of(plan, size, self.blocks, self.splits),
            "rescale": self.target,
        }
        self.launch({n: t for n, t in tensors.items() if t is not None}, numbers, self.blocks, self.threads)

    def _make(self, size: int) -> dict[str, torch.Tensor]:
        plan, device = self.plan, self.cache.device

        def floats(*shape: int) -> torch.Tensor:
            return torch.full(shape, float("nan"), device=device)

        return {
            "program": schedule(plan, batch=size, blocks=self.blocks, splits=self.splits).to(device),
            "qkv": floats(size, (plan.heads + 2 * plan.kv_heads) * plan.head_dim),
            "partial": floats(size, plan.heads, self.splits, plan.head_dim),
            "stats": floats(size, plan.heads, self.splits, 2),
            "mid": floats(size, plan.inner),
            "counter": torch.zeros(1, dtype=torch.int32, device=device),
        }

    def _layer_table(self) -> torch.Tensor:
        """The addresses of every layer's tensors; neither the packed weights nor the cache ever move."""
        plan, cache = self.plan, self.cache
        entries = b""
        for index, weights in enumerate(self.layers):
            tensors = {**weights.named(), "keys": cache.keys[index], "values": cache.values[index]}
            pointers = [tensors[n].data_ptr() if n in tensors else 0 for n in LAYER_POINTERS]
            entries += LAYER.pack(*pointers, plan.scaling[index], plan.window[index])
        return torch.frombuffer(bytearray(entries), dtype=torch.uint8).to(cache.device)
