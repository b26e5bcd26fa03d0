"""What other programs do to this machine before something is timed, and meanwhile; what they disturb is retaken."""

import os
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import psutil

BUSY = 0.35  # of the cores, from which other programs are felt
TRIES = 3  # of a turn
WAIT = 1.0  # seconds before the next try

T = TypeVar("T")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loadavg() -> list[float]:
    """Runnable processes averaged over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in psutil.getloadavg()]


def busy() -> str | None:
    """What keeps this machine from honest timings, to be asked before own work begins; None where nothing does."""
    load, cores = loadavg()[0], available_cores()
    if not felt(load):
        return None
    return f"other programs kept {load:.1f} of {cores} cores busy over the last minute: times measured here say little"


def felt(others: float) -> bool:
    """Whether so many cores that others keep busy make a timing say little."""
    return others > BUSY * available_cores()


def undisturbed(turn: Callable[[], T], processes: Iterable[int] = ()) -> tuple[T, float]:
    """Call ``turn``, and anew while other programs keep more than ``BUSY`` of the cores busy, at most ``TRIES`` times.

    Args:
        processes: ids of those that work for ``turn``, beside this one.

    Returns:
        what the call returned that was disturbed least, and how many cores others kept busy during it. Counted in the
        system's ticks of about 10 ms: of a turn that is not much longer it is a rough number.
    """
    own = [psutil.Process(), *map(psutil.Process, processes)]
    tried: list[tuple[T, float]] = []
    while len(tried) < TRIES:
        if tried:
            time.sleep(WAIT)
        busy, used, begin = _busy_s(), _used_s(own), time.perf_counter()
        value = turn()
        wall = time.perf_counter() - begin
        others = max(0.0, (_busy_s() - busy) - (_used_s(own) - used)) / wall
        tried.append((value, others))
        if not felt(others):
            break
    return min(tried, key=lambda one: one[1])


def _busy_s() -> float:
    """Seconds that the cores which this process may use have worked for any program, other guests of the host too."""
    every = psutil.cpu_times(percpu=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(every))
    # a guest's seconds are in user's, too
    apart = ("idle", "iowait", "guest", "guest_nice")
    return sum(sum(every[core]) - sum(getattr(every[core], name, 0.0) for name in apart) for core in mine)


def _used_s(processes: list[psutil.Process]) -> float:
    """Seconds of processor time that these have used, with all their threads."""
    return sum(sum(process.cpu_times()[:2]) for process in processes if process.is_running())
