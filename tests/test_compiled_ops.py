"""Every Triton op inside torch.compile, one case each; `-m gpu` runs all cases on the device (test_gpu_ops.py)."""

from __future__ import annotations

import pytest
import torch

from coconut_fast import ops
from tests.gpu_cases import CASES, assert_compiles

# the last case of each op, of those with the most options the smallest
NAMES = {name.split(",")[0]: name for name in CASES}
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


def test_no_op_is_forgotten() -> None:
    with_triton = {op for op, backends in ops.BACKENDS.items() if "triton" in backends}
    assert set(NAMES) == with_triton, "every Triton op has its cases in gpu_cases.py"


@pytest.mark.parametrize("op", NAMES)
def test_compiled(op: str, device) -> None:
    assert_compiles(NAMES[op], torch.float32, device)
