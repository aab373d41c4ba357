"""Latent reasoning at speed: Coconut (arXiv 2412.06769) for any Hugging Face causal language model.

The public names load on first use: importing this package touches no GPU, no network and no triton.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "coconut_fast.model.checkpoints",
    "Coconut": "coconut_fast.model.coconut",
    "LatentTokens": "coconut_fast.tokens",
    "KVCache": "coconut_fast.model.cache",
    "generate": "coconut_fast.infer.engine",
    "GenerateOutput": "coconut_fast.infer.engine",
    "CurriculumConfig": "coconut_fast.data.curriculum",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'coconut_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
