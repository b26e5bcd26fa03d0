"""``python -m pqcad_ao.cli`` is ``pqcad``."""

import sys

from pqcad_ao.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
