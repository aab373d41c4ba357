"""Keeps a model's graph runner, with cache, static batches and graphs, from one `generate` call to the next.

A model's last runner is kept for as long as the model lives. A graph repeats launches, but none of the Python around
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

NUMBERS = ("eps", "variance_epsilon", "scaling", "attention_scaling")  # of norms, attention, rotary embeddings


class KeptRunner(GraphRunner):
    """A graph runner that is kept for the model's next call when this one is over."""

    def __init__(self, model: Coconut, *, num_slots: int, max_rows: int, max_length: int, sampling: Sampling) -> None:
        super().__init__(model, num_slots=num_slots, max_rows=max_rows, max_length=max_length, sampling=sampling)
        self.capacity = {"num_slots": num_slots, "max_rows": max_rows, "max_length": max_length}
        self.made_for, self.structure = _made_for(model, sampling), _structure(model)
        self.not_reusable = not_reusable(model)
        self.current = False  # whether `hooked` has just found the model's structure unchanged

    def release(self) -> None:
        """Keeps this runner for the model's next call: this one is over and its rows are free.

        Not under autocast, because graphs have captured its copies of the weights, which end with it; and not after a
        failure, so that the next call starts afresh.
        """
        model = self.model
        if not self.fallback_reason and fused.compute_dtype(model) == model.dtype and self.not_reusable is None:
            _kept[model] = self


# One runner per model, dropped with the model.
_kept: weakref.WeakKeyDictionary[Coconut, KeptRunner] = weakref.WeakKeyDictionary()


def acquire(model: Coconut, *, num_slots: int, max_rows: int, max_length: int, sampling: Sampling) -> KeptRunner:
    """The runner that the model's last call left, if it is large enough and still fits the model; else a new one.

    Only the caller has it until `release`; after an error it is simply dropped, with its rows.
    """
    runner = _kept.pop(model, None)
    wanted = {"num_slots": num_slots, "max_rows": max_rows, "max_length": max_length}
    if runner is not None and _holds(runner, wanted) and _fits(runner, model, sampling):
        runner.clock, runner.current = Clock(model.device), False
        runner.refresh()
        return runner
    del runner  # frees its memory first
    room = {name: _rounded_up(n) for name, n in wanted.items()}
    if machine.cache_bytes(model, room["num_slots"]) > machine.free_bytes(model.device):
        room["num_slots"] = num_slots
    return KeptRunner(model, sampling=sampling, **room)


def holds(model: Coconut, **wanted: int) -> bool:
    """Whether the model's kept runner has room for these numbers: no memory is needed then."""
    return model in _kept and _holds(_kept[model], wanted)


def drop(model: Coconut) -> None:
    """Drops the model's kept runner, if there is one, to free its memory."""
    _kept.pop(model, None)


def held_bytes(model: Coconut) -> int:
    """Bytes of the cache that the model's kept runner holds: the next call reuses or frees it first."""
    runner = _kept.get(model)
    stores = [] if runner is None else [*runner.cache.keys, *runner.cache.values]
    return sum(t.numel() * t.element_size() for t in stores if t is not None)


def hooked(model: Coconut) -> str | None:
    """What the model's modules do in Python that a graph or the native chain would not repeat; None: nothing.

    Also records in the kept runner whether its structure was just found unchanged, which saves `_fits` the same walk.
    """
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
    """Why this model's runner is not kept: its computation may change though no address of a weight does."""
    if type(model.feedback) not in FEEDBACKS.values():
        return f"feedback {type(model.feedback).__name__} is not one of {', '.join(FEEDBACKS)}"
    for name, module in model.hf.named_modules():
        kind = type(module)
        if not kind.__module__.startswith(("torch.nn.modules.", "transformers.")):
            return f"module {name or 'hf'} is a {kind.__module__}.{kind.__name__}"
    return hooked(model)


def _fits(runner: KeptRunner, model: Coconut, sampling: Sampling) -> bool:
    """Whether what its graphs have captured still holds. The walk over the modules is a third of a call's cost."""
    if runner.made_for != _made_for(model, sampling):
        return False
    return runner.current or runner.structure == _structure(model)


def _made_for(model: Coconut, sampling: Sampling) -> tuple[object, ...]:
    """What captured graphs depend on besides the model's structure: the dtype of the products, the feedback's constant,
    end-of-text, sampling, the backend of the kernels, and what is read from the configuration when a pass runs."""
    mean_norm = getattr(model.feedback, "mean_norm", None)
    constant = float(mean_norm) if mean_norm is not None else None
    runs = ops.choose("skinny_linear", model.device)
    configured = model.num_layers, model.logits_scale, model.logits_softcap
    return fused.compute_dtype(model), constant, model.tokens.eos, sampling, runs, configured


def _structure(model: Coconut) -> list[object]:
    """The model's modules, which of them have hooks or a replaced forward, and its weights' addresses, strides, dtypes.

    Also the forwards of their classes, whether all modules have hooks, and NUMBERS, which launches hold as constants.
    While it is unchanged, so are the results of `not_reusable`, `hooked` and `fused.reason_not`.
    """
    modules = plan.modules_of(model)
    found = [vars(module) for module in modules]
    more = [i for i, d in enumerate(found) if d["_forward_hooks"] or d["_forward_pre_hooks"] or "forward" in d]
    held = chain.from_iterable([d[kind].values() for kind in ("_parameters", "_buffers") for d in found if d[kind]])
    weights = [(tensor.data_ptr(), tensor.stride(), tensor.dtype) for tensor in held if tensor is not None]
    kinds = list(map(type, modules))
    forwards = {kind: getattr(kind, "forward", None) for kind in set(kinds)}
    numbers = [number for d in found for name in NUMBERS if type(number := d.get(name)) in (int, float)]
    return [list(map(id, modules)), kinds, more, weights, forwards, numbers, plan.has_global_hooks()]


def _holds(runner: KeptRunner, wanted: dict[str, int]) -> bool:
    return all(runner.capacity[name] >= n for name, n in wanted.items())


def _rounded_up(count: int) -> int:
    """Rounded up by at most a quarter, so that a slightly larger call need not capture again."""
    step = max(1, (1 << count.bit_length()) // 8)
    return -(-count // step) * step
