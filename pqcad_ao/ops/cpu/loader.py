"""The CPU kernels: compiled on first use with the toolchain that Inductor needs, kept in Inductor's cache."""

import ctypes
import functools
import os
import re
import threading
import warnings
from pathlib import Path

SWITCH = "PQCAD_CPU_KERNELS"  # set to 0, the reference kernel runs in their place


_loading = threading.Lock()


def source() -> str:
    """The kernels as one text, every header in its place: the cache goes by all that is compiled, and by no path."""
    return _expand("operators.cpp", set())


def _expand(name: str, included: set[str]) -> str:
    """The file ``name`` of this folder, with the folder's headers in place of their first ``#include``."""
    included.add(name)
    lines = [f'#line 1 "{name}"']  # so that a compiler's messages and a debugger name the file
    for number, line in enumerate((Path(__file__).parent / name).read_text().splitlines(), 1):
        header = re.fullmatch(r'#include "(.+)"', line)
        if header and header[1] not in included:
            lines += [_expand(header[1], included), f'#line {number + 1} "{name}"']
        else:
            lines.append("" if header or line == "#pragma once" else line)
    return "\n".join(lines)


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

        library = CppCodeCache.load(source())
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
