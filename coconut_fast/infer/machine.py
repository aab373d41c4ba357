"""What the machine, or the container, leaves to this process: memory for a call's cache, CPUs for the native chain."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedConfig

from coconut_fast.model.coconut import Coconut

CONTAINER = Path("/sys/fs/cgroup")  # a container sees its own limits there, in the format of cgroups v1 or v2
_MEMORY = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
_CPU_TIME = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # quota and period, in microseconds


def check(model: Coconut, num_slots: int, batch_size: int, free: int) -> None:
    """ValueError where the cache of this call would not fit into `free` bytes."""
    needed = cache_bytes(model, num_slots)
    if needed > free:
        raise ValueError(
            f"batch_size: a cache of {batch_size} rows needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "use a smaller batch_size, fewer max_new_tokens or shorter prompts"
        )


def cache_bytes(model: Coconut, num_slots: int) -> int:
    """Bytes of the keys and values of all layers in `num_slots` slots."""
    config = model.hf.config.get_text_config()
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    return num_slots * sum(map(_cached_values, layers)) * model.dtype.itemsize


def _cached_values(config: PreTrainedConfig) -> int:
    """Numbers that a layer keeps of a token, as keys and values."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # DeepSeek's attention, whose head_dim is that of the rotated part only
        return kv_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    if config.model_type == "jetmoe":  # attention is handed its kv heads once for each expert of a token
        kv_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * kv_heads * head_dim


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, with what torch reserves and leaves unused; else of this machine, or container if less."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    for limit, used, stat, unneeded in _MEMORY:
        try:
            kinds = dict(line.split() for line in (CONTAINER / stat).read_text().splitlines())
            left = int((CONTAINER / limit).read_text()) - int((CONTAINER / used).read_text())
            free = min(free, left + int(kinds[unneeded]))  # cached files count as used
        except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
            continue
    return free


def cpus() -> int:
    """The least of torch's threads (`torch.set_num_threads`, OMP_NUM_THREADS), the CPUs this process may run on, and
    the container's CPU quota: with more threads than the quota, all are stopped for most of every period."""
    count = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    for names in _CPU_TIME:
        try:
            quota, period = (int(word) for name in names for word in (CONTAINER / name).read_text().split())
        except (OSError, ValueError):  # no container, or one without a quota ("max")
            continue
        if quota > 0 and period > 0:  # -1: none
            count = min(count, quota // period)
    return max(count, 1)
