"""The CPU kernels: out of the wheel, or compiled on first use and kept in this user's cache."""

import contextlib
import ctypes
import functools
import os
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from pqcad_ao.ops.cpu.build import FOLDER, INSTRUCTION_SETS, InstructionSet, compiled, library_name, source
from pqcad_ao.ops.cpu.instructions import SWITCH, choose
from pqcad_ao.utils.code_cache import VARIABLE, cache_folder, find_code, keep_code
from pqcad_ao.utils.files import unfinished_folder

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
    """The kernels' library out of the wheel; else out of the cache, compiled first where it is not there."""
    text = source()
    built = FOLDER / f"{library_name(instructions, text)}.so"
    # its name says that it was made of these sources; it does not load where a system library is older, or a PyTorch
    # has another ABI, than where it was built
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(built))
    return _compiled_library(text, instructions)


def _compiled_library(text: str, instructions: InstructionSet) -> ctypes.CDLL:
    """The library out of the cache, compiled first where it is not there; without a cache, just compiled."""
    name = library_name(instructions, text, torch.__version__)  # whose headers go into it
    try:
        folder = cache_folder()
        path = find_code(folder, name)
    except OSError as error:
        _say_not_kept(error)
        with tempfile.TemporaryDirectory(prefix="pqcad-") as build:  # 0700; what is loaded stays when its name is gone
            return ctypes.CDLL(str(compiled(text, instructions, Path(build))))
    if path is None:
        with unfinished_folder(folder / name) as unfinished:  # where what a kill leaves is found and deleted
            path = keep_code(folder, name, compiled(text, instructions, unfinished))
    return ctypes.CDLL(str(path))


def _say_not_kept(error: OSError) -> None:
    warnings.warn(
        f"every process compiles the CPU kernels anew, for it cannot keep them: {error}. Set {VARIABLE} to a folder of "
        "your own",
        stacklevel=8,
    )
