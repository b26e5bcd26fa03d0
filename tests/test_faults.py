"""A part of ``python tests/faults`` with every run of the tests, and far more of it with the slow ones."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "faults"))

from fuzz import READERS, SLOW_READERS, fuzz
from guided import guide, missing
from injected import FAULTS, Skip, inject
from jobs import EXPORTS, JOBS
from kills import kill
from memory import KINDS, grow

QUICK_KILLS = {"C_QC": 2, "C_DC": 1, "save_model": 2}
QUICK_FILES = {name: 20 if name == "load_model" else 40 for name in READERS}
QUICK_FAULTS = [
    *(("full disk", name) for name in ("C_QC", "C_DC", "save_model")),
    *((kind, "C_QC") for kind in ("read-only folder", "clock jumps", "locked folder", "two at work in a folder")),
    ("processes", "fork"),
]


def _inject(kind, name):
    try:
        assert inject(kind, name) == ""
    except Skip as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("kind", "name"), QUICK_FAULTS)
def test_a_few_faults(kind, name):
    _inject(kind, name)


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
@pytest.mark.parametrize("name", [*JOBS, *EXPORTS])
def test_many_kills(name, tmp_path):
    found = kill(name, {**JOBS, **EXPORTS}[name], 12, tmp_path, seed=1)
    assert found.sound, found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READERS, *SLOW_READERS])
def test_many_changed_files(name, tmp_path):
    files = 625 if name in READERS else 50
    counts, complaints = fuzz(name, {**READERS, **SLOW_READERS}[name], files, tmp_path / "files", seed=1)
    assert counts["read"] + counts["named"] == files, "\n".join(complaints)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, cases in FAULTS.items() for name in cases])
def test_every_fault(kind, name):
    _inject(kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_by_no_more_than_others_leave(kind, tmp_path):
    found = grow(kind, 30, tmp_path)
    assert found.sound, found


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_files_that_a_fuzzer_chooses(name, tmp_path):
    if missing():
        pytest.skip(missing())
    counts, complaints = guide(name, 20, tmp_path / "guided")
    assert counts["read"] + counts["named"] == sum(counts.values()), "\n".join(complaints)
