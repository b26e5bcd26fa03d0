"""What keeps C_DC while it is drawn and read: memory, or a file that is mapped, with marks of what is in it."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pqcad_ao.utils.files import read_json, whole_file, write_whole
from pqcad_ao.utils.processes import rank_and_world, wait_for_all


class Store:
    """C_DC in memory while it is drawn; :class:`FileStore` keeps it.

    Attributes:
        images: (N, K + 1, C, H, W) float32 array.
    """

    def __init__(self, images: Any) -> None:
        self.images = images

    def batches_done(self, of: int) -> int:
        """How many of this process's batches are there."""
        return 0

    def put(self, rows: Tensor, pictures: Tensor, number: int) -> None:
        """Keep the ``number``-th batch of this process."""
        self.images[rows.numpy()] = pictures.float().cpu().numpy()

    def finish(self) -> None:
        """Remember that all are there."""


class FileStore(Store):
    """C_DC in a file that is mapped rather than read, and marks of what is in it.

    Args:
        folder, key: of the file. shape: (N, K + 1, C, H, W). batch_size: of this draw.
    """

    def __init__(self, folder: Path, key: str, shape: tuple[int, ...], batch_size: int) -> None:
        rank, world = rank_and_world()
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"c_dc-{key}.npy"
        if rank == 0 and not self.file.is_file():
            for old in folder.glob(f"c_dc-{key}.*.json"):
                old.unlink()
            _reserve(self.file, shape)
        wait_for_all()
        super().__init__(_mapped(self.file, shape))
        # checksums of this process's batches that are there; of all pictures once they are, however they were shared
        self.marks = folder / f"c_dc-{key}.{batch_size}-{world}-{rank}.json"
        self.whole = folder / f"c_dc-{key}.whole.json"
        self.size, self.stride = batch_size, batch_size * world
        self.first = batch_size * rank
        self.drawn: list[str] = []

    def batches_done(self, of: int) -> int:
        """As :meth:`Store.batches_done`. Raises ValueError: the pictures are not those that were drawn."""
        if self.whole.is_file():
            self._compare(self.whole, lambda drawn: [_checksum(self.images)])
            return of
        if self.marks.is_file():
            self.drawn = self._compare(self.marks, lambda drawn: [self._of_batch(n) for n in range(min(drawn, of))])
        return len(self.drawn)

    def _of_batch(self, number: int) -> str:
        start = self.first + number * self.stride
        return _checksum(self.images[start : start + self.size])

    def _compare(self, marks: Path, checksums: Callable[[int], list[str]]) -> list[str]:
        """What a file of marks holds, where that is ``checksums`` of as many."""
        try:
            values = read_json(marks).get("sha256")
            if isinstance(values, list) and values == checksums(len(values)):
                return values
            raise ValueError("its checksums are others")
        except ValueError as error:
            raise ValueError(
                f"{self.file} or {marks.name} beside it is damaged ({error}): delete both, and its pictures are drawn "
                "again"
            ) from error

    def put(self, rows: Tensor, pictures: Tensor, number: int) -> None:
        """As :meth:`Store.put`; written, and not through the map, where a full disk would end the process."""
        content = pictures.float().cpu().contiguous().numpy()
        with _room(self.file.parent, content.nbytes), self.file.open("r+b") as opened:
            opened.seek(self.images.offset + int(rows[0]) * content[0].nbytes)
            opened.write(content.data)
            opened.flush()
            os.fsync(opened.fileno())
        self.drawn.append(self._of_batch(number))
        write_whole(self.marks, json.dumps({"sha256": self.drawn}).encode())

    def finish(self) -> None:
        write_whole(self.whole, json.dumps({"sha256": [_checksum(self.images)]}).encode())


def _checksum(images: np.ndarray) -> str:
    """SHA-256 of pictures that lie one behind the other."""
    return hashlib.sha256(images.data).hexdigest()


@contextmanager
def _room(folder: Path, size: int) -> Iterator[None]:
    """Say in an error of the operating system where there was not room for what."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            error.errno, f"C_DC cannot be kept in {folder}, where it takes {size:,} bytes: {error.strerror}"
        ) from error


def _reserve(file: Path, shape: tuple[int, ...]) -> None:
    """Make the file of as many pictures, all zero, with room on the disk for each.

    Raises:
        OSError: there is not as much; says where, and how many bytes are needed.
    """
    size = 4 * math.prod(shape)
    with whole_file(file) as unfinished, _room(file.parent, size), unfinished.open("wb") as opened:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(opened, header)
        opened.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), opened.tell(), size)
        else:  # macOS
            for start in range(0, size, 2**20):
                opened.write(bytes(min(2**20, size - start)))


def _mapped(file: Path, shape: tuple[int, ...]) -> Any:
    """The float32 array of a file, to read.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        images = np.lib.format.open_memmap(file, "r")
        if images.shape != shape or images.dtype != np.float32 or not images.flags.c_contiguous:
            raise ValueError(f"it holds {images.dtype} {images.shape}, expected are float32 {shape}")
        if file.stat().st_size != images.offset + images.nbytes:
            raise ValueError("it has another size than its header says")
    except Exception as error:  # the header is a Python literal, whose parsers raise what they come upon
        raise ValueError(f"{file} is damaged ({error}): delete it, and its pictures are drawn again") from error
    return images
