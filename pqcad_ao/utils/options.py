"""Command lines: options made from the fields of a configuration and their descriptions, and what all lines share."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields
from inspect import BoundArguments
from itertools import count, pairwise
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter, Token
from cyclopts.validators import Number
from docstring_parser import parse as parse_docstring


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    """cyclopts' own rounds 1.5 to a number."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is no whole number") from None


def _wholes(_: Any, tokens: Sequence[Token]) -> list[int]:
    """``8,6`` or ``[8,6]``, as Python writes it."""
    parts = [part.strip() for token in tokens for part in token.value.strip("[]").split(",")]
    return [_whole(_, [Token(value=part)]) for part in parts if part]


def _there(_: Any, name: str) -> None:
    from pqcad_ao.utils.machine import check_device  # imports PyTorch

    check_device(name)


Whole = Annotated[int, Parameter(converter=_whole)]
Count = Annotated[int, Parameter(converter=_whole, validator=Number(gte=1))]
Wholes = Annotated[list[int], Parameter(converter=_wholes, n_tokens=1, json_list=False)]
Device = Annotated[str, Parameter(validator=_there, help="cpu, cuda or cuda:N.")]
Flag = Annotated[bool, Parameter(negative="")]
Names = Annotated[list[str], Parameter(converter=lambda _, tokens: tokens[0].value.split(","), n_tokens=1)]


@dataclass
class Common:
    """What every command takes.

    Args:
        seed: of every random draw.
        threads: to compute with; all that PyTorch, or the benchmark, takes by itself where it is not given.
        json: a file that receives the result.
        report: a page (HTML) that shows it: pictures, bars, the plan, and what it ran on.
        traceback: show an error's whole traceback.
        command: the command line as it was typed.
    """

    seed: Whole = 0
    threads: Count | None = None
    json: Path | None = None
    report: Path | None = None
    traceback: Flag = False
    command: Annotated[str, Parameter(parse=False)] = ""


EXACTLY = {int: Whole, list[int]: Wholes, list[str] | None: Names}
COMMON = Common()
NONE_GIVEN: dict[str, Any] = {}  # of a configuration's options
_places = count(1)  # of groups of options in the help
# Beside the options of a command, not among them: their names are all there.
Shared = Annotated[Common, Parameter(name="*", group=Group("Every command", sort_key=99))]


def options(
    kind: Any, title: str, *, only: Sequence[str] = (), without: Sequence[str] = ("seed",), **changed: Any
) -> Any:
    """The options of a configuration, as the type of a command's argument: a dictionary of those that were given.

    What was not given is not in it, so that any of the configuration's presets takes the rest.

    Args:
        kind: a dataclass whose docstring describes each field; its ``fast`` preset, where it has one, is named in the
            help, too.
        title: above them in the help.
        only, without: of its fields.
        changed: how the command line writes the fields of these names: a type and a ``Parameter``.
    """
    described = {entry.arg_name: entry.description for entry in parse_docstring(kind.__doc__).params}
    types, fast, entries = get_type_hints(kind), getattr(kind, "fast", kind)(), {}
    group = Group(title, sort_key=next(_places))
    for entry in fields(kind):
        if entry.name in without or (only and entry.name not in only):
            continue
        default, quick = _default(entry), getattr(fast, entry.name)
        shown = f" [default: {default}" + ("]" if quick == default else f", with --fast: {quick}]")
        text = " ".join(described[entry.name].replace("``", "").split())
        kept = Parameter(help=text + (shown if default not in (None, {}) else ""), group=group)
        written, how = changed.get(entry.name, (EXACTLY.get(types[entry.name], types[entry.name]), Parameter()))
        entries[entry.name] = Annotated[written, kept, how]
    return TypedDict(kind.__name__, entries, total=False)  # type: ignore[operator]  # its names are known at run time


def _default(entry: Field) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _bits(text: str) -> int | None:
    if text in ("float", "none"):
        return None
    if not text.isdecimal():
        raise ValueError(f"{text!r} is neither a number of bits nor 'float'")
    return int(text)


def _overrides(_: Any, tokens: Sequence[Token]) -> dict[str, dict[str, int | None]]:
    """``ROLE=W,A`` or ``GLOB=W,A``, each side bits or ``float``; ``ROLE=W`` leaves activations alone."""
    found = {}
    for token in tokens:
        key, equals, value = token.value.rpartition("=")
        sides = value.split(",")
        if not key or not equals or len(sides) > 2:
            raise ValueError(f"{token.value!r} is not ROLE=W,A; write attention=8,8 or 'up_blocks.*=4,6'")
        names = ("weight_bits", "activation_bits")
        found[key] = {name: _bits(side.strip()) for name, side in zip(names, sides, strict=False)}
    return found


# How the command line writes what Python writes as None and as a dictionary.
WRITTEN: dict[str, tuple[Any, Parameter]] = {
    "weight_bits": (int, Parameter(converter=lambda _, tokens: _bits(tokens[0].value), n_tokens=1)),
    "activation_bits": (int, Parameter(converter=lambda _, tokens: _bits(tokens[0].value), n_tokens=1)),
    "overrides": (
        list[str],
        Parameter(
            name="override",
            converter=_overrides,
            help="bits for a role or for layers by name, weights and activations: attention=8,8 or 'up_blocks.*=4,6' "
            "or shortcut=float; may be repeated, and layers win over roles.",
        ),
    ),
    "timestep_groups": (Whole, Parameter(alias="groups")),
}


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Say, to whom interrupts what runs meanwhile, that ``folder`` keeps what is done."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"what is done is kept in {folder}, and the same command goes on from there") from stop


def command_line(app: App, argv: Sequence[str]) -> tuple[Callable[..., Any], BoundArguments]:
    """The function that a command line asks for, and its arguments; a wrong one ends the process with one line."""
    try:
        for flag, value in pairwise(argv):
            if flag in ("--pq", "--cad") and "=" in value:  # as it was written before
                name, _, rest = value.partition("=")
                raise CycloptsError(msg=f"{flag} {value}: write {flag}.{name.replace('_', '-')} {rest}")
        command, bound, _ = app.parse_args(argv, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        asked = " ".join([app.name[0], *(error.command_chain or ())])
        print(f"{app.name[0]}: error: {' '.join(str(error).split())} (see {asked} --help)", file=sys.stderr)
        sys.exit(2)
    return command, bound
