"""PEP 517 backend: setuptools', building against the torch that the package will run with.

A C++ extension only works with the torch it was built against. Build isolation hides that torch, and naming one as a
build requirement would build against another (and may download gigabytes). So the torch of the environment that starts
the build is made importable again; torch is a build requirement only where there is none. This works with pip.
`python -m build` starts the backend with the isolated environment's own python, which cannot find the original
environment: use `--no-isolation` there.
"""

import importlib.util
import os
import subprocess
import sys

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH = ["torch==2.13.0", "numpy"]
# -E: ignores the variables by which an isolated build hides the environment it was started from.
FIND = [sys.executable, "-E", "-c", "import importlib.util; print(importlib.util.find_spec('torch').origin)"]


def _find_torch() -> bool:
    """Whether torch is importable, if necessary after appending the environment's packages to sys.path."""
    if importlib.util.find_spec("torch"):
        return True
    found = subprocess.run(FIND, capture_output=True, text=True, cwd=os.path.dirname(sys.executable))
    if found.returncode == 0:
        sys.path.append(os.path.dirname(os.path.dirname(found.stdout.strip())))
    return found.returncode == 0


_torch_found = _find_torch()


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    """Nothing beyond [build-system] where torch was found."""
    return [] if _torch_found else TORCH


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel
