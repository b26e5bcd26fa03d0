"""What a kill leaves behind, who may work in a folder, and files that are the same bytes every time."""

import contextlib
import errno
import os
import threading
import time
from multiprocessing import Pipe, get_context
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SHAPE, TINY_UNET, Small, cosine_scheduler, quick
from omegaconf import OmegaConf

from pqcad_ao import CADConfig, compress, distill_, quantize_
from pqcad_ao.diffusion.calibration import calibration_set
from pqcad_ao.diffusion.trajectories import draw_trajectories
from pqcad_ao.learn.training import train_loop
from pqcad_ao.models import save_model
from pqcad_ao.recipes.train_teacher import train
from pqcad_ao.utils.files import check_writable, sweep, whole_file, write_whole
from pqcad_ao.utils.runs import only_run_in
from pqcad_ao.utils.tensor_files import read_tensors, write_tensors


@pytest.fixture
def holder(tmp_path):
    """Another process at work in ``tmp_path``, in the midst of writing ``a.bin``."""
    ours, theirs = Pipe()

    def hold() -> None:
        with only_run_in(tmp_path), whole_file(tmp_path / "a.bin") as unfinished:
            unfinished.write_bytes(b"half")
            theirs.send("held")
            time.sleep(600)

    process = get_context("fork").Process(target=hold)
    process.start()
    assert ours.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_two_runs_in_a_folder(holder, tmp_path):
    before = sorted(tmp_path.iterdir())
    message = f"{tmp_path} is in use by process {holder.pid} on .*: wait until it is done, or give another folder"
    with pytest.raises(BlockingIOError, match=message), only_run_in(tmp_path):
        pass
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    holder.kill()
    holder.join()
    with only_run_in(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".pqcad.lock"]
        assert str(os.getpid()) in (tmp_path / ".pqcad.lock").read_text()
    assert not [*tmp_path.iterdir()]


def test_every_long_job_asks_whether_another_is_at_work(holder, tmp_path):
    given = {"sample_shape": SHAPE, "folder": tmp_path, "progress": False}
    model, before = Small(), Small().state_dict()
    jobs = [
        lambda: quantize_(model, quick(), scheduler=cosine_scheduler(), **given),
        lambda: distill_(model, Small(), cosine_scheduler(), CADConfig(steps=4), **given),
        lambda: compress(model, cosine_scheduler(), quick(), CADConfig(steps=4), **given),
        lambda: calibration_set(model, cosine_scheduler(), SHAPE, quick(), folder=tmp_path),
        lambda: draw_trajectories(model, cosine_scheduler(), SHAPE, CADConfig(steps=4), {}, folder=tmp_path),
        lambda: train_loop(None, 1, folder=tmp_path, describe=str, title=""),
        lambda: save_model(UNet2DModel(**TINY_UNET), cosine_scheduler(), tmp_path),
        lambda: train(OmegaConf.create({"train": {}}), torch.zeros(1, 1, 8, 8), tmp_path),
    ]
    for job in jobs:
        with pytest.raises(BlockingIOError, match=f"in use by process {holder.pid} "):
            job()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_written_next_sweeps_its_own_leftovers(holder, tmp_path):
    write_whole(tmp_path / "a.bin", b"whole")
    assert [*tmp_path.glob(".a.bin.*")], "the other process is alive and writing"
    holder.kill()
    holder.join()
    write_whole(tmp_path / "a.bin", b"newer")
    assert not [*tmp_path.glob(".a.bin.*")]
    assert (tmp_path / "a.bin").read_bytes() == b"newer"


def test_a_run_may_ask_again_and_another_thread_may_not(tmp_path):
    refused = []

    def elsewhere() -> None:
        try:
            with only_run_in(tmp_path):
                pass
        except BlockingIOError as error:
            refused.append(str(error))

    with only_run_in(tmp_path), only_run_in(f"{tmp_path}/."):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(refused) == 1
    elsewhere()
    assert len(refused) == 1
    with only_run_in(None):
        pass


def test_a_forked_child_is_another_run(tmp_path):
    def ask() -> None:
        try:
            with only_run_in(tmp_path):
                os._exit(0)
        except BlockingIOError as error:
            os._exit(3 if f"in use by process {os.getppid()} " in str(error) else 4)

    with only_run_in(tmp_path):
        child = get_context("fork").Process(target=ask)
        child.start()
        child.join()
        assert child.exitcode == 3
        assert [path.name for path in tmp_path.iterdir()] == [".pqcad.lock"]


def test_an_error_of_the_system_that_names_no_file_is_given_a_name(tmp_path):
    """As write(2) says that the disk is full."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(OSError, match=rf"{tmp_path} cannot be written: No space left on device") as raised,
        only_run_in(tmp_path),
    ):
        full()
    assert raised.value.errno == errno.ENOSPC
    with (
        pytest.raises(OSError, match=r"a\.bin cannot be written: No space left on device"),
        whole_file(tmp_path / "a.bin"),
    ):
        full()
    with pytest.raises(FileNotFoundError, match="elsewhere"), whole_file(tmp_path / "a.bin"):
        (tmp_path / "elsewhere").stat()


def _take_turns(folder: Path) -> None:
    end, mark, taken = time.monotonic() + 0.5, folder / "mark", 0
    while time.monotonic() < end or not taken:
        with contextlib.suppress(BlockingIOError), only_run_in(folder):
            mark.touch(exist_ok=False)
            mark.unlink()
            taken += 1


def test_many_processes_never_hold_a_folder_together(tmp_path):
    workers = [get_context("fork").Process(target=_take_turns, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_files_have_the_permissions_that_the_umask_leaves(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "a", b"")
        write_tensors(tmp_path / "b", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "ab"} == {0o666 & ~mask}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(Path, "replace", lambda path, other: calls.append("named") or replace(path, other))
    write_whole(tmp_path / "a", b"content")
    named = calls.index("named")
    assert any(call.endswith("/a") for call in calls[:named])
    assert calls[named + 1 :] == [str(tmp_path)]


def test_a_place_is_tried_without_leaving_a_file(tmp_path, monkeypatch):
    """Not even for the moment in which a kill may come."""
    seen, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **options: seen.append(path) or real(path, *rest, **options))
    check_writable(tmp_path / "a")
    assert seen == [tmp_path]


text = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=40)
@given(st.dictionaries(text, text, max_size=6), st.lists(text, max_size=5, unique=True))
def test_whatever_a_header_says_it_is_read_as_written(tmp_path_factory, metadata, names):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    names = [name for name in names if name != "__metadata__"]
    tensors = {name: torch.arange(3 + place) for place, name in enumerate(names)}
    metadata = {"kind": "[1]", **{key: value for key, value in metadata.items() if key not in ("kind", "sha256")}}
    write_tensors(path, tensors, metadata)
    read, header = read_tensors(path, "kind")
    assert header == [1]
    assert read.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in read.items())


def test_the_same_tensors_are_the_same_file(tmp_path):
    """safetensors alone writes metadata in another order each time."""
    for name in "abcdef":
        write_tensors(tmp_path / name, {n: torch.ones(2) for n in "cab"}, {n: n for n in "zyxwvut"})
    assert len({(tmp_path / name).read_bytes() for name in "abcdef"}) == 1


def test_a_folder_that_vanishes_while_it_is_locked_is_made_again(tmp_path):
    """A sweep of another process may come between a folder's making and its lock."""
    stop = threading.Event()

    def sweeping() -> None:
        while not stop.is_set():
            sweep(tmp_path)
            time.sleep(0)

    thread = threading.Thread(target=sweeping)
    thread.start()
    try:
        for number in range(100):
            with whole_file(tmp_path / "a") as unfinished:
                unfinished.write_bytes(str(number).encode())
            assert (tmp_path / "a").read_bytes() == str(number).encode()
    finally:
        stop.set()
        thread.join()
