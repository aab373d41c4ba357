"""Makes the kernel files importable as `coconut_fast.kernels`, installed or from a bare checkout.

The files have no __init__.py (the name `kernels` belongs to another package on PyPI). An installed package holds them
in a folder beside this module, a checkout (or an editable install) at the top of the repository.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_here / "kernels", _here.parent / "kernels") if folder.is_dir()][:1]
