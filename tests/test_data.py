"""Image sets read from disk: the three formats, and clear errors for what is damaged."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pqcad_ao.data import load_images, read_conditioning, read_idx, some_images, to_uint8, to_unit
from pqcad_ao.utils.tensor_files import write_tensors


def _write_idx(path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def _images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def idx(tmp_path):
    for prefix, count in (("train", 5), ("t10k", 3)):
        _write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", _images(count, 28, 28))
        _write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count))
    return tmp_path


# idx


@pytest.mark.parametrize(("split", "count"), [("train", 5), ("test", 3)])
def test_idx(idx, split, count):
    images, labels = load_images(idx, split)
    assert images.shape == (count, 1, 32, 32)
    assert images.dtype == torch.uint8
    assert torch.equal(images[:, 0, 2:30, 2:30], torch.from_numpy(_images(count, 28, 28)))
    assert images.sum() == _images(count, 28, 28).sum()  # what surrounds them is black
    assert labels.tolist() == list(range(count))
    assert labels.dtype == torch.int64


def test_idx_in_its_own_size_and_too_small(idx):
    assert load_images(idx, image_size=28)[0].shape == (5, 1, 28, 28)
    with pytest.raises(ValueError, match="images of 28x28 do not fit into 16x16; pass image_size=28"):
        load_images(idx, image_size=16)


def _rewrite(path, change) -> None:
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(change(raw)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], "is damaged: it promises .* and holds 3919"),
        (lambda raw: raw[:9], "is damaged: it ends within its header"),
        (lambda raw: b"", "is no idx file of unsigned bytes"),
        (lambda raw: b"\x00\x00\x0d" + raw[3:], "is no idx file of unsigned bytes"),
        (lambda raw: struct.pack(">BBBBI", 0, 0, 8, 1, 5) + bytes(5), r"images have shape \[5\], labels \[5\]"),
        (lambda raw: struct.pack(">BBBBIII", 0, 0, 8, 3, 4, 2, 2) + bytes(16), r"shape \[4, 2, 2\], labels \[5\]"),
    ],
    ids=["short", "header", "empty", "type", "rank", "count"],
)
def test_damaged_idx_is_an_error(idx, change, message):
    _rewrite(idx / "train-images-idx3-ubyte.gz", change)
    with pytest.raises(ValueError, match=message):
        load_images(idx)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b"no gzip at all"),
        lambda path: path.write_bytes(path.read_bytes()[:20] + b"\xff" * 40 + path.read_bytes()[60:]),
    ],
    ids=["truncated", "no gzip", "garbled"],
)
def test_damaged_gzip_is_an_error(idx, damage):
    damage(idx / "train-images-idx3-ubyte.gz")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz (is damaged|promises)"):
        load_images(idx)


def test_missing_labels_are_an_error(idx):
    (idx / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz is missing"):
        load_images(idx)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_idx_of_any_rank(tmp_path_factory, shape):
    path = tmp_path_factory.mktemp("idx") / "file.gz"
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    _write_idx(path, array)
    assert np.array_equal(read_idx(path), array)


# CIFAR-10


def _write_cifar(path, images: np.ndarray, labels: list[int]) -> None:
    records = [bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True)]
    path.write_bytes(b"".join(records))


def test_cifar_binary(tmp_path):
    images = _images(5, 3, 32, 32)
    _write_cifar(tmp_path / "data_batch_1.bin", images[:2], [3, 9])
    _write_cifar(tmp_path / "data_batch_2.bin", images[2:4], [0, 1])
    _write_cifar(tmp_path / "test_batch.bin", images[4:], [7])
    loaded, labels = load_images(tmp_path)
    assert torch.equal(loaded, torch.from_numpy(images[:4]))
    assert labels.tolist() == [3, 9, 0, 1]
    loaded, labels = load_images(tmp_path, "test")
    assert torch.equal(loaded, torch.from_numpy(images[4:]))
    assert labels.tolist() == [7]


@pytest.mark.parametrize("size", [0, 3072, 3074])
def test_damaged_cifar_is_an_error(tmp_path, size):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"no CIFAR-10 binary batch: {size} bytes"):
        load_images(tmp_path)


# Folders


def _save(path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_a_folder_of_images_in_order(tmp_path):
    images = _images(3, 32, 32, 3)
    for name, image in zip(("b.png", "a.png", "c.bmp"), images, strict=True):
        _save(tmp_path / name, image)
    (tmp_path / "notes.txt").write_text("not an image")
    loaded, labels = load_images(tmp_path)
    assert labels is None
    assert torch.equal(loaded, torch.from_numpy(images[[1, 0, 2]]).permute(0, 3, 1, 2))


def test_classes_and_splits(tmp_path):
    image = _images(1, 8, 8, 3)[0]
    for name in ("train/shoe/1.png", "train/bag/1.png", "train/bag/2.png", "test/bag/1.png"):
        _save(tmp_path / name, image)
    _, labels = load_images(tmp_path, image_size=8)
    assert labels.tolist() == [0, 0, 1]
    loaded, labels = load_images(tmp_path, "test", image_size=8)
    assert len(loaded) == 1
    assert labels is None


def test_some_of_the_images(tmp_path):
    images = _images(6, 8, 8)
    _write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    _write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(6))
    everything = to_unit(torch.from_numpy(images)[:, None])
    assert torch.equal(some_images(tmp_path, (1, 8, 8), 9, seed=0), everything)
    few, others = (some_images(tmp_path, (1, 8, 8), 3, seed) for seed in (0, 1))
    assert few.shape == (3, 1, 8, 8)
    assert len({int(row) for image in few for row in (everything == image).flatten(1).all(1).nonzero()}) == 3
    assert not torch.equal(few, others)
    assert torch.equal(few, some_images(tmp_path, (1, 8, 8), 3, seed=0))


def test_the_other_split_is_not_taken_for_this_one(tmp_path):
    _save(tmp_path / "train" / "bag" / "1.png", _images(1, 8, 8, 3)[0])
    with pytest.raises(ValueError, match="has train/ but no test/"):
        load_images(tmp_path, "test")


def test_sizes_and_channels(tmp_path):
    tall = np.zeros((64, 32, 3), np.uint8)
    tall[16:48] = 200  # the middle half, which the cut keeps
    _save(tmp_path / "tall.png", tall)
    loaded, _ = load_images(tmp_path, image_size=16, channels=1)
    assert loaded.shape == (1, 1, 16, 16)
    assert (loaded[0, 0, 4:12] == 200).all()
    _save(tmp_path / "tall.png", np.full((4, 6, 3), 255, np.uint8))
    loaded, _ = load_images(tmp_path, image_size=16)
    assert loaded.shape == (1, 3, 16, 16)
    assert loaded.sum() == 255 * 4 * 6 * 3  # small ones are centred, never enlarged
    assert (loaded[0, :, 6:10, 5:11] == 255).all()


def test_transparent_and_palette_images(tmp_path):
    Image.fromarray(_images(1, 8, 8, 4)[0], "RGBA").save(tmp_path / "a.png")
    Image.fromarray(_images(1, 8, 8)[0], "L").convert("P").save(tmp_path / "b.png")
    assert load_images(tmp_path, image_size=8)[0].shape == (2, 3, 8, 8)


def test_a_damaged_image_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"a\.png is no readable image"):
        load_images(tmp_path)
    _save(tmp_path / "a.png", _images(1, 64, 64, 3)[0])
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"a\.png is no readable image"):
        load_images(tmp_path)


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no images in .*: expected train-images-idx3-ubyte\.gz, data_batch_1\.bin"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="split is 'val'; allowed are 'train' and 'test'"):
        load_images(tmp_path, "val")


# Ranges


def test_every_pixel_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(pixels)
    assert unit.dtype == torch.float32
    assert unit[0] == -1
    assert unit[255] == 1
    assert torch.equal(to_uint8(unit), pixels)


def test_what_lies_outside_is_clipped():
    assert to_uint8(torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0])).tolist() == [0, 0, 128, 255, 255]


def test_the_real_data_set(data_dir):
    images, labels = load_images(data_dir / "fashion_mnist", "test")
    assert images.shape == (10_000, 1, 32, 32)
    assert torch.bincount(labels).tolist() == [1000] * 10
    assert not images[:, :, :2].any()


def test_a_picture_that_is_a_decompression_bomb_is_named(tmp_path, monkeypatch):
    Image.fromarray(_images(1, 40, 40)[0], "L").save(tmp_path / "bomb.png")
    for most in (1000, 100):  # Pillow warns of the first, and raises an error of its own at twice as many pixels
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(ValueError, match=r"bomb\.png is no readable image: .*decompression bomb"):
            load_images(tmp_path)


def test_a_conditioning_is_nested_by_its_names(tmp_path: Path):
    tensors = {"class_labels": torch.arange(2), "negative.added_cond_kwargs.time_ids": torch.ones(2, 6)}
    write_tensors(tmp_path / "c.safetensors", {**tensors, "guidance_scale": torch.tensor(7.5)})
    found = read_conditioning(tmp_path / "c.safetensors")
    assert found.keys() == {"class_labels", "negative", "guidance_scale"}
    assert found["class_labels"].tolist() == [0, 1]
    assert found["negative"]["added_cond_kwargs"]["time_ids"].shape == (2, 6)
    assert found["guidance_scale"] == 7.5


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensors"),
        ({"a": torch.tensor([1.0, float("nan")])}, "a holds NaN or infinity"),
        ({"a": torch.ones(1), "a.b": torch.ones(1)}, "dictionary: rename one"),
        ({"a.b.c": torch.ones(1), "a.b": torch.ones(1)}, "dictionary: rename one"),
    ],
)
def test_a_bad_conditioning_is_named(tmp_path: Path, tensors: dict[str, Tensor], message: str):
    write_tensors(tmp_path / "c.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"c\.safetensors.*{message}"):
        read_conditioning(tmp_path / "c.safetensors")


def test_a_conditioning_that_is_damaged_or_not_there_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no file .*save_file"):
        read_conditioning(tmp_path / "c.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"c\.safetensors is no safetensors file or is damaged"):
        read_conditioning(tmp_path / "c.safetensors")
