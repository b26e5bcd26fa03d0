"""Finding the CPU kernels: the switch, the compiler, and the folder that keeps what was compiled."""

import os
import shutil
import stat
import subprocess
import sys
import warnings
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pqcad_ao.ops.cpu import instructions, loader
from pqcad_ao.ops.cpu.build import AVX512, INSTRUCTION_SETS, InstructionSet
from pqcad_ao.ops.cpu.instructions import SWITCH
from pqcad_ao.utils import code_cache

AVX2 = INSTRUCTION_SETS["avx2"]


def test_the_switch_turns_them_off(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader._load.__wrapped__() == ""


@pytest.mark.parametrize("value", ["no", "off", "00", "true", "AVX2"])
def test_another_value_of_the_switch_is_refused(monkeypatch, value):
    monkeypatch.setenv(SWITCH, value)
    monkeypatch.setattr(instructions, "cpu_flags", lambda: {"avx2", "fma"})
    with pytest.raises(ValueError, match=rf"PQCAD_CPU_KERNELS='{value}' .*unset or 1 .*, avx2, 0 "):
        loader._load.__wrapped__()


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv(SWITCH, "avx-vnni")
    monkeypatch.setattr(instructions, "cpu_flags", lambda: {"avx2", "fma"})
    with pytest.raises(ValueError, match=r"'avx-vnni' .*: this processor has no avx_vnni; allowed are .*avx2"):
        loader._load.__wrapped__()


@pytest.mark.parametrize(
    ("flags", "value", "names"),
    [
        (f"{AVX512} avx2 avx512_bf16", "", ["AVX512-VNNI with BF16", "AVX512-VNNI", "AVX2"]),
        (f"{AVX512} avx2", "", ["AVX512-VNNI", "AVX2"]),
        (f"{AVX512} avx2", "avx2", ["AVX2"]),
        ("avx2 fma avx_vnni", "1", ["AVX-VNNI", "AVX2"]),
        ("avx2 fma avx512f", "", ["AVX2"]),
        ("fp asimd asimddp", "", ["NEON dotprod"]),
        ("avx", "", []),
    ],
)
def test_the_processor_and_the_switch_choose(monkeypatch, flags, value, names):
    monkeypatch.setenv(SWITCH, value)
    monkeypatch.setattr(instructions, "cpu_flags", lambda: set(flags.split()))
    assert [chosen.name for chosen in instructions.choose()] == names


@pytest.mark.parametrize("error", [RuntimeError("no g++ here"), FileNotFoundError(2, "no g++ here")])
def test_a_compiler_that_fails_is_a_warning(monkeypatch, tmp_path, error):
    def fail(*args):
        raise error

    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(instructions, "cpu_flags", lambda: {"avx2", "fma"})
    monkeypatch.setattr(loader, "compiled", fail)
    with pytest.warns(UserWarning, match=r"could not be compiled.*dequantized weights.*no g\+\+ here") as warned:
        assert loader._load.__wrapped__() == ""
    assert len(warned) == 1


def test_a_processor_without_the_instructions_is_a_warning(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(instructions, "cpu_flags", set)
    with pytest.warns(
        UserWarning, match=r"need one of AVX512-VNNI with BF16, AVX512-VNNI, .*AVX2.*four bytes a weight"
    ) as warned:
        assert loader._load.__wrapped__() == ""
    assert len(warned) == 1


def _a_library(said: dict[str, bytes]):
    """Stands in for ``loader._library``: what each instruction set's library says; a missing one does not compile."""

    def library(chosen):
        if chosen.name not in said:
            raise RuntimeError(f"unrecognized option for {chosen.name}")

        class Kernels:
            def __call__(self) -> bytes:
                return said[chosen.name]

        return SimpleNamespace(pqcad_cpu_kernels=Kernels())

    return library


@pytest.mark.parametrize("said", [{"AVX2": b"AVX2"}, {"AVX-VNNI": b"", "AVX2": b"AVX2"}])
def test_what_the_compiler_does_not_know_leaves_the_next_instruction_set(monkeypatch, said):
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(instructions, "cpu_flags", lambda: {"avx2", "fma", "avx_vnni"})
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: None)
    monkeypatch.setattr(loader, "_library", _a_library(said))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader._load.__wrapped__() == "AVX2"


# ------------------------------------------------------------------------------------------------- keeping them


@pytest.fixture
def builds(monkeypatch, tmp_path) -> list[Path]:
    """Where libraries were compiled; ``tmp_path / "cache"`` is the user's folder, and a library returns a number."""
    made: list[Path] = []

    def compiled(text: str, chosen: InstructionSet, folder: Path) -> Path:
        made.append(folder)
        says = f'const char *pqcad_cpu_kernels(void) {{ return "{chosen.name}"; }}'
        (folder / "kernels.c").write_text(f"int answer(void) {{ return 42; }} {says}")
        command = ["gcc", "-shared", "-fPIC", str(folder / "kernels.c"), "-o", str(folder / "kernels.so")]
        subprocess.run(command, check=True)
        return folder / "kernels.so"

    monkeypatch.setattr(loader, "compiled", compiled)
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path / "cache"))
    return made


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")


@needs_gcc
def test_a_library_is_compiled_once_into_a_folder_of_the_users_own(builds, tmp_path):
    for _ in range(2):
        assert loader._library(AVX2).answer() == 42
    assert len(builds) == 1
    folder = tmp_path / "cache"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    assert not builds[0].exists()


@needs_gcc
@pytest.mark.parametrize("damage", [lambda code: code[:1000], lambda code: b"", lambda code: code + b"x"])
def test_a_damaged_library_is_compiled_again(builds, tmp_path, damage):
    loader._library(AVX2)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.unlink()  # a new file: the old one is mapped into this process
    path.write_bytes(damage(whole))
    assert loader._library(AVX2).answer() == 42
    assert len(builds) == 2
    assert path.read_bytes() == whole


@needs_gcc
@pytest.mark.parametrize("whose", ["folder", "file"])
def test_what_another_user_planted_is_not_run(builds, tmp_path, monkeypatch, whose):
    loader._library(AVX2)
    folder = tmp_path / "cache"
    (path,) = folder.iterdir()
    if os.geteuid() == 0:
        os.chown(folder if whose == "folder" else path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.warns(UserWarning, match=r"compiles the CPU kernels anew.*belongs to user.*PQCAD_CACHE"):
        assert loader._library(AVX2).answer() == 42
    assert len(builds) == 2


@needs_gcc
def test_a_folder_that_others_may_write_is_not_used(builds, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.warns(UserWarning, match=r"other users may write into .*chmod go-w"):
        assert loader._library(AVX2).answer() == 42
    assert list((tmp_path / "cache").iterdir()) == []


@needs_gcc
def test_without_a_cache_the_library_is_compiled_all_the_same(builds, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match=r"cannot keep them.*exists"):
        assert loader._library(AVX2).answer() == 42


@needs_gcc
def test_each_torch_and_instruction_set_has_a_library_of_its_own(builds, monkeypatch):
    loader._library(AVX2)
    monkeypatch.setattr(torch, "__version__", "9.9")
    loader._library(AVX2)
    assert len(builds) == 2
    loader._library(INSTRUCTION_SETS["avx-vnni"])
    assert len(builds) == 3


# ---------------------------------------------------------------------------------------------- those of a wheel


@pytest.fixture
def shipped(builds, monkeypatch, tmp_path) -> Path:
    """Where the package's own library for AVX2 lies, which answers with a number of its own."""
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    path = tmp_path / f"{loader.library_name(AVX2, loader.source())}.so"
    (tmp_path / "shipped.c").write_text("int answer(void) { return 7; }")
    subprocess.run(["gcc", "-shared", "-fPIC", str(tmp_path / "shipped.c"), "-o", str(path)], check=True)
    return path


@needs_gcc
def test_what_the_wheel_brought_is_neither_compiled_nor_kept(shipped, builds, tmp_path):
    assert loader._library(AVX2).answer() == 7
    assert builds == []
    assert not (tmp_path / "cache").exists()


@needs_gcc
@pytest.mark.parametrize("other", ["sources", "instruction set", "ABI", "file"])
def test_what_does_not_fit_is_compiled(shipped, builds, monkeypatch, other):
    """Made of other sources, for other instructions, or of symbols that this PyTorch has not; or no library at all."""
    wanted = AVX2
    if other == "sources":
        monkeypatch.setattr(loader, "source", lambda: "another text")
    elif other == "instruction set":
        wanted = INSTRUCTION_SETS["neon-dotprod"]
    elif other == "ABI":
        shipped.with_suffix(".c").write_text(
            "int torch_of_tomorrow(void); int answer(void) { return torch_of_tomorrow(); }"
        )
        command = ["gcc", "-shared", "-fPIC", str(shipped.with_suffix(".c")), "-o", str(shipped)]
        subprocess.run(command, check=True)
    else:
        shipped.write_bytes(b"no library")
    assert loader._library(wanted).answer() == 42
    assert len(builds) == 1


@needs_gcc
def test_another_processor_with_the_same_home_takes_what_it_has(builds, monkeypatch):
    """Each process chooses anew, and what another processor wanted stays in the cache beside it."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: None)
    for flags, name in 2 * ((f"{AVX512} avx2", "AVX512-VNNI"), ("avx2 fma", "AVX2")):
        monkeypatch.setattr(instructions, "cpu_flags", lambda flags=flags: set(flags.split()))
        assert loader._load.__wrapped__() == name
    assert len(builds) == 2


def test_without_a_folder_for_torchs_own_compiler_the_import_says_what_to_set():
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": "/proc/nothing"}
    code = [sys.executable, "-c", "import pqcad_ao"]
    result = subprocess.run(code, capture_output=True, text=True, env=environment, check=False)
    assert "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written" in result.stderr.splitlines()[-1]


ONE_CALL = """
import torch
from pqcad_ao import ops
x = torch.ones(1, 8, 4, 4, dtype=torch.int8)
weight = torch.full((4, 36), 0x11, dtype=torch.uint8)
y = torch.ops.pqcad.conv2d(
    x, weight, torch.ones(4), torch.ones(1, 1), None, 4, [8], [3, 3], [1, 1], [1, 1], [1, 1], 1, torch.float32, 4)
assert y[0, 0, 1, 1] == 72 and y[0, 0, 0, 0] == 32, y
print(ops.arithmetic())
"""


def test_without_them_pytorch_multiplies_and_says_so(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    result = subprocess.run([sys.executable, "-c", ONE_CALL], capture_output=True, text=True, check=True)
    assert "floating-point multiply-accumulates, dequantized once" in result.stdout


def test_a_child_that_is_forked_beside_a_compiling_thread_does_not_wait_for_it(monkeypatch):
    monkeypatch.setattr(loader, "_load", lambda: "")
    with loader._loading:
        process = get_context("fork").Process(target=loader.load)
        process.start()
        process.join(30)
        process.kill()
    process.join()
    assert process.exitcode == 0
