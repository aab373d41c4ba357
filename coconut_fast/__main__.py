"""python -m coconut_fast: the command line without an installed script (and what torchrun -m runs)."""

import sys

from coconut_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
