"""What a run keeps in its folder is looked at before it is used, and a full disk is an error that says where."""

import json
import os
import resource
import signal
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from networks import SHAPE, Small, cosine_scheduler, quick
from safetensors import safe_open
from safetensors.torch import save_file

from pqcad_ao import CADConfig
from pqcad_ao.diffusion.calibration import calibration_set
from pqcad_ao.diffusion.trajectories import draw_trajectories
from pqcad_ao.utils.tensor_files import write_tensors

SETTINGS = {"steps": 4, "points": 12, "generation_batch_size": 5, "iterations": 4, "batch_size": 4}


def _draw(folder, **options):
    return draw_trajectories(
        Small(), cosine_scheduler(), SHAPE, CADConfig(**{**SETTINGS, **options}), {}, folder=folder
    )


def _files(folder):
    (pictures,) = folder.glob("c_dc-*.npy")
    (marks,) = (path for path in folder.glob("c_dc-*.json") if "whole" not in path.name)
    (whole,) = folder.glob("c_dc-*.whole.json")
    return pictures, marks, whole


def _zeros_behind(folder):
    _, marks, whole = _files(folder)
    marks.write_text(json.dumps({"sha256": json.loads(marks.read_text())["sha256"] * 34}))
    whole.unlink()


def _unmarked(change):
    """A change of the pictures while they are still being drawn."""

    def damage(folder):
        change(folder)
        _files(folder)[2].unlink()

    return damage


def _picture(change):
    def damage(folder):
        pictures = _files(folder)[0]
        np.save(pictures, change(np.load(pictures)))

    return damage


def _with_nan(images):
    images[3, 1, 0, 2, 2] = np.nan
    return images


def _flip(folder):
    content = bytearray(_files(folder)[0].read_bytes())
    content[1000] ^= 1
    _files(folder)[0].write_bytes(content)


def _marks(content: str):
    def damage(folder):
        _, marks, whole = _files(folder)
        whole.unlink()
        marks.write_text(content)

    return damage


def _header(text: bytes):
    def damage(folder):
        content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(9216)
        _files(folder)[0].write_bytes(content)

    return damage


def _pickled(folder):
    np.save(_files(folder)[0], np.array([{"a": print}], object), allow_pickle=True)


PICTURES = {
    "more marks than batches": _zeros_behind,
    "NaN": _picture(_with_nan),
    "NaN while drawn": _unmarked(_picture(_with_nan)),
    "zeros": _picture(np.zeros_like),
    "zeros while drawn": _unmarked(_picture(np.zeros_like)),
    "float64": _picture(lambda images: images.astype(np.float64)),
    "big-endian": _picture(lambda images: images.astype(">f4")),
    "column by column": _picture(np.asfortranarray),
    "fewer": _picture(lambda images: images[:7]),
    "more": _picture(lambda images: np.concatenate([images, images])),
    "a flipped bit": _flip,
    "a flipped bit while drawn": _unmarked(_flip),
    "a pickle": _pickled,
    "a header that is no literal": _header(b"{'descr': '<f4', ("),
    "a header in deep brackets": _header(b"[" * 10_000),
    "marks of a number": _marks("100"),
    "marks of words": _marks('{"sha256": ["a"]}'),
    "marks of nothing": _marks('{"sha256": null}'),
    "no JSON": _marks("{"),
    "deep JSON": _marks("[" * 100_000),
}


@pytest.mark.parametrize("damage", PICTURES.values(), ids=PICTURES)
def test_pictures_that_were_not_drawn_are_refused(damage, tmp_path):
    expected = _draw(tmp_path).rows(torch.arange(12))[0]
    damage(tmp_path)
    with pytest.raises(ValueError, match=r"c_dc-\w+\.npy .*damaged.*: delete .* drawn again"):
        _draw(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    assert torch.equal(_draw(tmp_path).rows(torch.arange(12))[0], expected)


def _points(folder):
    return calibration_set(Small(), cosine_scheduler(), SHAPE, quick(), folder=folder)


def _reseal(change):
    """A calibration set that is whole and says what cannot be."""

    def damage(file):
        with safe_open(file, "pt") as opened:
            values = {"x_t": opened.get_tensor("x_t"), "walked": opened.metadata()["walked"]}
        change(values)
        walked = values.pop("walked")
        write_tensors(file, values, {"walked": walked})

    return damage


def _some_nan(values):
    values["x_t"][3, 0, 1, 1] = float("nan")


def _bit(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


POINTS = {
    **{f"walked {walked}": _reseal(lambda v, w=walked: v.update(walked=w)) for walked in ("-1000000000", "0", "99999")},
    **{f"walked {walked}": _reseal(lambda v, w=walked: v.update(walked=w)) for walked in ("true", "1.5", '"8"', "[]")},
    "NaN": _reseal(_some_nan),
    "float64": _reseal(lambda v: v.update(x_t=v["x_t"].double())),
    "complex": _reseal(lambda v: v.update(x_t=v["x_t"].to(torch.complex64))),
    "fewer": _reseal(lambda v: v.update(x_t=v["x_t"][:3])),
    "one for all": _reseal(lambda v: v.update(x_t=v["x_t"][:1])),
    "nothing": _reseal(lambda v: v.update(other=v.pop("x_t"))),
    "a flipped bit": _bit,
    "no header": lambda file: save_file({"x_t": torch.zeros(1)}, file),
}


@pytest.mark.parametrize("damage", POINTS.values(), ids=POINTS)
def test_points_that_were_not_walked_are_refused(damage, tmp_path):
    _points(tmp_path)
    (file,) = tmp_path.glob("c_qc-*")
    damage(file)
    with pytest.raises(ValueError, match=r"c_qc-\w+\.safetensors is damaged .*: delete it"):
        _points(tmp_path)


# Full disks


def _in_a_child(call, *args) -> str:
    """What a call raised in another process, or how the process ended."""
    answers = get_context("fork").SimpleQueue()

    def run() -> None:
        try:
            call(*args)
            answers.put("no error")
        except BaseException as error:
            answers.put(f"{type(error).__name__}: {error}")

    process = get_context("fork").Process(target=run)
    process.start()
    process.join()
    return answers.get() if process.exitcode == 0 else f"ended by {signal.Signals(-process.exitcode).name}"


def _limited(call, size: int, folder) -> None:
    """With files of at most so many bytes, which is what a full disk says to a process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    call(folder)


def test_a_disk_too_small_for_the_pictures_is_said_before_they_are_drawn(tmp_path):
    said = _in_a_child(_limited, _draw, 2000, tmp_path)
    assert said.startswith("OSError")
    assert f"C_DC cannot be kept in {tmp_path}, where it takes 9,216 bytes: File too large" in said
    assert not [*tmp_path.iterdir()]


def test_a_disk_too_small_for_the_points_is_said(tmp_path):
    said = _in_a_child(_limited, _points, 1000, tmp_path)
    assert said.startswith("OSError")
    assert str(tmp_path) in said
    assert not [*tmp_path.iterdir()]


def test_room_for_pictures_is_taken_before_they_are_drawn(tmp_path, monkeypatch):
    """A sparse file would do until the disk is full, and then end the process without a word."""
    taken = []

    def stop(*args, **options) -> None:
        (file,) = tmp_path.glob("c_dc-*.npy")
        taken.append(file.stat())
        raise KeyboardInterrupt

    monkeypatch.setattr("pqcad_ao.diffusion.trajectories._batch", stop)
    with pytest.raises(KeyboardInterrupt):
        _draw(tmp_path, points=2000)
    assert taken[0].st_blocks * 512 >= taken[0].st_size > 2000 * 256


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o555)
    try:
        for call in (_draw, _points):
            with pytest.raises(OSError, match=str(tmp_path)):
                call(tmp_path)
    finally:
        tmp_path.chmod(0o755)
