"""Saving and loading of quantized networks that are no diffusers models: safetensors with packed weights."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao.diffusion.cache_plan import CachePlan, attach_cache_plan, cache_plan
from pqcad_ao.nn.diffusers_plugin import attach
from pqcad_ao.nn.layers import QuantizedLayer, check_saved
from pqcad_ao.nn.state import (
    check_layers,
    insert_layers,
    make_layers,
    quantized_state,
    required_state,
    state_from_dict,
)
from pqcad_ao.utils.tensor_files import read_tensors, write_tensors

KIND = "pqcad"  # of the file, as its metadata names it
CACHE = "cache"  # of that metadata: the network's cache plan


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Save a quantized module that is no diffusers model (those have ``save_pretrained``) as one safetensors file.

    Raises:
        ValueError: the module is not quantized, or a layer of it was replaced since. OSError: the place cannot be
            written.

    Example:
        >>> save_quantized(quantized, "network.safetensors")
    """
    state = required_state(model)
    check_layers(model, state)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # copies, since safetensors refuses tensors that share memory (tied weights)
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()
    }
    plan = cache_plan(model)
    kept = state.to_dict() | ({} if plan is None else {CACHE: plan.to_dict()})
    write_tensors(path, tensors, {"format": "pt", KIND: json.dumps(kept)})


def load_quantized(model: nn.Module, path: str | Path) -> nn.Module:
    """Turn a full-precision ``model`` in place into the quantized one that :func:`save_quantized` wrote.

    A call that fails leaves the model as it was.

    Raises:
        ValueError: the file is damaged, foreign, or of another network. FileNotFoundError: it is not there.

    Example:
        >>> save_quantized(quantized, "network.safetensors")
        >>> network = load_quantized(unet, "network.safetensors")
        >>> x_t = torch.randn(1, 1, 8, 8)
        >>> torch.equal(network(x_t, 500).sample, quantized(x_t, 500).sample)
        True
    """
    if quantized_state(model) is not None:
        raise ValueError(
            f"this {type(model).__name__} is quantized already; load_quantized takes the full-precision one"
        )
    tensors, header = read_tensors(path, KIND)
    try:
        plan = CachePlan.from_dict(header.pop(CACHE)) if isinstance(header, dict) and CACHE in header else None
        state = state_from_dict(header)
        layers = make_layers(model, state)
        _check_fit(model, layers, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for fqn, layer in layers.items():
        weight: Any = model.get_submodule(fqn).weight
        own = {name: tensors[f"{fqn}.{name}"].to(weight.device) for name in layer.state_dict()}
        layer.load_state_dict(own, assign=True)
    attach(model, state)
    if plan is not None:
        attach_cache_plan(model, plan)
    insert_layers(model, layers, state.timestep)
    model.load_state_dict(tensors, strict=True)
    return model


def _check_fit(model: nn.Module, layers: dict[str, QuantizedLayer], tensors: dict[str, Tensor]) -> None:
    """Look whether tensors are what ``model`` holds once ``layers`` are in it.

    Raises:
        ValueError: some are missing, unknown, of another shape or type, or hold what they cannot.
    """
    expected = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    for fqn, layer in layers.items():
        expected |= {f"{fqn}.{name}": value for name, value in layer.state_dict().items()}
    wrong = sorted(
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or expected[name].shape != tensors[name].shape
    )
    if wrong:
        raise ValueError(
            f"it does not fit this {type(model).__name__}: missing, unknown or of another shape are "
            f"{', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}"
        )
    for name, value in tensors.items():
        fqn = name.rpartition(".")[0]
        check_saved(name, value, layers.get(fqn) or model.get_submodule(fqn))
