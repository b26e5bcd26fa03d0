"""One UNet step, side by side: ``python -m pqcad_ao.bench.compile --json FILE``."""

import sys

from pqcad_ao.bench.compile.command import main

if __name__ == "__main__":
    sys.exit(main())
