"""What a user brings: image sets as one uint8 tensor (idx.gz pairs, CIFAR-10's binary batches, or a folder of images),
and the conditioning of a network."""

import gzip
import math
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pqcad_ao.utils.tensor_files import UNREADABLE, check_tensors

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


DEFLATED = 1032  # bytes that one byte of a gzip file can at most become


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file (the MNIST family's format: 2 zero bytes, type 8, rank, big-endian sizes, data)."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with gzip.open(path, "rb") as file:
            begin = file.read(4)
            if len(begin) < 4 or begin[0] or begin[1] or begin[2] != 8:
                raise ValueError(f"it is no idx file of unsigned bytes: it starts with {begin!r}")
            header = file.read(4 * begin[3])
            if len(header) < 4 * begin[3]:
                raise ValueError("it ends within its header")
            shape = np.frombuffer(header, ">i4").tolist()
            size = math.prod(shape)
            if min(shape, default=0) < 0 or size > DEFLATED * path.stat().st_size:
                raise ValueError(f"it promises {shape} values, and is far too small for them")
            values = np.frombuffer(file.read(size + 1), np.uint8)
    except (EOFError, OSError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if values.size != size:
        raise ValueError(f"{path} is damaged: it promises {shape} values and holds {min(values.size, size + 1)}")
    return values.reshape(shape)


def _pad_to(images: Tensor, size: int) -> Tensor:
    """Centre (N, C, H, W) images in a black square of ``size`` pixels."""
    height, width = images.shape[-2:]
    if height > size or width > size:
        raise ValueError(
            f"images of {height}x{width} do not fit into {size}x{size}; pass image_size={max(height, width)}"
        )
    top, left = (size - height) // 2, (size - width) // 2
    return torch.nn.functional.pad(images, (left, size - width - left, top, size - height - top))


def _load_idx(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(read_idx(folder / f"{prefix}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").copy()).long()
    if images.dim() != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: {prefix} images have shape {list(images.shape)}, labels {list(labels.shape)}; expected "
            "(N, height, width) and (N,)"
        )
    return images[:, None], labels


def _load_cifar(files: list[Path]) -> tuple[Tensor, Tensor]:
    records = []
    for path in files:
        raw = np.fromfile(path, np.uint8)
        if raw.size == 0 or raw.size % 3073:
            raise ValueError(f"{path} is no CIFAR-10 binary batch: {raw.size} bytes is no multiple of 3073")
        records.append(raw.reshape(-1, 3073))
    table = torch.from_numpy(np.concatenate(records))
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].long()


def _load_folder(folder: Path, image_size: int, channels: int) -> tuple[Tensor, Tensor | None]:
    from PIL import Image

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(
            f"no images in {folder}: expected train-images-idx3-ubyte.gz, data_batch_1.bin (the *binary* version of "
            f"CIFAR-10) or files ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    images = torch.empty(len(files), channels, image_size, image_size, dtype=torch.uint8)
    for row, path in enumerate(files):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as opened:
                    picture = opened.convert("L" if channels == 1 else "RGB")
        except Exception as error:  # Pillow's decoders raise what they come upon: SyntaxError, struct.error, ...
            raise ValueError(f"{path} is no readable image: {error}") from error
        scale = image_size / min(picture.size)
        if scale < 1:  # shrink the short side, then cut the centre: never enlarge
            picture = picture.resize(
                (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
            )
        left, top = max(0, picture.width - image_size) // 2, max(0, picture.height - image_size) // 2
        picture = picture.crop(
            (left, top, left + min(image_size, picture.width), top + min(image_size, picture.height))
        )
        pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
        images[row] = _pad_to(pixels[None] if channels == 1 else pixels.permute(2, 0, 1), image_size)
    parents = sorted({p.parent for p in files})
    if len(parents) == 1:
        return images, None
    index = {parent: i for i, parent in enumerate(parents)}
    return images, torch.tensor([index[p.parent] for p in files])


def load_images(
    folder: str | Path, split: str = "train", *, image_size: int = 32, channels: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Load a data set into memory.

    Args:
        folder: holds ``train-images-idx3-ubyte.gz`` and its three siblings, or CIFAR-10's ``data_batch_*.bin``, or
            images (``folder/train/CLASS/*.jpg``, ``folder/CLASS/*.jpg`` and ``folder/*.jpg`` are all understood; the
            class is the folder's rank by name).
        split: ``"train"`` or ``"test"``.
        image_size: height and width of the result; smaller images are centred on black, larger ones (of a folder)
            shrunk.
        channels: 1 or 3 for a folder of images (3 if None); the other formats know their own.

    Returns:
        images (N, C, image_size, image_size) uint8, and class labels (N,) int64 or None where there are none.

    Raises:
        ValueError: nothing readable there, a file that is missing or damaged, or a folder with the other split alone.
    """
    folder = Path(folder)
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; allowed are 'train' and 'test'")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    prefix = "train" if split == "train" else "t10k"
    batches = sorted(folder.glob("data_batch_*.bin" if split == "train" else "test_batch.bin"))
    if (folder / f"{prefix}-images-idx3-ubyte.gz").exists():
        images, labels = _load_idx(folder, prefix)
    elif batches:
        images, labels = _load_cifar(batches)
    else:
        inner, other = folder / split, folder / ("test" if split == "train" else "train")
        if other.is_dir() and not inner.is_dir():
            raise ValueError(f"{folder} has {other.name}/ but no {split}/")
        return _load_folder(inner if inner.is_dir() else folder, image_size, channels or 3)
    return _pad_to(images, image_size), labels


def some_images(folder: str | Path, shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    """At most ``count`` pictures of a data set's training half, drawn without repetition: (N, C, H, W) in [-1, 1].

    Raises: as :func:`load_images`.
    """
    channels, size, _ = shape
    images, _ = load_images(folder, "train", image_size=size, channels=channels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return to_unit(images[order[:count].sort().values])


def to_unit(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1], the range diffusers' pipelines work in."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] to uint8 [0, 255], rounding to nearest and clipping what lies outside."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def read_conditioning(path: str | Path) -> dict[str, Any]:
    """The conditioning of a network: every tensor of a safetensors file under its name.

    ``added_cond_kwargs.text_embeds`` is the entry ``text_embeds`` of a dictionary ``added_cond_kwargs``, and a tensor
    without dimensions is a number, as ``guidance_scale`` wants to be.

    Raises:
        OSError: it cannot be read. ValueError: it is no safetensors file, is damaged, holds nothing, holds NaN or
            infinity, or has a tensor where another's name wants a dictionary.
    """
    path, found = Path(path), dict[str, Any]()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: write a conditioning with safetensors.torch.save_file")
    check_tensors(path)
    try:
        tensors = load_file(path)
    except UNREADABLE as error:
        raise ValueError(f"{path} is no safetensors file or is damaged ({error})") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
        *parents, last = name.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{path}: {parent} is a tensor, and {name} wants it to be a dictionary: rename one")
        if last in place:
            raise ValueError(f"{path}: {name} is a tensor, and other names want it to be a dictionary: rename one")
        place[last] = tensor if tensor.dim() else tensor.item()
    if not found:
        raise ValueError(f"{path} holds no tensors: write them under the names of the network's arguments")
    return found
