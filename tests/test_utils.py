"""What every room may use: checks of numbers, files written whole, tensor files read back, assets."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pqcad_ao.utils import load, progress
from pqcad_ao.utils.assets import asset_path
from pqcad_ao.utils.checks import check_count, check_counts, is_whole
from pqcad_ao.utils.files import whole_file, write_whole
from pqcad_ao.utils.tensor_files import read_tensors, write_tensors


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, 64])
def test_what_is_no_whole_number_in_the_range_is_refused(value):
    assert not is_whole(value, 1, 63)
    with pytest.raises(ValueError, match=r"^n=.*: allowed are whole numbers from 1 to 63, or none$"):
        check_count("n", value, 1, 63, otherwise=", or none")


@pytest.mark.parametrize("value", [1, 63])
def test_both_ends_of_the_range_are_allowed(value):
    assert is_whole(value, 1, 63)
    check_count("n", value, 1, 63)


def test_the_first_count_that_is_wrong_is_named():
    check_counts(steps=1, rounds=2**70)
    with pytest.raises(ValueError, match=r"^rounds=0: allowed are whole numbers from 1$"):
        check_counts(steps=1, rounds=0, batch_size=-1)


def _write_half(path: Path) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_bytes(b"half of it")
        raise RuntimeError("killed")


def test_a_file_is_written_whole_or_stays_what_it_was(tmp_path: Path):
    path = tmp_path / "a.bin"
    write_whole(path, b"older")
    with pytest.raises(RuntimeError, match="killed"):
        _write_half(path)
    assert path.read_bytes() == b"older"
    write_whole(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert [*tmp_path.iterdir()] == [path]


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_bytes(b"older")
    link.symlink_to(target)
    write_whole(link, b"newer")
    assert link.is_symlink()
    assert target.read_bytes() == b"newer"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_tensor_file_gives_back_what_was_written(tmp_path: Path):
    tensors = {"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"kind": '{"n": 3}', "format": "pt"})
    read, header = read_tensors(tmp_path / "a.safetensors", "kind")
    assert header == {"n": 3}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("metadata", "content", "message"),
    [
        ({"kind": "1"}, 50, "no safetensors file or is damaged"),
        ({"other": "1", "another": "2"}, None, "holds no kind: its header names another, other"),
        (None, None, "holds no kind: its header names nothing"),
        ({"kind": "{"}, None, "is damaged: its header is no JSON"),
    ],
)
def test_a_tensor_file_that_is_damaged_or_of_another_kind_is_refused(tmp_path: Path, metadata, content, message):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(3)}, metadata)
    path.write_bytes(path.read_bytes()[:content])
    with pytest.raises(ValueError, match=rf"a\.safetensors.*{message}"):
        read_tensors(path, "kind")


def test_a_tensor_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "a.safetensors", "kind")


def test_the_embedded_assets_are_there():
    assert asset_path("fashion_mnist", "classifier.safetensors").is_file()


def test_a_busy_machine_says_so(monkeypatch):
    monkeypatch.setattr(load, "available_cores", lambda: 4)
    for found, expected in ((0.3, False), (1.3, False), (1.5, True), (9.0, True)):
        monkeypatch.setattr(load.psutil, "getloadavg", lambda found=found: (found, 0.0, 0.0))
        assert bool(load.busy()) == expected
    assert "kept 9.0 of 4 cores busy" in load.busy()


@pytest.mark.parametrize(
    ("used", "turns", "kept", "most"),
    [
        ([0.1, 0.0, 0.0], 1, 0, 0.1),  # others are not felt
        ([3.0, 0.1, 0.0], 2, 1, 0.1),  # the first turn is taken again
        ([3.0, 2.0, 2.5], 3, 1, 2.0),  # each was disturbed: the least counts, and says so
    ],
)
def test_a_disturbed_turn_is_taken_again(monkeypatch, used, turns, kept, most):
    """On a clock of its own: a turn takes a second, in which this program and others use what is said of the cores."""
    clock = {"now": 0.0, "busy": 0.0, "own": 0.0}

    def turn():
        number = int(clock["own"] / 1.5)
        clock["now"] += 1.0
        clock["own"] += 1.5
        clock["busy"] += 1.5 + used[number]
        return number

    monkeypatch.setattr(load, "available_cores", lambda: 4)
    monkeypatch.setattr(load, "_busy_s", lambda: clock["busy"])
    monkeypatch.setattr(load, "_used_s", lambda processes: clock["own"])
    monkeypatch.setattr(load.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(load.time, "sleep", lambda seconds: None)
    assert load.undisturbed(turn) == (kept, pytest.approx(most))
    assert clock["now"] == turns


def test_own_work_disturbs_nobody():
    """Of the real clocks: what this process and a child of it use is no other program's."""
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        own = [load.psutil.Process(), load.psutil.Process(child.pid)]
        before, busy = load._used_s(own), load._busy_s()
        end = load.time.perf_counter() + 60  # on a busy machine both wait for their turn
        while (used := load._used_s(own) - before) < 0.5 and load.time.perf_counter() < end:
            pass
        assert used >= 0.5
        assert load._busy_s() - busy > used - 0.1
    finally:
        child.kill()
        child.wait()


WORK = """
import pqcad_command, time  # without PyTorch
from pqcad_ao.utils import progress
progress.AFTER, progress.EVERY = 0.01, 0.15
for _ in range(2):
    bar = progress.tqdm(total=6, desc="learning", leave=False)
    for done in range(6):
        time.sleep(0.05)
        bar.set_postfix(loss=done)
        bar.update()
    bar.close()
    progress.AFTER = 60
"""


def test_progress_through_a_pipe_is_a_line_now_and_then():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, check=True)
    assert b"\r" not in done.stderr
    lines = done.stderr.decode().splitlines()
    assert 2 <= len(lines) <= 4  # of twelve changes in 0.3 seconds, and none of work that is too short to be worth one
    assert all(re.fullmatch(r"learning: \d/6 \[\d\d:\d\d<\d\d:\d\d, loss=\d\]", line) for line in lines)
    assert lines[-1].startswith("learning: 6/6")


def test_progress_in_a_terminal_and_in_a_notebook_is_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        list(progress.tqdm(range(3), desc="learning"))
        assert "\rlearning" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    list(progress.tqdm(range(3), desc="learning"))
    assert "\rlearning" in capsys.readouterr().err
