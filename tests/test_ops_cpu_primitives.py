"""The CPU kernels by instruction set: intrinsics in one file each, the same loops around all, registers kept."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from pqcad_ao.ops.cpu import loader

FOLDER = Path(loader.__file__).parent
SOURCES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h"))
INSTRUCTION_SETS = ["avx512.h"]  # beside generic.h, which says what each of their primitives means
TESTS = Path(__file__).with_name("test_ops_cpu.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_intrinsics_are_in_the_file_of_their_instruction_set(path):
    intrinsics = re.findall(r"_mm\w*|__m\d+\w*|__mmask\d+|\w+intrin\.h|arm_neon\.h", path.read_text())
    assert bool(intrinsics) == (path.name in INSTRUCTION_SETS), intrinsics


def _primitives(name: str) -> set[str]:
    """The constants, types and functions that a file of primitives defines."""
    text = (FOLDER / name).read_text()
    constants = re.findall(r"^constexpr [\w ]+\W+(\w+) =", text, re.MULTILINE)
    types = re.findall(r"^using (\w+) =|^typedef \w+ (\w+) __attribute__", text, re.MULTILINE)
    functions = re.findall(r"^(?:template <int NR> )?(?:inline|constexpr) [\w ]+ (\w+)\(", text, re.MULTILINE)
    return {*constants, *(a or b for a, b in types), *functions}


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_an_instruction_set_states_every_primitive_and_no_other(name):
    assert len(_primitives("generic.h")) > 30
    assert _primitives(name) == _primitives("generic.h")


def test_what_is_compiled_holds_every_file_once():
    """The cache of compiled libraries goes by this text: a changed header has to change it."""
    lines = loader.source().splitlines()
    own = re.compile('#include "|#pragma once')
    assert not list(filter(own.match, lines))
    for path in SOURCES:
        assert lines.count(f'#line 1 "{path.name}"') == 1
        assert {line for line in path.read_text().splitlines() if not own.match(line)} <= set(lines)


# ------------------------------------------------------------------------------------------- plain C++, any processor

WITH_LIBRARY = """
import ctypes, sys
import pytest
from pqcad_ao.ops.cpu import loader
library = ctypes.CDLL(sys.argv[1])
library.pqcad_cpu_kernels.restype = ctypes.c_char_p
loader.load = lambda: library.pqcad_cpu_kernels().decode()
assert loader.load() == "plain C++"
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_loops_are_as_exact_with_primitives_in_plain_cpp(tmp_path):
    """A second instruction set is a file of primitives: here one of other sizes, of signed bytes, and of no vectors."""
    text, library = tmp_path / "kernels.cpp", tmp_path / "kernels.so"
    text.write_text(loader.source())
    options = ["-std=c++20", "-O2", "-DPQCAD_GENERIC", "-shared", "-fPIC", "-fopenmp"]
    options += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    options += [argument for path in include_paths() for argument in ("-isystem", path)]
    options += [f"-L{path}" for path in library_paths()]
    subprocess.run(["g++", str(text), *options, "-ltorch_cpu", "-lc10", "-o", str(library)], check=True)
    chosen = ["-p", "no:cacheprovider", str(TESTS), "-k", "equals or exact or addends or at_once or threads or refused"]
    command = [sys.executable, "-c", WITH_LIBRARY, str(library), *chosen]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert re.search(r"^\d\d passed, \d+ deselected", result.stdout, re.MULTILINE), result.stdout


# ------------------------------------------------------------------------------------------------- the innermost loop


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_the_sums_of_the_innermost_product_stay_in_registers():
    """Where a compiler keeps them in memory, the products are three times slower and no less exact."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not loader.load():
            pytest.skip("this machine has no AVX512-VNNI, or no C++ compiler")
    library = loader._library()._name
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", library]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.findall(r"^[0-9a-f]+ <.*\bproduct<(\d+), (\d+)>.*>:\n((?:.+\n)+)", listing, re.MULTILINE)
    assert {(rows, width) for rows, width, _ in functions} == {("6", "4"), ("8", "3"), ("12", "2"), ("24", "1")}
    for rows, width, body in functions:
        assert body.count("vpdpbusd") == int(rows) * int(width)
        assert not re.findall(r".*\(%r[sb]p.*%zmm.*|.*%zmm.*\(%r[sb]p.*", body)
