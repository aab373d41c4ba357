"""Shared fixtures: where the optional test data lies, and seeds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("COCONUT_FAST_TEST_DATA", ROOT.parent / "shared"))


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"optional test data is absent: {folder}")
    return folder


@pytest.fixture
def golden() -> Path:
    """Numbers of the official implementation."""
    return _folder("golden")


@pytest.fixture
def prosqa_sets() -> Path:
    """The released ProsQA validation and test sets."""
    return _folder("prosqa")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
