"""Safetensors files with a JSON header: written whole, the same bytes every time, and looked at when they are read."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pqcad_ao.utils.files import bytes_of, whole_file

CHECKSUM = "sha256"  # of all that a file holds, as its metadata names it
# the others are of types that this PyTorch does not have
UNREADABLE = (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors that share no memory, whole or not at all.

    Raises:
        OSError: there is no room, or no right to.
    """
    metadata = metadata or {}
    with whole_file(Path(path)) as unfinished:
        try:
            save_file(tensors, unfinished, {**metadata, CHECKSUM: checksum(tensors, metadata)})
        except SafetensorError as error:  # of the operating system
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise OSError(f"{path} cannot be written, its tensors take {size:,} bytes: {error}") from error
        _sort_header(unfinished)


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 of metadata and of tensors, in whatever order they are given."""
    return join_checksums([checksum_of(*item) for item in tensors.items()], metadata)


def checksum_of(name: str, tensor: Tensor) -> str:
    """SHA-256 of a tensor's name, type, shape and values."""
    sha = hashlib.sha256(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    sha.update(bytes_of(tensor))
    return sha.hexdigest()


def join_checksums(parts: Iterable[str], metadata: Mapping[str, str] | None = None) -> str:
    """The :func:`checksum` of tensors whose own ones are ``parts``."""
    return hashlib.sha256(json.dumps([sorted(parts), sorted((metadata or {}).items())]).encode()).hexdigest()


def seal_tensors(path: Path) -> None:
    """Write the checksum of its contents into the header of a file that another library wrote, where it has none.

    Raises:
        OSError: there is no room for both, or no right to.
    """
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata() or {}, file.keys()
        if CHECKSUM not in metadata:
            write_tensors(path, {name: file.get_tensor(name) for name in names}, metadata)


def check_tensors(path: Path) -> None:
    """Compare a file that may be of any library with its checksum, where it has one.

    Raises:
        OSError: it cannot be read. ValueError: it is no safetensors file, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            written = metadata.pop(CHECKSUM, None)
            if written is None:
                return
            found = join_checksums([checksum_of(name, file.get_tensor(name)) for name in file.keys()], metadata)  # noqa: SIM118
    except UNREADABLE as error:
        raise ValueError(f"{path} is no safetensors file or is damaged ({error})") from error
    if written != found:
        raise ValueError(f"{path} is damaged: what it holds is not what was written, by its checksum")


def _sort_header(file: Path) -> None:
    """Bring the entries of a file's header into the order of their names; safetensors writes them in a random one."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        opened.seek(8)
        opened.write(text.ljust(length))


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    """Every tensor of a file, on the CPU, and the JSON value that its metadata has under ``kind``.

    Raises:
        OSError: no such file, or it cannot be read. ValueError: it is no safetensors file, of another kind, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except UNREADABLE as error:
        raise ValueError(f"{path} is no safetensors file or is damaged ({error})") from error
    written = metadata.pop(CHECKSUM, None)  # files of others, and older ones, have none
    if kind not in metadata:
        raise ValueError(f"{path} holds no {kind}: its header names {', '.join(sorted(metadata)) or 'nothing'}")
    if written is not None and written != checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged: what it holds is not what was written, by its checksum")
    try:
        return tensors, json.loads(metadata[kind])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is no JSON ({error})") from error
