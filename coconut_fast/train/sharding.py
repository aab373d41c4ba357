"""What several processes need: every weight in every backward, and, for models that need sharding, FSDP2: what to wrap,
evaluation without collectives, loading and saving whole weights.

Every pass through a sharded layer gathers its weights from all processes, so all processes must run the same number of
passes (rows.Collate adds an idle row where one has fewer thoughts). Generation, whose length is not known in advance,
runs on weights that are gathered once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from coconut_fast.model.coconut import Coconut
from coconut_fast.model.last_layer import decoder_layers
from coconut_fast.train.rows import Collate


def layer_class(model: Coconut) -> str:
    """The class name of the model's decoder layers, in any architecture."""
    layers = decoder_layers(model.hf)
    if not layers:
        raise ValueError(f"fsdp: {type(model.hf).__name__} has no list of layers that could be sharded one by one")
    return type(layers[0]).__name__


def enable(accelerator: Accelerator, plugin_arguments: dict[str, Any]) -> None:
    """Enables FSDP2 on the CPU too (gloo), where accelerate would silently use DDP."""
    plugin = FullyShardedDataParallelPlugin(**plugin_arguments)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def agree_on_passes(batches: Sequence[dict[str, Any]], collate: Collate, device: torch.device) -> list[dict[str, Any]]:
    """The batches of a step, each with the most passes that any process has in that batch."""
    passes = torch.tensor([len(batch["batch"].passes) for batch in batches], device=device)
    dist.all_reduce(passes, op=dist.ReduceOp.MAX)
    wanted = passes.tolist()
    return [
        batch if len(batch["batch"].passes) == count else collate(batch["rows"], count)
        for batch, count in zip(batches, wanted, strict=True)
    ]


def reach_all(loss: torch.Tensor, model: Coconut) -> torch.Tensor:
    """The loss, whose backward now gives every weight outside the language model a gradient, if only zeros.

    DDP waits for the gradients of all weights. A step without thoughts does not use the feedback, and a trainer's
    subclass may use a module of its own outside the model's forward, or in some steps only. One process and FSDP do the
    same, so that training does not depend on the number of processes.
    """
    others = (p for name, p in model.named_parameters() if not name.startswith("hf.") and p.requires_grad)
    return sum((p.sum() * 0.0 for p in others), loss)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within the block every process holds all weights, and running the model needs no communication."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole weights on the CPU, from a model that may be sharded; all processes must call this together."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        for name, value in model.state_dict().items()
    }


def load_whole(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Whole weights, as a checkpoint holds them, into a model that may be sharded."""
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
