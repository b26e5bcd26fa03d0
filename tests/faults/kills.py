"""SIGKILL at random moments: the job that is started again must end with the same bits and leave the same files."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from jobs import run


@dataclass
class Kills:
    """What became of one job's kills; every count but that of the kills must be zero.

    Attributes:
        kills: that met the job before it was done. failed: restarts that raised or ended by a signal.
        other_bits: ended with another result. other_files: left other files than a run that nobody killed.
    """

    job: str
    kills: int = 0
    failed: int = 0
    other_bits: int = 0
    other_files: int = 0

    @property
    def sound(self) -> bool:
        return not (self.failed or self.other_bits or self.other_files)


def _start(job: Callable[[Path], str], folder: Path, answer: Path):
    def work() -> None:
        answer.write_text(run(job, folder))

    process = get_context("fork").Process(target=work)
    process.start()
    return process


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def kill(name: str, job: Callable[[Path], str], kills: int, scratch: Path, seed: int = 0) -> Kills:
    """Kill a job at ``kills`` random moments; after one in three, once more before it may go on to its end."""
    moments, found, answer = random.Random(f"{name} {seed}"), Kills(name), scratch / "answer"
    begin = time.monotonic()
    undisturbed = _start(job, scratch / "undisturbed", answer)
    undisturbed.join()
    if undisturbed.exitcode != 0:
        raise RuntimeError(f"{name} does not run")
    seconds, expected, files = time.monotonic() - begin, answer.read_text(), _files(scratch / "undisturbed")
    while found.kills < kills:
        folder = scratch / "killed"
        for _ in range(1 + (moments.random() < 1 / 3)):
            answer.unlink(missing_ok=True)
            process = _start(job, folder, answer)
            process.join(moments.uniform(0, seconds))
            found.kills += process.exitcode is None
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        answer.unlink(missing_ok=True)
        process = _start(job, folder, answer)
        process.join()
        found.failed += process.exitcode != 0
        if process.exitcode == 0:
            found.other_bits += answer.read_text() != expected
            found.other_files += _files(folder) != files
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(scratch / "undisturbed")
    return found
