"""A training step, forward and backward, as CUDA graphs: the host makes one launch in place of thousands.

GPT-2's step of 128 rows has some 5,000 kernels in 56 ms of device time, and Python takes 240 ms to launch them. Batches
come in few shapes (train/buckets.py). The first batch of a shape runs eagerly, on the stream used for capture later,
which compiles its kernels; the second is captured, and from then on the shape's graph is replayed. A step's inputs have
fixed addresses: the batch's one buffer and the number of items are copied there, weights do not move, and random
numbers come from the generator's state at the time of the replay. The step adds to gradient buffers, which are fixed
too, so that several batches accumulate as without graphs; the optimizer's step is not part of the graph.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coconut_fast.infer.capture import capture_graph, capture_stream, first_line
from coconut_fast.model.batch import RaggedBatch, from_buffer, to_buffer
from coconut_fast.model.plan import has_global_hooks, modules_of
from coconut_fast.train.buckets import signature

MAX_SHAPES = 128  # a stage of a curriculum has 20 to 60; all share one memory pool

Step = Callable[[RaggedBatch, Tensor], tuple[Tensor | None, ...]]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(model: nn.Module) -> bool:
    """Whether Python is to run when the modules do: a replay would not call it."""
    return has_global_hooks() or any(vars(module)[kind] for module in modules_of(model) for kind in HOOKS)


class GraphedStep:
    """`step(batch, num_items)`, which ends with `backward()` into `parameters`, replayed for shapes seen before.

    step: gets a batch on the device and a () int64 tensor, and returns tensors without an autograd graph; a replay
    overwrites those of the last one of its shape. It must not synchronise with the device. A step that cannot be
    captured runs eagerly, after one warning.
    captures: number of captured shapes; fallback_reason: why no more are captured.
    """

    def __init__(self, step: Step, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self.step = step
        self.parameters = list(parameters)
        self.device = device
        self.shapes: OrderedDict[tuple, _Shape] = OrderedDict()
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.captures = 0
        self.fallback_reason: str | None = None

    def __call__(self, batch: RaggedBatch, num_items: int | Tensor) -> tuple[Tensor | None, ...]:
        """The step for a batch on the CPU."""
        key = signature(batch)
        shape = self.shapes.get(key)
        if shape is None:
            if len(self.shapes) == MAX_SHAPES:
                if self.pool is not None:
                    torch.cuda.synchronize(self.device)  # the graph that is dropped may be running
                self.shapes.popitem(last=False)
            shape = self.shapes[key] = _Shape.like(batch, self.device)
        self.shapes.move_to_end(key)
        shape.words.copy_(to_buffer(batch), non_blocking=True)
        shape.num_items.copy_(num_items) if isinstance(num_items, Tensor) else shape.num_items.fill_(num_items)
        if shape.replay is None and shape.reached is not None and self.fallback_reason is None:
            self._capture(shape)
        if shape.replay is not None:
            self._attach(shape.reached or ())
            shape.replay()
            return shape.outputs
        try:
            return self._launch(shape)
        except torch.OutOfMemoryError as error:
            if self.fallback_reason is not None or not self.captures:
                raise
            self._give_up(error)  # graphs may hold the memory that is missing
        return self._launch(shape)

    def _launch(self, shape: _Shape) -> tuple[Tensor | None, ...]:
        """Runs the step eagerly, and records the parameters that it gives gradients to."""
        before = [p.grad for p in self.parameters]
        try:
            for p in self.parameters:
                p.grad = None
            with capture_stream(self.device):
                outputs = self.step(shape.batch, shape.num_items)
            shape.reached = [p for p in self.parameters if p.grad is not None]
            new = [p.grad for p in self.parameters]
        finally:
            for p, grad in zip(self.parameters, before, strict=True):
                p.grad = grad
        for p, grad in zip(self.parameters, new, strict=True):
            if p.grad is None:
                p.grad = grad
            elif grad is not None:
                p.grad.add_(grad)
        return outputs

    def _capture(self, shape: _Shape) -> None:
        self._attach(shape.reached or ())
        try:
            shape.replay = self._record(shape)
            self.captures += 1
        except Exception as error:
            self._give_up(error)

    def _record(self, shape: _Shape) -> Callable[[], None]:
        """A function that repeats the step: on a GPU, the replay of a captured graph."""

        def launches() -> None:
            shape.outputs = self.step(shape.batch, shape.num_items)

        with capture_stream(self.device) as stream:
            return launches if stream is None else capture_graph(launches, stream, self.pool)

    def _attach(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes the buffers that graphs add to these parameters' gradients, keeping their values."""
        fresh = []
        for p in parameters:
            buffer = self.gradients.get(p)
            if buffer is None:
                buffer = self.gradients[p] = torch.zeros_like(p)
            elif p.grad is None:
                fresh.append(buffer)
            if p.grad is not None and p.grad is not buffer:
                buffer.copy_(p.grad)
            p.grad = buffer
        if fresh:
            torch._foreach_zero_(fresh)

    def _give_up(self, error: Exception) -> None:
        reason = first_line(error)
        self.fallback_reason = f"training steps are not captured as graphs, but run launch by launch: {reason}"
        warnings.warn(self.fallback_reason, stacklevel=4)
        for shape in self.shapes.values():
            shape.replay, shape.outputs = None, ()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a graph that is dropped may still be running
            torch.cuda.empty_cache()


@dataclass
class _Shape:
    """The inputs and outputs of the steps of one shape."""

    words: Tensor
    batch: RaggedBatch  # views of the words
    num_items: Tensor
    outputs: tuple[Tensor | None, ...] = ()
    reached: list[nn.Parameter] | None = None  # those that get gradients; None: no step has run yet
    replay: Callable[[], None] | None = None

    @classmethod
    def like(cls, batch: RaggedBatch, device: torch.device) -> _Shape:
        words = torch.empty_like(to_buffer(batch), device=device)
        num_items = torch.zeros((), dtype=torch.int64, device=device)
        return cls(words, from_buffer(words, batch), num_items)
