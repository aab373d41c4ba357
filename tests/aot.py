"""Compiles every kernel ahead of time as its launcher would launch it, and reports what the assembler made of it.

Run as a program (python -m tests.aot), without TRITON_INTERPRET; arguments are the kernel files wanted (default all).
The ops of aot_cases.py are called on meta tensors with JITFunction.run replaced by a recorder, so signature,
constants, divisibility, warps and stages are the launcher's own. Prints one JSON line per kernel.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTER = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.float64: "*fp64", torch.bool: "*i1", torch.uint8: "*u8",
}  # fmt: skip


class Launch:
    """One recorded launch: the kernel, and what the JIT would specialise it to."""

    def __init__(self, kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options
        self.signature: dict[str, str | tuple[str, ...]] = {}
        self.constants: dict[tuple[int], Any] = {}
        self.attributes: dict[tuple[int, ...], list[Any]] = {}
        for i, parameter in enumerate(kernel.params):
            self._specialise(i, parameter, arguments[parameter.name])

    def _specialise(self, i: int, parameter: Any, value: Any) -> None:
        name = parameter.name
        if isinstance(value, tuple):  # of tensors
            self.signature[name] = tuple(POINTER[t.dtype] for t in value)
            self.attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(len(value))}
            return
        fixed = parameter.is_constexpr or value is None
        if not fixed and isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
            fixed = not isinstance(value, bool)
        if fixed:
            self.signature[name] = "constexpr"
            self.constants[(i,)] = value
            return
        divisible = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            self.signature[name] = POINTER[value.dtype]
        elif isinstance(value, bool):
            self.signature[name], divisible = "i1", False
        elif isinstance(value, int):
            self.signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = divisible and value % 16 == 0
        else:
            self.signature[name], divisible = "fp32", False
        if divisible:
            self.attributes[(i,)] = [["tt.divisibility", 16]]

    def compile(self, capability: int) -> dict[str, Any]:
        """Registers, spilled bytes, shared memory and 128-bit loads of the binary for sm_<capability>; for kernels that
        overlap their predecessor, also reads and writes before pdl_wait."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(built.asm["cubin"])
            cubin.flush()
            usage = subprocess.run(
                [str(CUOBJDUMP), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
            ).stdout
        found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        ptx = built.asm["ptx"]
        ahead, wait, _ = ptx.partition("griddepcontrol.wait")
        return {
            "kernel": self.kernel.fn.__name__,
            "capability": capability,
            "warps": built.metadata.num_warps,
            "registers": found["REG"],
            "spilled": found["STACK"] + found["LOCAL"],
            "shared": built.metadata.shared,
            "vector_loads": len(
                re.findall(r"ld\.global[^;]*\.v4\.b32|ld\.global[^;]*\.v2\.b64|cp\.async[^;]*0x10,", ptx)
            ),
            "overlaps": built.metadata.launch_pdl,
            "waits": bool(wait),
            "read_ahead": len(re.findall(r"ld\.global|prefetch\.global", ahead)),
            "written_ahead": len(re.findall(r"\b(?:st|red|atom)\.global", ahead)),
            "tensor_cores": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        }


def record(call: Callable[[], Any]) -> list[Launch]:
    """The launches that `call` would make."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in self.params]
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        launches.append(Launch(self, {**dict(zip(names, args, strict=False)), **kwargs}, options))

    original, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def launch_op(op: str, *args: Any, **kwargs: Any) -> Any:
    """Replaces `ops.call`: runs the op's launcher itself, where the dispatcher would only compute shapes."""
    return importlib.import_module(f"coconut_fast.kernels.{op}")._launch(*args, **kwargs)


def capabilities(label: str) -> tuple[int, ...]:
    """Architectures a case is compiled for: data-centre GPUs, and for passes of several rows also those with 99 KB of
    shared memory per block."""
    if "bfloat16" not in label:
        return (90,)
    tight = label.startswith("fused_pass") and "/1/" not in label and not label.endswith("prefill")
    return (80, 90, 89, 120) if tight else (80, 90)


def main() -> None:
    from coconut_fast import ops
    from coconut_fast.kernels import common
    from tests.aot_cases import cases

    ops.call = launch_op
    only = tuple(sys.argv[1:]) or ("",)
    seen: set[str] = set()
    for label, call in cases():
        if not label.startswith(only):
            continue
        for common.PLANNED in capabilities(label):
            launches = record(call)
            print(json.dumps({"case": label, "launches": [launch.kernel.fn.__name__ for launch in launches]}))
            for launch in launches:
                key = f"{common.PLANNED} {launch.kernel.fn.__name__} {sorted(vars(launch).items(), key=str)}"
                if key not in seen:
                    seen.add(key)
                    print(json.dumps({"case": label, **launch.compile(common.PLANNED)}), flush=True)


if __name__ == "__main__":
    main()
