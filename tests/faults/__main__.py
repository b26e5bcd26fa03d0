"""What kills and damaged files do, counted: ``python tests/faults --kills 108 --files 5000``."""

import argparse
import logging
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the networks of the tests

import torch
from fuzz import FOUND, READERS, SLOW_READERS, fuzz
from jobs import EXPORTS, JOBS
from kills import kill
from tabulate import tabulate

SLOW_PART = 0.01  # of all files, for each reader that takes seconds for one


def main() -> int:
    """Print the table; 1 where a column that must be zero is not."""
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=5, help="of all jobs together (default: %(default)s)")
    parser.add_argument("--files", type=int, default=300, help="of all readers together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a Markdown file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    jobs, readers = {**JOBS, **EXPORTS}, {**READERS, **SLOW_READERS}
    killed, read, complaints = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name, job in jobs.items():
            found = kill(name, job, -(-args.kills // len(jobs)), Path(scratch), args.seed)
            killed.append([name, found.kills, found.failed, found.other_bits, found.other_files])
            print(found, flush=True)
        for name, reader in readers.items():
            files = -(-args.files // len(READERS)) if name in READERS else max(10, round(SLOW_PART * args.files))
            counts, said = fuzz(name, reader, files, Path(scratch) / "files", args.seed)
            read.append([name, files, *[counts[kind] for kind in FOUND]])
            complaints += said
            print(name, dict(counts), flush=True)
    text = _page(args, killed, read)
    print(text, *complaints, sep="\n")
    if args.write is not None:
        args.write.write_text(text)
    return int(any(any(row[2:]) for row in killed) or any(any(row[4:]) for row in read))


def _page(args: argparse.Namespace, killed: list[list], read: list[list]) -> str:
    command = f"python tests/faults --kills {args.kills} --files {args.files}"
    seed = f" with seed {args.seed}" if args.seed else ""
    machine = f"{os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}"
    kills = ["job", "kills", "restart failed", "other bits", "other files"]
    files = ["reader", "files", "read", "error names the file", "does not", "another exception", "hangs", "crashes"]
    return f"""# Kills and damaged files

`{command}`{seed} ({machine}).
Every column of the first table behind the kills must be zero, and the last four of the second one; the command ends
with 1 where they are not. `tests/test_faults.py` runs a part of it with every test run, `make test-slow` as much.

SIGKILL at random moments, one in three restarts killed again. The job that is started anew must end with the same bits
as one that nobody killed (of `export_pt2`, whose bits are its compiler's, any package), and leave the same files:

{tabulate([*killed, _sum(killed)], kills, tablefmt="github")}

Files changed where their format has its joints: bytes, header entries, types, shapes and numbers of tensors; with
checksums that were made anew as often as not. Each is read as it is and used once, or is an error that names the file:

{tabulate([*read, _sum(read)], files, tablefmt="github")}
"""


def _sum(rows: list[list]) -> list:
    return ["all", *[sum(column) for column in list(zip(*rows, strict=True))[1:]]]


if __name__ == "__main__":
    sys.exit(main())
