"""The ``pqcad`` command: its commands, and what it says of bad input."""

import io
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from cyclopts import App, Parameter

import pqcad_ao
from pqcad_ao.bench.compile.command import bench_compile
from pqcad_ao.bench.edge.command import bench_edge
from pqcad_ao.bench.quality.command import bench_quality
from pqcad_ao.cli import commands, walk
from pqcad_ao.utils.options import Common, command_line

# What bad input raises; anything else is a defect of ours and keeps its traceback.
BAD_INPUT = (
    ValueError,
    TypeError,
    OSError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,
    ImportError,
)

SHARED = (commands.compress, commands.evaluate)  # the commands that processes under torchrun share

app = App(
    name="pqcad",
    help="Diffusion UNets in four bits and half the sampling steps. `pqcad COMMAND --help` shows examples.",
    help_format="plaintext",
    version=pqcad_ao.__version__,
    default_parameter=Parameter(negative_iterable=""),
)
bench = App(name="bench", help="Measure this project and its peers side by side.")
for kind, benchmark in (("quality", bench_quality), ("compile", bench_compile), ("edge", bench_edge)):
    bench.command(benchmark, name=kind)
for command in (commands.demo, commands.plan, commands.compress, walk.cache, walk.correct, commands.sample):
    app.command(command)
app.command(commands.evaluate, name="eval")
app.command(commands.export)
app.command(bench)
app.register_install_completion_command(group="Commands")


def quiet_dependencies() -> None:
    """This process is ours: keep what our dependencies print about themselves out of the user's terminal."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0, 2 after one line on stderr that says what was wrong with the input, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    command, bound = command_line(app, argv)
    if "common" not in bound.signature.parameters:  # --help, --version and the like
        command(*bound.args, **bound.kwargs)
        return 0
    bound.apply_defaults()
    common = bound.arguments["common"]
    common.command = shlex.join(["pqcad", *argv])
    try:
        run(command, bound.kwargs, common)
    except BAD_INPUT as error:
        if common.traceback:
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"pqcad: error: {lines[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        how = f"; {stop}:\n  {common.command}" if stop.args else ""
        print(f"pqcad: interrupted{how}", file=sys.stderr)
        return 130
    return 0


def run(command: Callable[..., dict[str, Any]], arguments: dict[str, Any], common: Common) -> None:
    """Call a command, and write its result where it was asked for."""
    import torch

    import pqcad_ao.registered  # noqa: F401  (as importing the package does elsewhere)
    from pqcad_ao.pages.report import write_report
    from pqcad_ao.utils.files import write_json
    from pqcad_ao.utils.load import busy
    from pqcad_ao.utils.machine import describe

    quiet_dependencies()
    for file in (common.json, common.report):
        if file is not None:
            commands.check_writable(file.parent)
    if common.threads is not None:
        torch.set_num_threads(common.threads)
    disturbed = busy()
    with shared(command, arguments) as (first, mine):
        result = command(**mine)
    if not first:
        return
    pictures, log = result.pop("pictures", {}), result.pop("log", [])  # for the page alone
    if common.json is not None:
        write_json(common.json, result)
    if common.report is not None:
        facts = {"command": common.command, "seed": common.seed, **describe(torch.get_num_threads())}
        write_report(common.report, {**facts, "busy": disturbed, **result}, pictures=pictures, log=log)


@contextmanager
def shared(command: Callable[..., Any], arguments: dict[str, Any]) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Whether this process is the one that writes, and a command's arguments here, among those that torchrun started.

    Of the others nothing is printed; each has a GPU of its own, where they are on GPUs.
    """
    from pqcad_ao.utils.processes import process_group

    if command not in SHARED:
        yield True, arguments
        return
    with process_group(arguments.get("device", "cpu")) as (rank, place):
        if rank == 0:
            yield True, {**arguments, "device": str(place)}
            return
        with redirect_stdout(io.StringIO()):
            yield False, {**arguments, "device": str(place)}
