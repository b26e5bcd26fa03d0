"""One run at a time in a folder."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pqcad_ao.utils.files import digest, naming, sweep
from pqcad_ao.utils.locks import try_lock
from pqcad_ao.utils.processes import naming_the_lost, of_all, rank_and_world, wait_for_all

LOCK = ".pqcad.lock"

_mine: dict[tuple[str, int, int], int] = {}  # how often each folder is held, by the process and thread that hold it


@contextmanager
def only_run_in(folder: str | Path | None) -> Iterator[None]:
    """Keep other runs out of a folder meanwhile, and delete first what a killed one left unfinished there.

    Within a run it may be asked for again. Of several processes that share a run the first one does this for all.

    Args:
        folder: made if it is not there; None: nothing to keep.

    Raises:
        BlockingIOError: another process, or thread, is at work there; says which. OSError: the folder cannot be made or
            written; names it, also where the system's own error, of a full disk, does not.
    """
    if folder is None or rank_and_world()[0] != 0:
        yield
        return
    folder = Path(folder).absolute()
    held = (os.path.realpath(folder), os.getpid(), threading.get_ident())  # a forked child holds nothing
    if held in _mine:
        _mine[held] += 1
    else:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _hold(folder / LOCK)
        _mine[held] = 1
        sweep(folder)
    try:
        with naming(folder):
            yield
    finally:
        _mine[held] -= 1
        if not _mine[held]:
            del _mine[held]
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: who waits finds another file, or none
            os.close(descriptor)


@contextmanager
def shared_run(folder: str | Path | None, *alike: Any) -> Iterator[None]:
    """A run in a folder that is its own, by this process or by all of a process group together.

    Args:
        folder: as for :func:`only_run_in`; one that all processes see. alike: what each of them has to be given.

    Raises:
        ValueError: the processes were given different things or folders. ConnectionError: another process of the group
            ended, or did not come; BlockingIOError and OSError: as :func:`only_run_in`.
    """
    _, world = rank_and_world()
    if world == 1:
        with only_run_in(folder):
            yield
        return
    with naming_the_lost(folder), only_run_in(folder):
        if len({*of_all(digest(*alike))}) > 1:
            raise ValueError(
                f"the {world} processes were given different networks, settings or data: load the same in each and "
                "seed what is drawn; where each is to work by itself, make no process group"
            )
        if folder is not None and not all(of_all((Path(folder) / LOCK).is_file())):
            raise ValueError(f"{folder} is not the same for all processes: give a folder that they share")
        yield
        wait_for_all()  # the first one keeps the folder until all are done


def _hold(file: Path) -> int:
    """The descriptor of a lock file that is this process's now."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        if try_lock(descriptor) is False:
            owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BlockingIOError(
                f"{file.parent} is in use by {owner}: wait until it is done, or give another folder to this one"
            )
        try:
            current = os.stat(file).st_ino
        except FileNotFoundError:
            current = None
        if current == os.fstat(descriptor).st_ino:
            with suppress(OSError):  # a full disk keeps nobody out who has nothing to write
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)  # whoever held it has deleted it: there is another one, or none
