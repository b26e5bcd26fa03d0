"""The CPU kernels: compiled on first use with the toolchain that Inductor needs, kept in Inductor's cache."""

import ctypes
import functools
import os
import threading
import warnings
from pathlib import Path

SWITCH = "PQCAD_CPU_KERNELS"  # set to 0, the reference kernel runs in their place


_loading = threading.Lock()


def load() -> str:
    """Compile or find the kernels and register them; what they multiply with, or "" where there are none.

    Says in a warning, once, why there are none: a machine without the instructions, or no compiler. The reference
    kernel then goes on computing the same.
    """
    with _loading:  # a thread that comes second waits for the first one's compiler
        return _load()


@functools.cache
def _load() -> str:
    if os.environ.get(SWITCH) == "0":
        return ""
    try:
        # private: torch's own extension builder would want ninja, and has no cache that two processes can share
        from torch._inductor.codecache import CppCodeCache

        source = (Path(__file__).parent / "cpu.cpp").read_text()
        library = CppCodeCache.load(source)
        library.pqcad_cpu_kernels.restype = ctypes.c_char_p
        instructions = library.pqcad_cpu_kernels().decode()
    except Exception as error:  # a missing compiler, a cache folder that cannot be written: each has its own type
        warnings.warn(
            f"the CPU kernels could not be compiled, the slower reference kernel runs in their place: {error}",
            stacklevel=4,
        )
        return ""
    if not instructions:
        warnings.warn(
            "this CPU has no AVX512-VNNI, which the CPU kernels need: the slower reference kernel runs in their place",
            stacklevel=4,
        )
    return instructions
