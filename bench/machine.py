"""What a measurement ran on: versions, processor, threads, load, and the memory of this process."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("pqcad_ao", "torch", "torchao", "diffusers", "executorch", "openvino", "nncf", "numpy")

# Instruction sets that decide how fast low-precision arithmetic can be, by their names in /proc/cpuinfo.
FEATURES = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Python's and the packages' versions; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int | None) -> int:
    """``threads``, or every available core for None.

    Raises:
        ValueError: below 1.
    """
    if threads is None:
        return available_cores()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(
            f"threads={threads!r}: allowed are whole numbers from 1, or None for the {available_cores()} here"
        )
    return threads


def _cpuinfo(*keys: str) -> str:
    """The first of these fields in /proc/cpuinfo; empty on systems without that file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = [line.partition(":") for line in lines]
    return next((value.strip() for name, _, value in fields if name.strip() in keys), "")


def cpu() -> dict[str, Any]:
    """The processor's name, the cores that this process may use, and the instruction sets that matter here."""
    flags = _cpuinfo("flags", "Features").split()
    return {
        "name": _cpuinfo("model name", "Hardware") or platform.processor() or platform.machine(),
        "cores": available_cores(),
        "features": [feature for feature in FEATURES if feature in flags],
    }


def loadavg() -> list[float]:
    """Runnable processes averaged over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in psutil.getloadavg()]


def describe(threads: int) -> dict[str, Any]:
    """The keys that every benchmark's JSON starts with."""
    return {"versions": versions(), "threads": threads, "cpu": cpu(), "loadavg": loadavg()}


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it started, or since :func:`reset_peak_rss`.

    Linux: VmHWM. ``getrusage`` would not do: its ``ru_maxrss`` of a fresh process starts at its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def reset_peak_rss() -> bool:
    """Start :func:`peak_rss_bytes` anew; False where the system cannot do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
