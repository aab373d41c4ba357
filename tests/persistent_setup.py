"""What the tests of the persistent kernel share: batches about to think, and the kernel's source built for the CPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from coconut_fast.infer.passes import StaticBatch
from coconut_fast.infer.persistent import Launch
from coconut_fast.infer.prefill import prefill
from coconut_fast.model.cache import KVCache
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.plan import ModelPlan, describe
from tests.persistent_vm import Machine
from tests.test_native import chains

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22], [30], [40, 41, 42, 43, 44]]
COUNTS = [3, 2, 0]
MODELS = ("gpt2", "llama", "llama-biased", "mistral", "qwen2", "qwen3")  # some of test_native's

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++20", "-O1", "-g", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
# A GPU faults on misaligned 16-byte accesses; x86 does not, so a sanitizer has to check.
FLAGS += ["-fsanitize=alignment,signed-integer-overflow,shift", "-fno-sanitize-recover=all"]
SETTERS = """
#include "cuda/program.h"
using namespace coconut_fast;
extern "C" Arguments* make_arguments() { return new Arguments{}; }
extern "C" void free_arguments(Arguments* a) { delete a; }
extern "C" bool give_pointer(Arguments* a, const char* name, void* p) { return set_pointer(*a, name, p); }
extern "C" bool give_number(Arguments* a, const char* name, double x) { return set_number(*a, name, x); }
"""


@dataclass
class Start:
    """Prefilled prompts in a cache, and a batch that is about to think."""

    cache: KVCache
    batch: StaticBatch
    rows: int


def start(
    model: Coconut,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    counts: Sequence[int] = COUNTS,
    size: int = 4,
    room: int = 64,
) -> Start:
    """Rows with prefilled prompts and pages for the thoughts; slots without a token hold NaN."""
    plan = plan_of(model)
    cache = KVCache(plan.layers, num_slots=room * size, max_rows=size, max_length=room, device=model.device)
    example = torch.empty(0, plan.kv_heads, plan.head_dim, dtype=model.dtype, device=model.device)
    for layer in range(plan.layers):
        for side in cache.storage(layer, example, example):
            side.fill_(float("nan"))
    rows = cache.alloc(len(prompts))[::-1]  # row i of the batch is not row i of the cache
    with torch.inference_mode():
        hidden_BD = prefill(model, cache, rows, prompts)
    batch = StaticBatch(size, plan.dim, 1, torch.float32, model.device)
    batch.fill(rows, [len(p) for p in prompts], counts)
    batch.hidden[: len(rows)] = hidden_BD
    cache.reserve(rows, counts)
    return Start(cache, batch, len(rows))


def plan_of(model: Coconut) -> ModelPlan:
    plan = describe(model.hf)
    assert isinstance(plan, ModelPlan), plan
    return plan


def machine(model: Coconut, program: torch.Tensor, at: Start, rescale: float = 0.0, rows: int | None = None) -> Machine:
    """A Python machine with the batch's state and cache and the model's weights: fp32, or fp64 for an fp64 model."""
    cache, batch, rows = at.cache, at.batch, rows or at.rows
    dtype = torch.promote_types(model.dtype, torch.float32)
    table = cache.page_table[batch.rows[:rows].long()].long()
    slots_BP = (table[:, :, None] * cache.page_size + torch.arange(cache.page_size)).flatten(1)
    keys, values = (torch.stack([t[slots_BP].to(dtype) for t in side]) for side in (cache.keys, cache.values))
    return Machine(
        plan_of(model),
        program,
        lengths=batch.lengths[:rows].tolist(),
        remaining=batch.remaining[:rows].tolist(),
        hidden=batch.hidden[:rows].to(dtype, copy=True),
        keys=keys,
        values=values,
        rescale=rescale,
    )


def last_states(
    hf: torch.nn.Module, prompts: Sequence[Sequence[int]] = PROMPTS, counts: Sequence[int] = COUNTS
) -> torch.Tensor:
    """The state of each row after its chain, by Hugging Face's own code without a cache."""
    ends = torch.tensor(counts).add(1).cumsum(0) - 1
    return chains(hf, [list(p) for p in prompts], list(counts))[ends]


def compile_kernel(folder: Path) -> Launch:
    """Compiles csrc/cuda/persistent.cu into `folder` -> what PersistentChain takes as `launch`."""
    setters = folder / "setters.cpp"
    setters.write_text(SETTERS)
    library = folder / "persistent.so"
    shim, source = ROOT / "tests" / "cuda_on_cpu.h", ROOT / "csrc" / "cuda" / "persistent.cu"
    command = [os.environ.get("CXX", "g++"), *FLAGS, "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", "-o", str(library)]
    command += ["-x", "c++", str(setters), "-include", str(shim), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module = ctypes.CDLL(str(library))
    module.make_arguments.restype = ctypes.c_void_p
    module.free_arguments.argtypes = [ctypes.c_void_p]
    module.give_pointer.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    module.give_number.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_double]
    module.give_pointer.restype = module.give_number.restype = ctypes.c_bool
    module.coconut_fast_persistent.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    module.coconut_fast_persistent.restype = ctypes.c_char_p

    def launch(tensors: dict[str, torch.Tensor], numbers: dict[str, float], blocks: int, threads: int) -> None:
        arguments = module.make_arguments()
        try:
            for name, tensor in tensors.items():
                assert tensor.is_contiguous(), name
                assert module.give_pointer(arguments, name.encode(), tensor.data_ptr()), name
            for name, number in numbers.items():
                assert module.give_number(arguments, name.encode(), float(number)), name
            error = module.coconut_fast_persistent(arguments, blocks, threads, None)
            if error:
                raise RuntimeError(error.decode())
        finally:
            module.free_arguments(arguments)

    return launch
