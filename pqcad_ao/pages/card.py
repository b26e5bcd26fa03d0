"""A model's card: the README.md beside its weights, which a hub shows and a person reads first."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from diffusers import UNet2DModel
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from pqcad_ao.nn.state import QuantizedState, quantized_state
from pqcad_ao.pages.environment import environment
from pqcad_ao.utils.files import read_json, write_whole

NAME = "README.md"
MARK = "<!-- written by pqcad_ao, which replaces it with the model; without this line it stays -->"
HUB = re.compile(r"[\w.-]+/[\w.-]+")  # a model's name there: owner/name
QUALITY = ("fid", "n")  # what a measured quality has to say


def write_card(
    unet: nn.Module, folder: Path, *, quality: Mapping[str, Any] | None = None, repo_id: str | None = None
) -> None:
    """Write the card of a network that is saved in ``folder``; the same network has the same card.

    Licence and base model are those of the card beside which the network, or its teacher, was read.

    Args:
        quality: as :func:`~pqcad_ao.evaluate.fid.image_quality` returns it, and ``steps``; None: not measured.
        repo_id: the hub's name for it, by which the card says how to load it.
    """
    state, data = quantized_state(unet), front_matter(unet)
    weights = sum(file.stat().st_size for file in (folder / "unet").glob("*.safetensors"))
    text = (
        environment()
        .get_template("card.md.jinja")
        .render(
            mark=MARK,
            data=data,
            place=repo_id or "path/to/this/folder",
            weights=weights,
            parameters=sum(parameter.numel() for parameter in unet.parameters()),
            quality=_checked(quality),
            pipeline=isinstance(unet, UNet2DModel) and (folder / "model_index.json").exists(),
            kind=type(unet).__name__,
            sampler=read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"],
            **_compressed(state),
        )
    )
    write_whole(folder / NAME, f"---\n{data.to_yaml()}\n---\n{text}".encode())


def is_users(path: Path) -> bool:
    """Whether a card is there that somebody else wrote."""
    return path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace")


def check_replaceable(folder: Path) -> None:
    """Raises ValueError: no model folder whose card may be written."""
    if not (folder / "unet").is_dir():
        raise ValueError(f"{folder} is no folder with a model: there is no place for its card")
    if is_users(folder / NAME):
        raise ValueError(f"{folder / NAME} was not written by pqcad_ao, and stays: move it away, or leave --card out")


def front_matter(unet: nn.Module) -> ModelCardData:
    """What a hub sorts models by."""
    known: dict[str, Any] = {**_origin(unet)}
    tags = ["diffusers", "pqcad_ao"] if quantized_state(unet) is not None else ["diffusers"]
    task = "unconditional-image-generation" if isinstance(unet, UNet2DModel) else "text-to-image"
    return ModelCardData(library_name="diffusers", pipeline_tag=task, tags=tags, **known)


def _origin(unet: nn.Module) -> dict[str, str]:
    """``license`` and ``base_model``, as far as they are known where the network was read."""
    read_from = str(getattr(unet, "config", {}).get("_name_or_path") or "")  # of a folder diffusers keeps a Path
    if not read_from:
        return {}
    for folder in (Path(read_from), Path(read_from).parent):
        if (folder / NAME).is_file():
            try:
                data = ModelCard.load(folder / NAME).data
            except (ValueError, yaml.YAMLError, RecursionError):  # somebody's README, not a card
                return {}
            found = {name: data.get(name) for name in ("license", "base_model")}
            return {name: value for name, value in found.items() if isinstance(value, str)}
    if HUB.fullmatch(read_from) and not Path(read_from).exists():
        return {"base_model": read_from}
    return {}


def _compressed(state: QuantizedState | None) -> dict[str, Any]:
    """What a quantized network has to say of itself; None in each place of one that is not."""
    if state is None:
        return {"bits": None, "summary": None, "average": None, "timesteps": None, "roles": None, "config": None}
    config, rows = state.config, state.plan.rows
    counted = Counter((row.role, row.weight_bits or "float", row.activation_bits or "float") for row in rows)
    return {
        "bits": f"W{config.weight_bits}" + (f"A{config.activation_bits}" if config.activation_bits else ""),
        "summary": state.plan.summary(),
        "average": state.plan.average_bits,
        "timesteps": state.timestep.schedule,
        "roles": sorted(counted.items(), key=lambda entry: [str(part) for part in entry[0]]),
        "config": repr(config),
    }


def _checked(quality: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Raises ValueError: a quality without what its line says."""
    if quality is not None and not all(name in quality for name in QUALITY):
        raise ValueError(f"quality has {', '.join(quality)}: give what image_quality returns, {', '.join(QUALITY)} ...")
    return quality
