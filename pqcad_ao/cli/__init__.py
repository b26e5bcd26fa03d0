"""The ``pqcad`` command: demo, plan, compress, sample, eval, export and bench."""

from pqcad_ao.cli.command import main

__all__ = ["main"]
