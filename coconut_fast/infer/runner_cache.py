"""What stays of a `generate` call for the model's next one: its graph runner, with cache, static batches and graphs.

A model keeps its last runner for as long as it lives itself. A graph repeats launches, and none of the Python around
them: a model with hooks runs eagerly (`hooked`), and no runner is kept where a module's Python may change from one call
to the next (`not_reusable`).
"""

from __future__ import annotations

import weakref
from itertools import chain

from coconut_fast import ops
from coconut_fast.infer import fused, machine
from coconut_fast.infer.cuda_graphs import GraphRunner
from coconut_fast.infer.sampling import Sampling
from coconut_fast.infer.stats import Clock
from coconut_fast.model import plan
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.feedback import FEEDBACKS


class KeptRunner(GraphRunner):
    """A graph runner that waits for the model's next call when this one is over."""

    def __init__(self, model: Coconut, *, num_slots: int, max_rows: int, max_length: int, sampling: Sampling) -> None:
        super().__init__(model, num_slots=num_slots, max_rows=max_rows, max_length=max_length, sampling=sampling)
        self.capacity = {"num_slots": num_slots, "max_rows": max_rows, "max_length": max_length}
        self.made_for, self.structure = _made_for(model, sampling), _structure(model)
        self.not_reusable = not_reusable(model)
        self.current = False  # whether `hooked` has just found the model's structure to be what it was

    def release(self) -> None:
        """The call is over and its rows are free: the model's next call may have this runner.

        Not under autocast, whose copies of the weights, which graphs have captured, end with it; and not after trouble,
        which the next call may be spared.
        """
        model = self.model
        if not self.fallback_reason and fused.compute_dtype(model) == model.dtype and self.not_reusable is None:
            _kept[model] = self


# One runner a model. It goes when the model goes.
_kept: weakref.WeakKeyDictionary[Coconut, KeptRunner] = weakref.WeakKeyDictionary()


def acquire(model: Coconut, *, num_slots: int, max_rows: int, max_length: int, sampling: Sampling) -> KeptRunner:
    """The runner that the model's last call left, if it is large enough and still fits the model; else a new one.

    It is the caller's alone until `release`; after an error it is simply dropped, rows and all.
    """
    runner = _kept.pop(model, None)
    wanted = {"num_slots": num_slots, "max_rows": max_rows, "max_length": max_length}
    if runner is not None and _holds(runner, wanted) and _fits(runner, model, sampling):
        runner.clock, runner.current = Clock(model.device), False
        runner.refresh()
        return runner
    del runner  # its memory first
    room = {name: _rounded_up(n) for name, n in wanted.items()}
    if machine.cache_bytes(model, room["num_slots"]) > machine.free_bytes(model.device):
        room["num_slots"] = num_slots
    return KeptRunner(model, sampling=sampling, **room)


def holds(model: Coconut, **wanted: int) -> bool:
    """Whether the model's kept runner has room for so much: no memory is needed then."""
    return model in _kept and _holds(_kept[model], wanted)


def drop(model: Coconut) -> None:
    """Drops the model's kept runner, where there is one: its memory is needed for something else."""
    _kept.pop(model, None)


def held_bytes(model: Coconut) -> int:
    """Bytes of the cache that the model's kept runner holds: the next call has it, or gives it back first."""
    runner = _kept.get(model)
    stores = [] if runner is None else [*runner.cache.keys, *runner.cache.values]
    return sum(t.numel() * t.element_size() for t in stores if t is not None)


def hooked(model: Coconut) -> str | None:
    """What its modules do in Python that an engine of our own would not repeat; None: nothing."""
    for name in ("embed", "body", "head"):
        if getattr(type(model), name) is not getattr(Coconut, name):
            return f"{type(model).__name__} has a {name} of its own"
    kept = _kept.get(model)
    if kept is not None:
        kept.current = kept.structure == _structure(model)
        if kept.current:
            return None
    return plan.hooked(model.hf) or plan.hooked(model.feedback, prefix="feedback")


def not_reusable(model: Coconut) -> str | None:
    """Why graphs of this model end with the call: what they do may change where no address of a weight does."""
    if type(model.feedback) not in FEEDBACKS.values():
        return f"feedback {type(model.feedback).__name__} is not one of {', '.join(FEEDBACKS)}"
    for name, module in model.hf.named_modules():
        kind = type(module)
        if not kind.__module__.startswith(("torch.nn.modules.", "transformers.")):
            return f"module {name or 'hf'} is a {kind.__module__}.{kind.__name__}"
    return hooked(model)


def _fits(runner: KeptRunner, model: Coconut, sampling: Sampling) -> bool:
    """Whether what its graphs have fixed is still so. The walk over the modules is a third of what a call costs."""
    if runner.made_for != _made_for(model, sampling):
        return False
    return runner.current or runner.structure == _structure(model)


def _made_for(model: Coconut, sampling: Sampling) -> tuple[object, ...]:
    """What captured graphs have fixed beside the model's structure: its feedback, end-of-text, sampling, and who runs
    the kernels."""
    mean_norm = getattr(model.feedback, "mean_norm", None)
    constant = float(mean_norm) if mean_norm is not None else None
    runs = ops.choose("skinny_linear", model.device)
    return fused.compute_dtype(model), constant, model.tokens.eos, sampling, runs


def _structure(model: Coconut) -> list[object]:
    """Its modules, whether Python does more in them than their class says, and the addresses of its weights.

    Where it is what it was, so is what `not_reusable`, `hooked` and `fused.reason_not` said of the model.
    """
    modules = plan.modules_of(model)
    found = [vars(module) for module in modules]
    more = [i for i, d in enumerate(found) if d["_forward_hooks"] or d["_forward_pre_hooks"] or "forward" in d]
    held = chain.from_iterable([d[kind].values() for kind in ("_parameters", "_buffers") for d in found if d[kind]])
    weights = [(tensor.data_ptr(), tensor.dtype) for tensor in held if tensor is not None]
    return [list(map(id, modules)), list(map(type, modules)), more, weights]


def _holds(runner: KeptRunner, wanted: dict[str, int]) -> bool:
    return all(runner.capacity[name] >= n for name, n in wanted.items())


def _rounded_up(count: int) -> int:
    """Rounded up by at most a quarter, so that a slightly larger call need not capture anew."""
    step = max(1, (1 << count.bit_length()) // 8)
    return -(-count // step) * step
