"""The memory that a call's cache needs, and what is free for it."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from coconut_fast.model.coconut import Coconut

CONTAINER = Path("/sys/fs/cgroup")  # a container sees its own limits there


def check(model: Coconut, num_slots: int, batch_size: int, *, held: int) -> None:
    """ValueError where the cache of this call would not fit into the memory that is free now.

    held: bytes of a cache that the call has, or gives back first.
    """
    needed, free = cache_bytes(model, num_slots), free_bytes(model.device) + held
    if needed > free:
        raise ValueError(
            f"batch_size: a cache of {batch_size} rows needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "use a smaller batch_size, fewer max_new_tokens or shorter prompts"
        )


def cache_bytes(model: Coconut, num_slots: int) -> int:
    """Keys and values of all layers in so many slots."""
    config = model.hf.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * num_slots * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Of a GPU, with what torch has reserved and does not use; else of this machine, or the container if less."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(stat["inactive_file"]))  # files that were read count as used
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return free
