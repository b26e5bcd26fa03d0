"""Safetensors files with a JSON header: written whole, and looked at when they are read."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pqcad_ao.utils.files import whole_file


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors that share no memory, whole or not at all."""
    with whole_file(Path(path)) as unfinished:
        save_file(tensors, unfinished, metadata)


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    """Every tensor of a file, on the CPU, and the JSON value that its metadata has under ``kind``.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no safetensors file, of another kind, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file or is damaged ({error})") from error
    if kind not in metadata:
        raise ValueError(f"{path} holds no {kind}: its header names {', '.join(sorted(metadata)) or 'nothing'}")
    try:
        return tensors, json.loads(metadata[kind])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its header is no JSON ({error})") from error
