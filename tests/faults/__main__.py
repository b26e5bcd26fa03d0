"""What kills, damaged files, threads, faults of the machine and time do: ``python tests/faults --kills 108``."""

import argparse
import logging
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # the networks of the tests

import torch
from fuzz import FOUND, READERS, SLOW_READERS, fuzz
from guided import guide, missing
from injected import FAULTS, Skip, inject
from jobs import EXPORTS, JOBS
from kills import kill
from memory import KINDS, grow
from tabulate import tabulate
from threads import SHARED, THREADS, share

SLOW_PART = 0.01  # of all files, for each reader that takes seconds for one
FILES = ["reader", "files", "read", "error names the file", "does not", "another exception", "hangs", "crashes"]


@dataclass
class Table:
    """What one part of the command found; ``said`` is empty where every number that must be zero is."""

    head: list[str]
    rows: list[list[Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *row: Any) -> None:
        self.rows.append(list(row))
        print(*row, sep=" | ", flush=True)

    def __str__(self) -> str:
        sums = [
            sum(column) if all(type(value) is int for value in column) else ""
            for column in zip(*self.rows, strict=True)
        ][1:]
        rows = [*self.rows, ["all", *sums]] if any(value != "" for value in sums) else self.rows
        table = tabulate(rows, self.head, tablefmt="github", floatfmt=".1f")
        return "\n\n".join([table, *(f"Not injected: {note}." for note in self.notes)])


def kills(args: argparse.Namespace, scratch: Path) -> Table:
    table, jobs = Table(["job", "kills", "restart failed", "other bits", "other files"]), {**JOBS, **EXPORTS}
    for name, job in jobs.items():
        found = kill(name, job, -(-args.kills // len(jobs)), scratch, args.seed)
        table.add(name, found.kills, found.failed, found.other_bits, found.other_files)
        table.said += [] if found.sound else [str(found)]
    return table


def files(args: argparse.Namespace, scratch: Path) -> Table:
    table = Table(FILES)
    for name, reader in {**READERS, **SLOW_READERS}.items():
        count = -(-args.files // len(READERS)) if name in READERS else max(10, round(SLOW_PART * args.files))
        counts, said = fuzz(name, reader, count, scratch / "files", args.seed)
        table.add(name, count, *[counts[kind] for kind in FOUND])
        table.said += said
    return table


def guided(args: argparse.Namespace, scratch: Path) -> Table:
    table = Table(FILES)
    if missing():
        sys.exit(f"--guided: {missing()}")
    for name in READERS:
        counts, said = guide(name, args.guided, scratch / "guided")
        table.add(name, sum(counts.values()), *[counts[kind] for kind in FOUND])
        table.said += said
    return table


def threads(args: argparse.Namespace, scratch: Path) -> Table:
    table = Table(["network", "calls", "wrong or raised"])
    for kind in SHARED:
        wrong = share(kind, args.calls, scratch / "threads")
        table.add(kind, -(-args.calls // THREADS) * THREADS, len(wrong))
        table.said += [f"{kind}: {one}" for one in wrong]
    return table


def faults(args: argparse.Namespace, scratch: Path) -> Table:
    table = Table(["fault", "injected", "recovered", "not recovered"])
    for kind, cases in FAULTS.items():
        said, skipped = [], 0
        for name in cases:
            try:
                said.append(inject(kind, name))
            except Skip as reason:
                skipped += 1
                table.notes.append(f"{kind}, {name} ({reason})")
        wrong = [one for one in said if one]
        table.add(kind, len(said), len(said) - len(wrong), len(wrong))
        table.said += wrong
    return table


def memory(args: argparse.Namespace, scratch: Path) -> Table:
    table = Table(["again and again", "calls", "kB a call", "allowed"])
    for kind in KINDS:
        found = grow(kind, args.minutes * 60 / len(KINDS), scratch / "memory")
        table.add(kind, found.calls, f"{found.slope:.1f}", f"{found.allowed:.0f}")
        table.said += [] if found.sound else [str(found)]
    return table


@dataclass(frozen=True)
class Part:
    """A part of the command: what it does with its option's number, its usual number, and what the page says of it."""

    find: Callable[[argparse.Namespace, Path], Table]
    usual: float
    help: str
    title: str
    text: str


PARTS = {
    "kills": Part(
        kills,
        5,
        "of all jobs together",
        "Kills",
        "SIGKILL at random moments, one in three restarts killed again. The job that is started anew must end with "
        "the same bits as one that nobody killed (of `export_pt2`, whose bits are its compiler's, any package), and "
        "leave the same files. Every column behind the kills must be zero.",
    ),
    "files": Part(
        files,
        300,
        "of all readers together",
        "Damaged files",
        "Files changed where their format has its joints: bytes, header entries, types, shapes and numbers of "
        "tensors; with checksums that were made anew as often as not. Each is read as it is and used once, or is an "
        "error that names the file, or the layer whose numbers overflow in use. The last four columns must be zero.",
    ),
    "guided": Part(
        guided,
        0,
        "seconds for each reader, of a fuzzer that is led by the lines it reaches (wants atheris)",
        "Damaged files, guided by coverage",
        "The same readers and changes, and libFuzzer's own, with atheris, which keeps a case where it reaches lines "
        "that none reached before. It is no part of what is installed for the tests: `pip install atheris` has "
        "wheels for Linux.",
    ),
    "calls": Part(
        threads,
        200,
        "of each kind of network, by 8 threads",
        "Threads",
        "Eight threads call one network at mixed timesteps. Each call must give, to the last bit, what one thread "
        "alone gets.",
    ),
    "faults": Part(
        faults,
        0,
        "1: inject every fault once (half an hour)",
        "Injected faults",
        "Recovered is the job's own result to the last bit, or an `OSError` that names the folder, and that result "
        "once the fault is over. Disks are file systems in memory that run full, or are mounted read-only. Clocks "
        "jump by decades, back too, and every file of a killed job is of 1970 or 2100. A folder is locked by a "
        "process that is killed then; two processes run the same job in it at once. Without a compiler, or with one "
        "that fails, PyTorch's own products compute the same with one warning and `torch.compile` says what lacks. A "
        "process is forked beside threads that run or compile the kernels, spawned, or a DataLoader's worker.",
    ),
    "minutes": Part(
        memory,
        0,
        "of load, sample, compile and export, a fifth for each alone and one for all in turns",
        "Memory",
        "The slope of resident memory over calls of one process, without the first third. What is left of a call is "
        "of others: `safetensors` (0.7, 0.8) keeps 64 bytes of each tensor that it reads, here of 275; `torch` "
        "(2.13) keeps the guards of each compilation in finalizers of what they watch, also after "
        "`torch._dynamo.reset()`, which is called here, and its generated code as a module; an export leaves what "
        "`torch` and `executorch` (1.4) remember of shapes and operators.",
    ),
}


def main() -> int:
    """Print a table for each part that is asked for; 1 where a number that must be zero is not."""
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    for option, part in PARTS.items():
        parser.add_argument(
            f"--{option}", type=int, default=0, help=f"{part.help} (where no part is named: {part.usual})"
        )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a Markdown file, in which the parts that ran are replaced")
    args = parser.parse_args()
    asked = [option for option in PARTS if getattr(args, option)]
    if not asked:
        asked = [option for option, part in PARTS.items() if part.usual]
        vars(args).update({option: PARTS[option].usual for option in asked})
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    wrong = 0
    for option in asked:
        with tempfile.TemporaryDirectory() as scratch:
            table = PARTS[option].find(args, Path(scratch))
        section = _section(option, args, table)
        print(section, *table.said, sep="\n", flush=True)
        wrong += len(table.said)
        if args.write is not None:
            args.write.write_text(_replaced(args.write.read_text() if args.write.exists() else "", option, section))
    return int(wrong > 0)


def _section(option: str, args: argparse.Namespace, table: Table) -> str:
    seed = f" --seed {args.seed}" if args.seed else ""
    machine = f"{os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}"
    part = PARTS[option]
    command = f"`python tests/faults --{option} {getattr(args, option)}{seed}` ({machine})"
    return f"## {part.title}\n\n{command}\n\n{fill(part.text, 120)}\n\n{table}\n"


def _replaced(page: str, option: str, section: str) -> str:
    """A page with a part's section in the place of the one that it had, or at its end."""
    title = re.escape(PARTS[option].title)
    older = re.compile(rf"^## {title}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if older.search(page):
        return older.sub(lambda _: f"{section}\n", page).rstrip() + "\n"
    return f"{page.rstrip()}\n\n{section}".lstrip()


if __name__ == "__main__":
    sys.exit(main())
