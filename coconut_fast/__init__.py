"""Latent reasoning at speed: Coconut (arXiv 2412.06769) for any Hugging Face causal language model.

The public names load on first use: importing this package touches no GPU, no network and no triton.
"""

import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coconut_fast.data.curriculum import CurriculumConfig as CurriculumConfig
    from coconut_fast.infer.engine import GenerateOutput as GenerateOutput
    from coconut_fast.infer.engine import generate as generate
    from coconut_fast.model.cache import KVCache as KVCache
    from coconut_fast.model.coconut import Coconut as Coconut
    from coconut_fast.model.loading import load as load
    from coconut_fast.tokens import LatentTokens as LatentTokens

__version__ = "0.1.0"

_HOME = {
    "load": "coconut_fast.model.loading",
    "Coconut": "coconut_fast.model.coconut",
    "LatentTokens": "coconut_fast.tokens",
    "KVCache": "coconut_fast.model.cache",
    "generate": "coconut_fast.infer.engine",
    "GenerateOutput": "coconut_fast.infer.engine",
    "CurriculumConfig": "coconut_fast.data.curriculum",
}
__all__ = sorted(_HOME)


# Two threads that import modules which import each other may each get a partially initialised one.
_importing = threading.RLock()

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            with _importing:
                return getattr(import_module(_HOME[name]), name)
        raise AttributeError(f"module 'coconut_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
