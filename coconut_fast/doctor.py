"""What is installed and built here, and which implementation of each op is chosen, with the reason."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

import coconut_fast
from coconut_fast import ops

PACKAGES = ("torch", "triton", "transformers", "accelerate", "tokenizers", "safetensors")


def report(device: str | None) -> str:
    """A few lines for people (and for bug reports). ValueError for an invalid device."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device: found {device!r}, expected cpu, cuda, cuda:1, ...") from error
    where = f"{chosen} (not here: what would be chosen)" if _is_absent(chosen) else str(chosen)
    sections = {
        "versions": list(_versions()),
        "machine": list(_machine()),
        "C++ module": list(_extension()),
        f"generation on {where}": list(_runners(chosen)),
        f"ops on {where}": list(_ops(chosen)),
    }
    return "\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections.items())


def _is_absent(device: torch.device) -> bool:
    return device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()


def _versions() -> Iterator[str]:
    yield _line("coconut_fast", f"{coconut_fast.__version__} ({os.path.dirname(coconut_fast.__file__)})")
    yield _line("python", platform.python_version())
    for name in PACKAGES:
        try:
            yield _line(name, version(name))
        except PackageNotFoundError:
            yield _line(name, "not installed")


def _machine() -> Iterator[str]:
    yield _line("system", f"{platform.system()} {platform.machine()}")
    yield _line("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield _line(
            "GPU", f"none that torch can use (torch is built {f'for CUDA {built}' if built else 'without CUDA'})"
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield _line(f"cuda:{index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}")


def _extension() -> Iterator[str]:
    try:
        built = ops.extension().build_info()
    except ImportError as error:
        yield str(error)
        return
    for name, value in built.items():
        if name == "cuda_reason":
            continue
        if name == "cuda":
            value = "yes" if value else f"no: {built['cuda_reason']}"
        yield _line("C++ standard" if name == "cxx" else name, str(value))
    if built["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        yield f"built for torch {built['torch']}, but {torch.__version__} is installed: build it again"


def _ops(device: torch.device) -> Iterator[str]:
    for op in ops.BACKENDS:
        try:
            backend, reason = ops.choose(op, device)
            yield _line(op, f"{backend:8} {reason}")
        except ValueError as error:
            yield _line(op, str(error))


def _runners(device: torch.device) -> Iterator[str]:
    """The runner that generates, for known families and for any other model."""
    from coconut_fast.infer import machine
    from coconut_fast.model.plan import FAMILIES

    if device.type == "cuda":
        backend, why = ops.choose("ragged_attention", device)
        if backend == "triton":
            kernels = "fused kernels, five launches a layer"
            yield _line(", ".join(FAMILIES), f"graph: thoughts and tokens replay as CUDA graphs of {kernels}")
            yield _line("any other model", "graph: the same, of Hugging Face's body over our attention")
        else:
            yield _line("any model", f"eager: plain PyTorch over the ragged attention: {why}")
        yield _line("persistent kernel", _persistent(device))
        return

    try:
        module = ops.extension()
    except ImportError:
        yield _line("any model", "nothing: the C++ module, which lays out the cache, does not load")
        return
    isa = module.isa()
    tiles = "; AMX tiles, untried so far, with COCONUT_FAST_ISA=amx" if module.has_tiles() and isa != "amx" else ""
    if ops.asked() in (None, "cpu"):
        yield _line(", ".join(FAMILIES), f"native chain, {isa}, {machine.cpus()} threads{tiles}")
    yield _line("any other model", "eager: plain PyTorch over the ragged attention")
    yield _line("persistent kernel", _persistent(device))


def _persistent(device: torch.device) -> str:
    """Whether a chain of thoughts runs in one launch, and why (not)."""
    from coconut_fast.infer import persistent

    try:
        built = ops.extension().build_info()
    except ImportError:
        return "off: the C++ module does not load"
    if not built["cuda"]:
        return f"off: the C++ module is built without CUDA: {built['cuda_reason']}"
    if device.type != "cuda":
        return f"off: it runs on cuda, not on {device.type}"
    on, why = persistent.enabled("" if _is_absent(device) else torch.cuda.get_device_name(device))
    return f"{'on' if on else 'off'}: {why}"


def _line(name: str, value: str) -> str:
    return f"{name:34} {value}"
