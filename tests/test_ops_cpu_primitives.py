"""The CPU kernels by instruction set: intrinsics in one file each, the same loops around all, registers kept."""

import platform
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

from pqcad_ao.ops.cpu import build, instructions, loader
from pqcad_ao.utils.machine import cpu_flags

FOLDER = Path(loader.__file__).parent
SOURCES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h"))
# beside generic.h, which says what each of their primitives means
INSTRUCTION_SETS = ["avx512.h", "avx2.h", "neon.h"]
TESTS = Path(__file__).with_name("test_ops_cpu.py")
ALONE = Path(__file__).with_name("kernels")  # programs of the primitives and the loops without PyTorch


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
    lines = build.source().splitlines()
    own = re.compile('#include "|#pragma once')
    assert not list(filter(own.match, lines))
    for path in SOURCES:
        assert lines.count(f'#line 1 "{path.name}"') == 1
        assert {line for line in path.read_text().splitlines() if not own.match(line)} <= set(lines)


# ------------------------------------------------------------------------------------------- plain C++, any processor

WITH_LIBRARY = """
import ctypes, sys
import pytest
from pqcad_ao.ops.cpu import instructions, loader
from pqcad_ao.utils.machine import cpu_flags
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
    text.write_text(build.source())
    options = ["-std=c++20", "-O2", "-DPQCAD_GENERIC=4", "-shared", "-fPIC", build.LEAST_TORCH]
    options += [argument for path in include_paths() for argument in ("-isystem", path)]
    options += [f"-L{path}" for path in library_paths()]
    subprocess.run(["g++", str(text), *options, "-ltorch_cpu", "-o", str(library)], check=True)
    chosen = ["-p", "no:cacheprovider", str(TESTS), "-k", "equals or exact or addends or at_once or threads or refused"]
    command = [sys.executable, "-c", WITH_LIBRARY, str(library), *chosen]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert re.search(r"^\d\d passed, \d+ deselected", result.stdout, re.MULTILINE), result.stdout


# ------------------------------------------------------------------------------------- one program an instruction set


@dataclass(frozen=True)
class Build:
    """How programs are built for an instruction set, and what their innermost product has to be.

    Attributes:
        options: of the compiler. needs: features that a processor must have to run them.
        product: the instruction that multiplies. rows: of activations for each number of registers of weights.
        tools: prefix of the compiler's and objdump's name. emulator: that runs them elsewhere.
    """

    options: tuple[str, ...]
    needs: tuple[str, ...]
    product: str
    rows: dict[int, int]
    tools: str = ""
    emulator: str = ""


def _build(key: str, product: str, rows: dict[int, int], *options: str, tools: str = "", emulator: str = "") -> Build:
    chosen = build.INSTRUCTION_SETS[key]
    return Build((*chosen.options, *options), tuple(chosen.features), product, rows, tools, emulator)


TWO, FOUR = {1: 12, 2: 6}, {1: 24, 2: 12, 3: 8, 4: 6}
ON_ARM = platform.machine() == "aarch64"
BUILDS = {
    "AVX2": _build("avx2", "vpmaddubsw", {1: 8, 2: 4}),
    "AVX-VNNI": _build("avx-vnni", "vpdpbusd", TWO),
    # the same in the encoding of a processor with AVX512
    "AVX-VNNI as AVX512 encodes it": Build(
        (*build.INSTRUCTION_SETS["avx2"].options, "-mavx512vl", "-mavx512vnni"),
        ("avx2", "fma", "avx512vl", "avx512_vnni"),
        "vpdpbusd",
        TWO,
    ),
    "AVX512-VNNI": _build("avx512-vnni", "vpdpbusd", FOUR),
    "AVX512-VNNI with BF16": _build("avx512-bf16", "vpdpbusd", FOUR),
    "NEON dotprod": _build(
        "neon-dotprod",
        "sdot",
        {1: 12, 2: 8, 3: 6, 4: 4},
        "-static",
        tools="" if ON_ARM else "aarch64-linux-gnu-",
        emulator="" if ON_ARM else "qemu-aarch64",
    ),
}
# AVX2 is what most processors without AVX512 have; the others take minutes of a busy machine
EACH = pytest.mark.parametrize(
    "name", ["AVX2", *(pytest.param(n, marks=pytest.mark.slow) for n in BUILDS if n != "AVX2")]
)


def _program(name: str, source: str, folder: Path) -> Path:
    """A program of ``tests/kernels`` for an instruction set, with the optimizations that the kernels get."""
    how, program = BUILDS[name], folder / "program"
    compiler = f"{how.tools}g++"
    if shutil.which(compiler) is None or (how.tools == "" and (name[0] == "N") != ON_ARM):
        pytest.skip(f"no {compiler} for {name}")
    options = [*build.OPTIMIZED, f"-I{FOLDER}", f"-I{ALONE}", *how.options]
    subprocess.run([compiler, *options, str(ALONE / source), "-o", str(program)], check=True)
    return program


@EACH
@pytest.mark.parametrize("source", ["primitives.cpp", "sums.cpp"])
def test_primitives_and_sums_are_those_of_plain_cpp(name, source, tmp_path):
    how = BUILDS[name]
    runner = [how.emulator] if how.emulator else []
    if how.emulator and shutil.which(how.emulator) is None:
        pytest.skip(f"no {how.emulator}")
    if not how.emulator and not set(how.needs) <= cpu_flags():
        pytest.skip(f"this processor has no {name}")
    command = [*runner, str(_program(name, source, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, name.partition(" as ")[0]), done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- the innermost loop

MEMORY = r"\(%r[sb]p|\[(sp|x29)"  # on the stack, as x86 and ARM write it
VECTOR = r"%[yz]mm|\bq\d"  # whole registers: others may hold addresses


def _products(library: str | Path, objdump: str = "objdump") -> list[tuple[int, int, str]]:
    """Rows, registers of weights and instructions of every innermost product that takes `dot`."""
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.findall(r"^[0-9a-f]+ <.*\bproduct<(\d+), (\d+), true>.*>:\n((?:.+\n)+)", listing, re.MULTILINE)
    return [(int(rows), int(width), body) for rows, width, body in functions]


def _stay_in_registers(products: list[tuple[int, int, str]], how: Build) -> None:
    assert {(rows, width) for rows, width, _ in products} == {(rows, width) for width, rows in how.rows.items()}
    for rows, width, body in products:
        assert body.count(how.product) == rows * width
        moved = [line for line in body.splitlines() if re.search(MEMORY, line) and re.search(VECTOR, line)]
        assert moved == []


@EACH
def test_the_sums_of_the_innermost_product_stay_in_registers(name, tmp_path):
    """Where a compiler keeps them in memory, the products are three times slower and no less exact."""
    how = BUILDS[name]
    objdump = f"{how.tools}objdump"
    if shutil.which(objdump) is None:
        pytest.skip(f"no {objdump}")
    products = _products(_program(name, "sums.cpp", tmp_path), objdump)
    _stay_in_registers(products, how)
    if name in ("AVX2", "AVX-VNNI"):
        for _, _, body in products:  # nothing that only AVX512 has
            assert not re.search(r"%zmm|%ymm(1[6-9]|[23]\d)|%k\d", body)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_so_they_do_in_the_library_that_is_used():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = loader.load()
    if not name:
        pytest.skip("no kernels for this machine, or no C++ compiler")
    chosen = next(chosen for chosen in instructions.choose() if chosen.name == name)
    _stay_in_registers(_products(loader._library(chosen)._name), BUILDS[name])


# ------------------------------------------------------------------------------------------ all sets of this machine


@pytest.mark.slow
@pytest.mark.parametrize("key", build.INSTRUCTION_SETS)
def test_the_operators_on_every_instruction_set_of_this_machine(key, monkeypatch):
    if not build.INSTRUCTION_SETS[key].features <= cpu_flags():
        pytest.skip(f"this processor has no {key}")
    monkeypatch.setenv(instructions.SWITCH, key)
    files = [str(TESTS), str(TESTS.with_name("test_ops.py")), str(TESTS.with_name("test_not_finite.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *files]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout
