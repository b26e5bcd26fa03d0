"""How the CPU kernels are compiled for an instruction set: by the process that first wants them, or for a wheel.

Only what Python brings along is imported, and nothing of this package: ``setup.py`` reads this file.
"""

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class InstructionSet:
    """What a file of primitives in this folder is compiled for, ``primitives.h`` says which.

    Attributes:
        name: as the kernels' library says it. machine: whose it is, as ``platform.machine`` calls it.
        features: that a processor must have, as /proc/cpuinfo calls them. options: of the compiler.
    """

    name: str
    machine: str
    features: frozenset[str]
    options: tuple[str, ...]


def _x86(name: str, features: str, *options: str) -> InstructionSet:
    return InstructionSet(name, "x86_64", frozenset(features.split()), ("-march=x86-64", "-mfma", *options))


AVX512 = "fma avx512f avx512bw avx512dq avx512vl avx512_vnni"
OF_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
# The fastest first. Code for the smaller sets may not hold instructions of the larger ones, even where they are there.
INSTRUCTION_SETS = {
    "avx512-bf16": _x86("AVX512-VNNI with BF16", f"{AVX512} avx512_bf16", *OF_AVX512, "-mavx512bf16"),
    "avx512-vnni": _x86("AVX512-VNNI", AVX512, *OF_AVX512),
    "avx-vnni": _x86("AVX-VNNI", "fma avx2 avx_vnni", "-mavx2", "-mavxvnni"),
    "avx2": _x86("AVX2", "fma avx2", "-mavx2"),
    "neon-dotprod": InstructionSet(
        "NEON dotprod", "aarch64", frozenset({"asimd", "asimddp"}), ("-march=armv8.2-a+dotprod",)
    ),
}

OPTIMIZED = ("-std=c++20", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-tree-loop-vectorize", "-w")
LEAST_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11: the stable ABI of it is used, and nothing newer
LIBRARY = (*OPTIMIZED, "-DNDEBUG", "-fPIC", "-shared", LEAST_TORCH)


def source() -> str:
    """The kernels as one text, every header in its place: a library's name goes by all of it, and by no path."""
    return _expand("operators.cpp", set())


def _expand(name: str, included: set[str]) -> str:
    """The file ``name`` of this folder, with the folder's headers in place of their first ``#include``."""
    included.add(name)
    lines = [f'#line 1 "{name}"']  # so that a compiler's messages and a debugger name the file
    for number, line in enumerate((FOLDER / name).read_text().splitlines(), 1):
        header = re.fullmatch(r'#include "(.+)"', line)
        if header and header[1] not in included:
            lines += [_expand(header[1], included), f'#line {number + 1} "{name}"']
        else:
            lines.append("" if header or line == "#pragma once" else line)
    return "\n".join(lines)


def library_name(instructions: InstructionSet, text: str, *facts: str) -> str:
    """What the library of ``text`` is called, by all that its code depends on, and by ``facts``."""
    content = repr((text, instructions.name, instructions.options, LIBRARY, *facts))
    return f"kernels-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def compiler() -> list[str]:
    """The command that compiles C++: ``CXX``, or what is installed.

    Raises:
        FileNotFoundError: nothing is.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else (["g++"], ["clang++"], ["c++"]):
        if shutil.which(command[0]):
            return command
    raise FileNotFoundError(f"no C++ compiler: {named[0] if named else 'g++ or clang++'} is not installed")


def compiled(text: str, instructions: InstructionSet, folder: Path) -> Path:
    """The library that ``text`` compiles to for an instruction set, made in ``folder``.

    Raises:
        FileNotFoundError: there is no compiler.
        ModuleNotFoundError: PyTorch, whose headers are included, is not installed.
        RuntimeError: the compiler fails.
    """
    found = importlib.util.find_spec("torch")  # not imported: a build of the wheel wants its headers only
    if found is None or found.origin is None:
        raise ModuleNotFoundError("PyTorch is not installed: the kernels are compiled with its headers")
    torch = Path(found.origin).parent
    file, library = folder / "kernels.cpp", folder / "kernels.so"
    file.write_text(text)
    # without the folder's name, which the headers' checks would say
    headers = ("-isystem", str(torch / "include"), f"-ffile-prefix-map={torch}=torch")
    linked = (f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(library))
    command = [*compiler(), *LIBRARY, *instructions.options, *headers, str(file), *linked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ends with {done.returncode}: {done.stderr[-2000:]}")
    return library
