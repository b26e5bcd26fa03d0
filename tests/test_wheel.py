"""The wheel: it holds what the library reads and no more, and it runs away from the checkout."""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from test_ops_cpu_loader import ONE_CALL

import pqcad_ao
from pqcad_ao.ops.cpu.build import INSTRUCTION_SETS, library_name
from pqcad_ao.ops.cpu.build import source as kernels_source

ROOT = Path(__file__).parents[1]
COMMAND = "pqcad_command.py"  # beside the folders
FOLDERS = {"pqcad_ao": "pqcad_ao", **{name: f"pqcad_ao/{name}" for name in ("passes", "recipes", "bench")}}


def _run(*command: object, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=environment.get("PYTHONPATH"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built: setuptools leaves ``build/`` where it builds, and packs what an earlier build left."""
    folder = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", COMMAND):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without compiled kernels: that takes a minute."""
    return _built(source, tmp_path_factory.mktemp("wheel"), PQCAD_PURE_WHEEL="1")


@pytest.fixture(scope="module")
def with_kernels(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if platform.system() != "Linux" or shutil.which("g++") is None:
        pytest.skip("no g++ on Linux")
    return _built(source, tmp_path_factory.mktemp("with_kernels"))


def _built(source: Path, folder: Path, **environment: str) -> Path:
    """By the setuptools that is installed: an isolated build would fetch its own, and a test needs no network."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    _run(*pip, "--wheel-dir", folder, source, **environment)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _installed(wheel, tmp_path_factory.mktemp("installed"))


def _installed(wheel: Path, folder: Path) -> Path:
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder, wheel)
    return folder


def test_the_wheel_holds_every_module_and_what_they_read(source: Path, wheel: Path):
    expected = {
        f"{inside}/{path.relative_to(source / name).as_posix()}"
        for name, inside in FOLDERS.items()
        for path in (source / name).rglob("*")
        if path.suffix in (".py", ".yaml") or (name == "pqcad_ao" and path.is_file())
    }
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == expected | {COMMAND}
    assert wheel.stat().st_size < 7_000_000  # teacher 4.1 MB, its compressed form 0.7, features and statistics 1.9


def test_the_wheel_has_the_version_of_the_package_and_is_for_any_machine(wheel: Path):
    assert wheel.name == f"pqcad_ao-{pqcad_ao.__version__}-py3-none-any.whl"


def test_the_wheel_runs_away_from_the_checkout(installed: Path):
    code = (
        "import sys; import pqcad_ao.passes, pqcad_ao.recipes.demo; from pqcad_ao.models import load_model\n"
        "load_model('demo')[0], load_model('ddpm-cifar10')[0]\n"  # one reads the weights, the other a recipe's YAML
        "for name, module in sys.modules.items():\n"
        "    if name.split('.')[0] == 'pqcad_ao': print(module.__spec__.origin or list(module.__path__)[0])"
    )
    files = _run(sys.executable, "-c", code, PYTHONPATH=str(installed)).splitlines()
    assert len(files) > 40
    assert [file for file in files if not Path(file).is_relative_to(installed)] == []


def test_the_command_runs_away_from_the_checkout(installed: Path):
    pqcad = [sys.executable, installed / "bin" / "pqcad"]
    assert "compress" in _run(*pqcad, "--help", PYTHONPATH=str(installed))
    assert pqcad_ao.__version__ in _run(*pqcad, "--version", PYTHONPATH=str(installed))


# ------------------------------------------------------------------------------------------------ compiled kernels


@pytest.mark.slow
def test_a_wheel_brings_the_kernels_of_every_instruction_set_of_its_platform(wheel: Path, with_kernels: Path):
    assert with_kernels.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as pure, zipfile.ZipFile(with_kernels) as file:
        code = {name for name in pure.namelist() if ".dist-info/" not in name}
        libraries = {name for name in file.namelist() if ".dist-info/" not in name} - code
    sets = [chosen for chosen in INSTRUCTION_SETS.values() if chosen.machine == platform.machine()]
    assert libraries == {f"pqcad_ao/ops/cpu/{library_name(chosen, kernels_source())}.so" for chosen in sets}
    assert with_kernels.stat().st_size < wheel.stat().st_size + 500_000


@pytest.mark.slow
def test_what_it_brings_runs_without_a_compiler_and_without_a_cache(with_kernels: Path, tmp_path: Path):
    installed = _installed(with_kernels, tmp_path / "installed")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    said = _run(sys.executable, "-c", ONE_CALL, PYTHONPATH=str(installed), PATH=str(nothing), PQCAD_CACHE=str(nothing))
    assert "exact integers" in said
    assert list(nothing.iterdir()) == []


@pytest.mark.slow
def test_a_wheel_without_them_says_that_there_is_no_compiler(installed: Path, tmp_path: Path):
    code = f"import warnings; warnings.simplefilter('always')\n{ONE_CALL}"
    environment = {**os.environ, "PYTHONPATH": str(installed), "PATH": str(tmp_path), "PQCAD_CACHE": str(tmp_path)}
    environment.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=installed)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"could not be compiled, PyTorch's own products of dequantized weights.*no C\+\+ compiler", done.stderr
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_they_want_nothing_of_pytorch_but_its_stable_abi(with_kernels: Path, tmp_path: Path):
    """So that they run with a PyTorch other than the one of the build; nor do they say where that one lay."""
    with zipfile.ZipFile(with_kernels) as file:
        libraries = [file.extract(name, tmp_path) for name in file.namelist() if name.endswith(".so")]
    for library in libraries:
        wanted = _run("nm", "--dynamic", "--undefined-only", "--format=just-symbols", library).split()
        assert "torch_library_impl" in wanted
        assert [name for name in wanted if re.match(r"_ZN?K?(2at|3c10|5torch)", name)] == []
        assert str(Path(torch.__file__).parent).encode() not in Path(library).read_bytes()


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(source: Path, tmp_path: Path):
    """Built at another time from a copy in another folder; ``SOURCE_DATE_EPOCH`` is the time that the files get."""
    built = []
    for index in range(2):
        copy = shutil.copytree(source, tmp_path / f"source-{index}")
        for path in copy.rglob("*"):
            os.utime(path, (index * 10**6, index * 10**6))
        built.append(_built(copy, tmp_path / f"wheel-{index}", SOURCE_DATE_EPOCH="1700000000").read_bytes())
    assert built[0] == built[1]
