"""Faults of the machine around a job: what is injected, and that it is recovered from.

Recovered is: the job's own result to the last bit, or an OSError that names the folder and after which, the fault being
over, the job ends with that result. Anything else is an AssertionError.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

from jobs import EXPORTS, JOBS, run

from pqcad_ao.utils.runs import LOCK, only_run_in

DISK = 2**20  # bytes of a disk that fills up
SECONDS = 200  # that a process may take
Job = Callable[[Path], str]


class Skip(Exception):
    """This machine does not let the fault be injected; says why."""


# --------------------------------------------------------------------------------------------------------- running


def outcome(job: Job, folder: Path) -> str:
    """What a job in a process of its own came to: ``done`` and its result, an exception, or a signal."""
    answers = get_context("fork").SimpleQueue()

    def work() -> None:
        try:
            answers.put(f"done {run(job, folder)}")
        except Exception as error:
            answers.put(f"{type(error).__mro__[-4 if isinstance(error, OSError) else 0].__name__}: {error}")

    process = get_context("fork").Process(target=work)
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        return "hangs"
    return answers.get() if process.exitcode == 0 else f"ended by {signal.Signals(-process.exitcode).name}"


def said_or_done(found: str, expected: str, folder: Path) -> bool:
    """Whether a job ended as it should in spite of a fault; False: it said what is wrong. Neither is an error."""
    if found == expected:
        return True
    assert found.startswith("OSError: "), found
    assert folder.name in found, f"the folder is not named: {found}"
    return False


def in_python(script: str, *arguments: str, **environment: str) -> str:
    """What a new interpreter prints, which must end well."""
    command = [sys.executable, "-c", script, *arguments]
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    given.pop("CXX", None)  # another compiler than the one on the path
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=given, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """Mount a file system in memory at a folder."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        raise Skip(f"this user may not mount a file system: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


# ----------------------------------------------------------------------------------------------------------- disks


def full_disk(job: Job, shares: tuple[float, ...], scratch: Path) -> None:
    """Room for these shares of what the job leaves; when there is room for all, the job goes on."""
    expected = outcome(job, scratch / "undisturbed")
    needed = sum(path.stat().st_size for path in (scratch / "undisturbed").rglob("*") if path.is_file())
    stopped = 0
    for left in (int(share * needed) for share in shares):
        place = scratch / "full"
        with disk(place, f"size={max(DISK, 4 * needed)}"):
            filler, room = place / "filler", shutil.disk_usage(place).free
            filler.write_bytes(bytes(room - left))
            stopped += not said_or_done(outcome(job, place / "run"), expected, place)
            filler.unlink()
            found = outcome(job, place / "run")
            assert found == expected, f"with {left} bytes left, and room again: {found}"
    assert stopped, "no disk was full"


def read_only(job: Job, scratch: Path) -> None:
    """A folder that nobody may write to, and then may."""
    place = scratch / "read-only"
    expected = outcome(job, scratch / "undisturbed")
    with disk(place, "size=64m"):
        (place / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        assert not said_or_done(outcome(job, place / "run"), expected, place), "it was written"
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        found = outcome(job, place / "run")
        assert found == expected, found


# ----------------------------------------------------------------------------------------------------------- clocks


def _with_a_jumping_clock(job: Job) -> Job:
    jumps = iter(range(10**9))

    def jumping(folder: Path) -> str:
        with patch("time.time", lambda: 1e9 * (next(jumps) % 4)):  # to 2001, 2033, 2065 and back to 1970
            return job(folder)

    return jumping


def clock_jumps(job: Job, scratch: Path) -> None:
    """A killed job goes on when all its files, and the lock that it left, are of 1970 or of 2100."""
    began = time.monotonic()
    expected = outcome(job, scratch / "undisturbed")
    took, folder = time.monotonic() - began, scratch / "jumped"
    for share, stamp in ((0.4, 0), (0.8, 4102444800)):
        process = get_context("fork").Process(target=run, args=(_with_a_jumping_clock(job), folder))
        process.start()
        process.join(share * took)
        process.kill()
        process.join()
        folder.mkdir(exist_ok=True)
        (folder / LOCK).write_text("process 1 on this machine")  # a process that lives, and has nothing to do with it
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (stamp, stamp))
    found = outcome(_with_a_jumping_clock(job), folder)
    assert found == expected, found


# ------------------------------------------------------------------------------------------------------------ locks


def locked(job: Job, scratch: Path) -> None:
    """A folder in which another process is at work, which is killed then."""
    folder, expected = scratch / "locked", outcome(job, scratch / "undisturbed")
    held = get_context("fork").Event()

    def hold() -> None:
        with only_run_in(folder):
            held.set()
            time.sleep(SECONDS)

    holder = get_context("fork").Process(target=hold)
    holder.start()
    held.wait(SECONDS)
    found = outcome(job, folder)
    assert not said_or_done(found, expected, folder), "two were at work"
    assert f"in use by process {holder.pid}" in found, found
    holder.kill()
    holder.join()
    found = outcome(job, folder)
    assert found == expected, found


def two_at_once(job: Job, scratch: Path) -> None:
    """The same job twice in one folder: whichever is not refused has the result, and so has who comes later."""
    folder, expected = scratch / "shared", outcome(job, scratch / "undisturbed")
    answers = get_context("fork").SimpleQueue()
    both = [
        get_context("fork").Process(target=lambda: answers.put(outcome(job, folder)), daemon=False) for _ in range(2)
    ]
    for process in both:
        process.start()
    found = [answers.get() for _ in both]
    for process in both:
        process.join()
    ended = [said_or_done(one, expected, folder) for one in found]
    assert any(ended), found
    found = outcome(job, folder)
    assert found == expected, found


# -------------------------------------------------------------------------------------------- compilers and caches

NETWORK = """
import logging, sys, warnings
logging.disable(logging.CRITICAL)
import torch
torch.set_num_threads(1)
from pqcad_ao import ops
x = torch.ones(1, 8, 4, 4, dtype=torch.int8)
weight = torch.full((4, 36), 0x11, dtype=torch.uint8)
given = (x, weight, torch.ones(4), torch.ones(1, 1), None, 4, [8], [3, 3], [1, 1], [1, 1], [1, 1], 1, torch.float32, 4)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    y = [torch.ops.pqcad.conv2d(*given) for _ in range(3)][-1]
    assert y[0, 0, 1, 1] == 72 and y[0, 0, 0, 0] == 32, y
said = [str(one.message) for one in said if "kernel" in str(one.message)]
"""
WARNED_ONCE = """
assert len(said) == 1 and sys.argv[1] in said[0], said
"""
COMPILE = """
class Twice(torch.nn.Module):
    def forward(self, x):
        return x.sin() * 2 + 1
x = torch.ones(3)
try:
    y = torch.compile(Twice(), backend="pqcad", fullgraph=True)(x)
    print("compiled", float((y - (x.sin() * 2 + 1)).abs().max()) < 1e-6)
except Exception as error:
    print("said:", str(error).replace("\\n", " "))
"""


def no_compiler(scratch: Path) -> None:
    """Without a compiler PyTorch's own products compute the same and say so once; ``torch.compile`` says what lacks."""
    (scratch / "bin").mkdir()
    given = {"PATH": str(scratch / "bin"), **_caches(scratch)}
    script = NETWORK + WARNED_ONCE + COMPILE
    said = in_python(
        script, "could not be compiled, PyTorch's own products of dequantized weights run in their place", **given
    )
    assert "said:" in said, said
    assert "No working C++ compiler found" in said, said


def broken_compiler(scratch: Path) -> None:
    """The same with one that ends with an error."""
    (scratch / "bin").mkdir()
    for name in ("g++", "c++", "clang++", "gcc"):
        (scratch / "bin" / name).write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
        (scratch / "bin" / name).chmod(0o755)
    given = {"PATH": f"{scratch / 'bin'}:/usr/bin:/bin", **_caches(scratch)}
    said = in_python(NETWORK + WARNED_ONCE + COMPILE, "could not be compiled", **given)
    assert "said:" in said, said


def _caches(scratch: Path) -> dict[str, str]:
    return {"PQCAD_CACHE": str(scratch / "kernels"), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}


def unwritable_kernel_cache(scratch: Path) -> None:
    """Kernels are compiled all the same, and it is said once why they are not kept."""
    (scratch / "kernels").write_text("a file")
    in_python(NETWORK + WARNED_ONCE, "it cannot keep them", **_caches(scratch))


def read_only_kernel_cache(scratch: Path) -> None:
    """The same, in a home that may not be written."""
    with disk(scratch / "kernels", "size=1m,ro,mode=0700"):
        in_python(NETWORK + WARNED_ONCE, "it cannot keep them", **_caches(scratch))


def full_kernel_cache(scratch: Path) -> None:
    """The same, where there is no room for them."""
    with disk(scratch / "kernels", "size=8k,mode=0700"):
        in_python(NETWORK + WARNED_ONCE, "it cannot keep them", **_caches(scratch))


def unwritable_compiler_cache(scratch: Path) -> None:
    """torch makes its folder at import: an error that says which variable names another."""
    (scratch / "inductor").write_text("a file")
    script = "try:\n    import pqcad_ao\n    print('imported')\nexcept OSError as error:\n    print(error)"
    said = in_python(script, **_caches(scratch))
    assert "imported" in said or "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written" in said, said


def two_compilations(scratch: Path) -> None:
    """Two processes compile kernels and a network at once, into one empty cache."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", **_caches(scratch)}
    command = [sys.executable, "-c", NETWORK + "assert not said, said\n" + COMPILE]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=given) for _ in range(2)]
    said = [process.communicate(timeout=SECONDS)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said == ["compiled True\n"] * 2, said
    left = sorted(path.name for path in (scratch / "kernels").iterdir())
    assert [path for path in left if not path.endswith(".so")] == [], left


# -------------------------------------------------------------------------------------------------------- processes

IN_PROCESSES = """
import multiprocessing, sys, threading, time
import torch
from torch.utils.data import DataLoader, Dataset
from pqcad_ao.ops.cpu import loader

torch.set_num_threads(2)
x = torch.randn(2, 64, 64, 64, generator=torch.Generator().manual_seed(0))
grid = (torch.full((2, 1), 0.1), torch.full((2, 1), -8), [64], 4, 1)
how = sys.argv[1]


def total():  # in several threads, where the process has them
    return int(torch.ops.pqcad.quantize(x, *grid).sum())


def put(results):
    results.put(total())


class Rows(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return total()


def in_a_process(start):
    context = multiprocessing.get_context(start)
    results = context.Queue()
    process = context.Process(target=put, args=(results,), daemon=True)
    process.start()
    return [results.get(timeout=60)]


if __name__ == "__main__":
    if how == "fork beside a compiler":
        compiling, compiled = threading.Event(), loader.compiled
        loader.compiled = lambda *given: (compiling.set(), time.sleep(0.5), compiled(*given))[-1]
        thread = threading.Thread(target=total)
        thread.start()
        assert compiling.wait(60)
    elif how == "fork beside a thread":
        thread = threading.Thread(target=lambda: [total() for _ in range(50)])
        total()
        thread.start()
    if how == "DataLoader":
        here = [total()] * 2
        there = [int(value) for value in DataLoader(Rows(), num_workers=2, timeout=60)]
    else:
        here = [total()] if how in ("fork", "spawn") else None
        there = in_a_process(how.split()[0])
    print(here is None or here == there, there == [total()] * len(there))
"""


def in_processes(how: str, scratch: Path) -> None:
    """A process begun after, or while, the kernels run gets the same and does not wait for threads it has not."""
    script = scratch / "script.py"
    script.write_text(IN_PROCESSES)
    caches = _caches(scratch) if "compiler" in how else {}
    command, given = [sys.executable, str(script), how], {**os.environ, "OMP_NUM_THREADS": "2", **caches}
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=given, check=False)
    assert result.stdout == "True True\n", result.stdout + result.stderr[-2000:]


# ------------------------------------------------------------------------------------------------------------ table


def _of(inject: Callable[..., None], *first: object) -> Callable[[Path], None]:
    return lambda scratch: inject(*first, scratch)


WAYS = ("fork", "fork beside a thread", "fork beside a compiler", "spawn", "DataLoader")
FAULTS: dict[str, dict[str, Callable[[Path], None]]] = {
    "full disk": {
        **{name: _of(full_disk, job, (0, 0.1, 0.5, 0.9)) for name, job in JOBS.items()},
        "export_pte": _of(full_disk, EXPORTS["export_pte"], (0.5,)),
    },
    "read-only folder": {name: _of(read_only, job) for name, job in {**JOBS, **EXPORTS}.items()},
    "clock jumps": {name: _of(clock_jumps, job) for name, job in JOBS.items()},
    "locked folder": {name: _of(locked, job) for name, job in JOBS.items()},
    "two at work in a folder": {name: _of(two_at_once, job) for name, job in JOBS.items()},
    "missing compiler": {"none": no_compiler, "one that fails": broken_compiler},
    "unwritable cache": {
        "of kernels": unwritable_kernel_cache,
        "of kernels, read-only": read_only_kernel_cache,
        "of kernels, full": full_kernel_cache,
        "of torch": unwritable_compiler_cache,
    },
    "two compile at once": {"kernels and network": two_compilations},
    "processes": {how: _of(in_processes, how) for how in WAYS},
}


def inject(kind: str, name: str, scratch: Path | None = None) -> str:
    """Inject one fault; "" where it was recovered from, else what became of it.

    Raises:
        Skip: it cannot be injected on this machine.
    """
    with tempfile.TemporaryDirectory(prefix="pqcad-fault-", dir=scratch) as folder:
        try:
            FAULTS[kind][name](Path(folder))
        except Skip:
            raise
        except Exception as error:
            return f"{kind}, {name}: {type(error).__name__}: {error}"
    return ""
