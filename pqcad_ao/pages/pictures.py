"""Pictures for pages: a grid of images as one, and each as a PNG that stands in the page itself."""

import base64
import io
import math
from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor

from pqcad_ao.data import to_uint8


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


def _pixels(images: Tensor) -> Tensor:
    """(N, C, H, W) uint8 on the CPU."""
    return (images if images.dtype == torch.uint8 else to_uint8(images)).cpu()
