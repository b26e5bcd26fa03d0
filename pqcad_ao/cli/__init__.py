"""The ``pqcad`` command: demo, plan, compress, cache, correct, sample, eval, export and bench."""

from pqcad_ao.cli.command import main

__all__ = ["main"]
