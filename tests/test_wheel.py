"""The wheel: it holds what the library reads and no more, and it runs away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pqcad_ao

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
    for name in ("pyproject.toml", "README.md", "LICENSE", COMMAND):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the setuptools that is installed: an isolated build would fetch its own, and a test needs no network."""
    return _built(source, tmp_path_factory.mktemp("wheel"))


def _built(source: Path, folder: Path, **environment: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    _run(*pip, "--wheel-dir", folder, source, **environment)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
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


def test_the_wheel_has_the_version_of_the_package(wheel: Path):
    assert wheel.name.split("-")[1] == pqcad_ao.__version__


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
