"""Pictures to look at: a grid of images as one, in a file or in the page itself, and grids under their labels."""

import base64
import io
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pqcad_ao.data import to_uint8
from pqcad_ao.utils.files import whole_file

LETTERS = 12  # of a panel's label to an inch


def grid(images: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) images to one (C, rows·(H+1)+1, columns·(W+1)+1) uint8 picture on white, one pixel between them.

    Args:
        images: uint8 in [0, 255], or floating point in [-1, 1].
        columns: images in a row; the last row may be short.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images are {tuple(images.shape)}: expected (N, C, H, W) with N at least 1")
    pixels = _pixels(images)
    count, channels, height, width = pixels.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    picture = torch.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + 1) + 1, index % columns * (width + 1) + 1
        picture[:, top : top + height, left : left + width] = image
    return picture


def as_image(picture: Tensor) -> Image.Image:
    """A (C, H, W) uint8 picture of one or three channels."""
    array = picture[0].numpy() if picture.shape[0] == 1 else picture.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)


def png(picture: Tensor) -> str:
    """A (C, H, W) uint8 picture as the address of an ``<img>`` that holds it."""
    file = io.BytesIO()
    as_image(picture).save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def side_by_side(columns: Mapping[str, Tensor], count: int) -> list[list[tuple[str, str]]]:
    """For each of the first ``count`` seeds: title and address of its picture in each column, and of a difference.

    The difference is the second column less the first, grey where they are equal.
    """
    pixels = {title: _pixels(images[:count]) for title, images in columns.items()}
    seeds: list[list[tuple[str, str]]] = [[] for _ in next(iter(pixels.values()))]
    if len(pixels) > 1:
        reference, ours, *_ = pixels.values()
        pixels["the second less the first"] = ((ours.float() - reference.float()) / 2 + 127.5).round().to(torch.uint8)
    for title, images in pixels.items():
        for seed, image in zip(seeds, images, strict=True):
            seed.append((title, png(image)))
    return seeds


def save_grid(images: Tensor, path: str | Path, columns: int = 8) -> None:
    """Write the :func:`grid` of (N, C, H, W) images; the suffix says the format."""
    picture = as_image(grid(images, columns))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(Path(path)) as unfinished:
        picture.save(unfinished)


def save_samples(
    panels: dict[str, Tensor],
    path: str | Path,
    *,
    columns: int = 8,
    side: float = 4.2,
    across: int = 8,
) -> None:
    """Draw grids of images side by side, each under its label; the same place in each is the same seed.

    Args:
        panels: label to (N, C, H, W) images (as for :func:`grid`), as many in each.
        columns: images in a row of a grid. side: width of a grid in inches. across: grids side by side, at most.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    pictures = {label: grid(images, columns) for label, images in panels.items()}
    _, height, width = next(iter(pictures.values())).shape
    across = min(across, len(pictures))
    down = math.ceil(len(pictures) / across)
    figure = Figure(figsize=(side * across, (side * height / width + 0.8) * down), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [*figure.subplots(down, across, squeeze=False).flat]
    for axis in axes:
        axis.axis("off")
    for axis, (label, picture) in zip(axes, pictures.items(), strict=False):
        array = picture.permute(1, 2, 0).numpy()
        axis.imshow(array.repeat(3, 2) if array.shape[2] == 1 else array, interpolation="nearest")
        axis.set_title(textwrap.fill(label, round(side * LETTERS)), fontsize=10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(Path(path)) as unfinished:
        figure.savefig(unfinished, dpi=150, bbox_inches="tight", pad_inches=0.05)


def _pixels(images: Tensor) -> Tensor:
    """(N, C, H, W) uint8 on the CPU."""
    return (images if images.dtype == torch.uint8 else to_uint8(images)).cpu()
