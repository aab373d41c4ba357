"""Makes ../kernels importable as `coconut_fast.kernels` from a bare checkout.

An installed package holds the kernel files themselves at this name (setup.py maps `kernels/` to it), and a package
shadows a module of the same name; so this file only ever runs in a checkout, where it turns itself into that package.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "kernels")]
