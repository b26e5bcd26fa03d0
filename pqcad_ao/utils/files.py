"""Write a file whole or not at all, say before the work begins if that cannot be done, and name a cached result."""

import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pqcad_ao.utils.locks import try_lock

UNFINISHED = ".unfinished"  # how the name of a folder ends in which something is being written


def check_writable(path: str | Path) -> Path:
    """``path`` as a Path.

    Raises:
        OSError: a file cannot be made there.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: write the name of a file, such as {path / 'unet.pte'}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(error.errno, f"cannot write into the folder {path.parent}: {error.strerror}") from error
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name to write a file under; on leaving it is moved to ``path``, or deleted if anything was raised.

    Once this returns, the file is on the disk, not only on its way there. What a killed process left unfinished is
    deleted when the same file is written next. A link, or what is no regular file (``/dev/stdout``), is written to as
    it is: moving would put a file in its place.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with naming(path):
            yield path
        return
    with unfinished_folder(path) as folder:
        unfinished = folder / path.name
        unfinished.touch()
        yield unfinished
        settle(folder)
        unfinished.replace(path)
    flush(path.parent)


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path`` to write in, deleted on leaving; by :func:`sweep` if this process is killed."""
    sweep(path.parent, path.name)
    while True:
        folder = path.parent / f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}"
        folder.mkdir()
        with naming(path), held(folder) as mine:
            if mine is False or not folder.exists():
                continue  # swept as it was made, before it was locked
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file or folder in an error of the system that names none, as that of a full disk does."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None or str(path.parent) in str(error):
            raise
        raise type(error)(error.errno, f"{path} cannot be written: {error.strerror}") from error


def sweep(folder: Path, name: str | None = None) -> None:
    """Delete what processes that are no more have left unfinished in a folder, of one file or of all."""
    pattern = "*" if name is None else glob.escape(name)
    for left in folder.glob(f".{pattern}.*{UNFINISHED}"):
        with held(left) as mine:
            if mine:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def held(folder: Path) -> Iterator[bool | None]:
    """As :func:`~pqcad_ao.utils.locks.try_lock`, of a folder; False where it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)


def settle(folder: Path) -> None:
    """Bring everything in a new folder to the disk, with the permissions that the user gives new files."""
    mode = folder.stat().st_mode & 0o666  # as the umask has left it; safetensors and tempfile make files of 0600
    for path in [*folder.rglob("*")]:
        if path.is_file():
            path.chmod(mode)
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Bring a file's contents, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # not every file system has this for folders
            raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write the whole file or none."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity replaced by None, which JSON can hold."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, values: dict[str, Any]) -> None:
    """Write strict JSON (infinities become null), making the folder if it is not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(finite(values), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        OSError: it cannot be read. ValueError: it is no JSON, or another value than an object.
    """
    try:
        values = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # of the text's encoding, too
        raise ValueError(f"{path} is no JSON or is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: expected a JSON object")
    return values


def digest(*values: Any) -> str:
    """A short name for everything that a cached result depends on: tensors (nested, too) by content, others by repr."""
    sha = hashlib.sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            sha.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            sha.update(bytes_of(leaf))
        else:
            sha.update(repr(leaf).encode())
    return sha.hexdigest()[:16]


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values as they lie in memory, in order; no copy where they are on the CPU and in order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
