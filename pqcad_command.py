"""Where the ``pqcad`` command starts.

It stands outside the package, whose import takes seconds unless this file was imported before: ``pqcad --help`` needs
none of PyTorch.
"""


def main() -> int:
    """As :func:`pqcad_ao.cli.main`."""
    from pqcad_ao.cli import main as run

    return run()
