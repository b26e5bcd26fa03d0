"""The CPU kernels: compiled on first use with the toolchain that Inductor needs, kept in this user's cache."""

import ctypes
import functools
import hashlib
import os
import re
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from pqcad_ao.ops.cpu.instructions import INSTRUCTION_SETS, SWITCH, InstructionSet, choose
from pqcad_ao.utils.code_cache import VARIABLE, cache_folder, find_code, keep_code
from pqcad_ao.utils.files import unfinished_folder
from pqcad_ao.utils.machine import cpu_identity

IN_THEIR_PLACE = (
    "PyTorch's own products of dequantized weights run in their place, somewhat slower than full precision, and take "
    "four bytes a weight beside the packed ones"
)

_loading = threading.Lock()


def _in_a_forked_child() -> None:
    """The thread that compiles is not in a forked child, which would wait for it forever."""
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_forked_child)


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

    Says in a warning, once, why there are none: a machine without the instructions, or no compiler.

    Raises:
        ValueError: ``PQCAD_CPU_KERNELS`` asks for what is not there.
    """
    with _loading:  # a thread that comes second waits for the first one's compiler
        return _load()


@functools.cache
def _load() -> str:
    chosen, errors = choose(), []
    for instructions in chosen:
        try:
            library = _library(instructions)
            library.pqcad_cpu_kernels.restype = ctypes.c_char_p
            found = library.pqcad_cpu_kernels().decode()
            if not found:
                raise RuntimeError(f"the compiler knows no {instructions.name}")
        except Exception as error:  # no compiler, one that does not know the set, a full disk: each has its own type
            errors.append(error)
            continue
        # a forked child has its parent's pool of threads, but not the threads: it would wait for them forever
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))  # as DataLoader's workers do
        return found
    if errors:
        warnings.warn(f"the CPU kernels could not be compiled, {IN_THEIR_PLACE}: {errors[0]}", stacklevel=4)
    elif os.environ.get(SWITCH) != "0":
        names = ", ".join(known.name for known in INSTRUCTION_SETS.values())
        warnings.warn(f"the CPU kernels need one of {names}, this CPU has none: {IN_THEIR_PLACE}", stacklevel=4)
    return ""


def _library(instructions: InstructionSet) -> ctypes.CDLL:
    """The kernels' library out of the cache, compiled first where it is not there; without a cache, just compiled."""
    text = source()
    # what this processor's machine code depends on: a home folder may be shared by machines of several kinds
    facts = (text, instructions.name, instructions.options, torch.__version__, torch.__file__, cpu_identity())
    name = f"kernels-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"
    try:
        folder = cache_folder()
        path = find_code(folder, name)
    except OSError as error:
        _say_not_kept(error)
        with tempfile.TemporaryDirectory(prefix="pqcad-") as build:  # 0700; what is loaded stays when its name is gone
            return ctypes.CDLL(str(compiled(text, instructions.options, Path(build))))
    if path is None:
        with unfinished_folder(folder / name) as unfinished:  # where what a kill leaves is found and deleted
            path = keep_code(folder, name, compiled(text, instructions.options, unfinished))
    return ctypes.CDLL(str(path))


def _say_not_kept(error: OSError) -> None:
    warnings.warn(
        f"every process compiles the CPU kernels anew, for it cannot keep them: {error}. Set {VARIABLE} to a folder of "
        "your own",
        stacklevel=7,
    )


def compiled(text: str, options: tuple[str, ...], folder: Path) -> Path:
    """The library that ``text`` compiles to with the compiler's ``options``, made in ``folder``.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    # private, as torch's own extension builder would want ninja; checked with torch 2.13 and 2.14. Inductor's cache is
    # not used: it lies under a name that others can foresee, in a folder that they can make first
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions

    file = folder / "kernels.cpp"
    file.write_text(text)
    build = CppTorchDeviceOptions(device_type="cpu", extra_flags=options)  # the last one of a kind counts
    builder = CppBuilder(name="kernels", sources=str(file), BuildOption=build, output_dir=str(folder))
    builder.build()
    return Path(builder.get_target_file_path())
