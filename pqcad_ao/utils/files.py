"""Write a file whole or not at all, say before the work begins if that cannot be done, and name a cached result."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def check_writable(path: str | Path) -> Path:
    """``path`` as a Path.

    Raises:
        OSError: a file cannot be made there.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: write the name of a file, such as {path / 'unet.pte'}")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise type(error)(error.errno, f"cannot write into the folder {path.parent}: {error.strerror}") from error
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name to write a file under; on leaving it is moved to ``path``, or deleted if anything was raised.

    A link, or what is no regular file (``/dev/stdout``), is written to as it is: moving would put a file in its place.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(0o644)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write the whole file or none."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


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
            sha.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(leaf).encode())
    return sha.hexdigest()[:16]
