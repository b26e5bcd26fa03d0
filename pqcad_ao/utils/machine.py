"""What a measurement ran on: versions, processor and its peak, threads, and the memory of this process."""

import platform
import time
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from pqcad_ao.utils.checks import check_count
from pqcad_ao.utils.load import available_cores, loadavg

PACKAGES = (
    "pqcad_ao",
    "torch",
    "torchao",
    "diffusers",
    "executorch",
    "openvino",
    "nncf",
    "ncnn",
    "onnxruntime",
    "numpy",
)

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
# What a compiler may use in code that it makes for the processor it runs on, by the same names.
COMPILED_FOR = frozenset(
    {"sse4_1", "sse4_2", "popcnt", "movbe", "abm", "bmi1", "bmi2", "adx", "f16c", "fma", "avx", "avx2", "avx_vnni"}
    | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512ifma", "avx512vbmi", "avx512_vbmi2"}
    | {"avx512_bitalg", "avx512_vpopcntdq", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8"}
    | {"amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"}
)


def versions() -> dict[str, str | None]:
    """Python's and the versions of ``PACKAGES``; None for one that is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    installed["torch"] = torch.__version__  # with the build, which not every wheel's metadata says
    return installed


def check_threads(threads: int | None) -> int:
    """``threads``, or every available core for None.

    Raises:
        ValueError: below 1.
    """
    if threads is None:
        return available_cores()
    check_count("threads", threads, otherwise=f", or None for the {available_cores()} here")
    return threads


def check_device(text: str | torch.device) -> torch.device:
    """A device that this PyTorch can put tensors on.

    Raises:
        ValueError: no such device here.
    """
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(text)!r} cannot be used with torch {torch.__version__}: {reason}") from error
    return device


def _cpuinfo(*keys: str) -> str:
    """The first of these fields in /proc/cpuinfo; empty on systems without that file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = [line.partition(":") for line in lines]
    return next((value.strip() for name, _, value in fields if name.strip() in keys), "")


def cpu_flags() -> set[str]:
    """The features of this processor as /proc/cpuinfo calls them; none on systems without that file."""
    return set(_cpuinfo("flags", "Features").split())


def missing_features(built_for: Collection[str]) -> list[str]:
    """Those of ``COMPILED_FOR`` that a processor with the flags ``built_for`` has, and this one has not."""
    return sorted((COMPILED_FOR & set(built_for)) - cpu_flags())


def cpu() -> dict[str, Any]:
    """The processor's name, the cores that this process may use, and the instruction sets that matter here."""
    flags = cpu_flags()
    return {
        "name": _cpuinfo("model name", "Hardware") or platform.processor() or platform.machine(),
        "cores": available_cores(),
        "features": [feature for feature in FEATURES if feature in flags],
    }


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


def native_bf16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu()["features"])


def peak_gmacs() -> dict[str, float]:
    """Multiply-accumulates that this machine does now, in G/s, by type: fp32, int8, and bf16 where it has it.

    The better of a 1024³ matrix product and a 3×3 convolution of 256 channels at 16×16, batch 8, best of four each.
    """
    size, channels, batch, side = 1024, 256, 8, 16
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator)
    x = torch.randn(batch, channels, side, side, generator=generator).to(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, generator=generator)
    product, convolution = size**3, x.numel() * channels * 9
    a8, w8 = ((20 * value).clamp(-128, 127).to(torch.int8) for value in (a, w))
    x8 = (20 * x).clamp(0, 255).to(torch.uint8)
    kernels: list[tuple[str, int, Callable[[], Tensor]]] = [
        ("fp32", product, lambda: a @ a),
        ("fp32", convolution, lambda: torch.conv2d(x, w, padding=1)),
        ("int8", product, lambda: torch._int_mm(a8, a8)),
    ]
    if hasattr(torch.ops.onednn, "qconv2d_pointwise") and platform.machine() in ("x86_64", "AMD64"):
        kernels.append(("int8", convolution, _int8_convolution(x8, w8)))
    if native_bf16():
        a16, x16, w16 = a.bfloat16(), x.bfloat16(), w.bfloat16()
        kernels.append(("bf16", product, lambda: a16 @ a16))
        kernels.append(("bf16", convolution, lambda: torch.conv2d(x16, w16, padding=1)))
    peaks: dict[str, float] = {}
    for kind, macs, call in kernels:
        peaks[kind] = max(peaks.get(kind, 0.0), macs / min(timed(call, 4)) / 1e6)
    return peaks


def _int8_convolution(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """oneDNN's uint8 × int8 3×3 convolution as Inductor calls it. Checked with torch 2.13."""
    scale, zero_point = torch.ones(len(w)), torch.zeros(len(w), dtype=torch.int32)
    ones = [1, 1]  # stride, padding and dilation
    packed = torch.ops.onednn.qconv_prepack(w, scale, 1.0, 0, ones, ones, ones, 1, list(x.shape))
    weight = (packed, scale, zero_point, None, ones, ones, ones, 1)
    no_epilogue: list[Any] = []
    output = (1.0, 0, torch.float32, "none", no_epilogue, "")
    return lambda: torch.ops.onednn.qconv2d_pointwise(x, 1.0, 0, *weight, *output)


def timed(call: Callable[[], Any], iterations: int) -> list[float]:
    """Milliseconds of each of ``iterations`` calls, after one that is not counted."""
    call()
    times = []
    for _ in range(iterations):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times
