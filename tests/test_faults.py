"""A part of ``python tests/faults`` with every run of the tests, and far more of it with the slow ones."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "faults"))

from fuzz import READERS, SLOW_READERS, fuzz
from jobs import EXPORTS, JOBS
from kills import kill

QUICK_KILLS = {"C_QC": 2, "C_DC": 1, "save_model": 2}
QUICK_FILES = {name: 20 if name == "load_model" else 40 for name in READERS}


@pytest.mark.parametrize("name", QUICK_KILLS)
def test_a_few_kills(name, tmp_path):
    found = kill(name, JOBS[name], QUICK_KILLS[name], tmp_path)
    assert found.sound, found


@pytest.mark.parametrize("name", READERS)
def test_a_few_changed_files(name, tmp_path):
    counts, complaints = fuzz(name, READERS[name], QUICK_FILES[name], tmp_path / "files")
    assert counts["read"] + counts["named"] == QUICK_FILES[name], "\n".join(complaints)
    assert counts["named"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*JOBS, *EXPORTS])
def test_many_kills(name, tmp_path):
    found = kill(name, {**JOBS, **EXPORTS}[name], 12, tmp_path, seed=1)
    assert found.sound, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*READERS, *SLOW_READERS])
def test_many_changed_files(name, tmp_path):
    files = 625 if name in READERS else 50
    counts, complaints = fuzz(name, {**READERS, **SLOW_READERS}[name], files, tmp_path / "files", seed=1)
    assert counts["read"] + counts["named"] == files, "\n".join(complaints)
