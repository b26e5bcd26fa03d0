"""Saving and loading quantized networks: safetensors with packed weights, through diffusers or for any module."""

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.core.config import config_from_dict, config_to_dict

from pqcad_ao.config import ACTIVATION_BITS, WEIGHT_BITS, PQCADConfig
from pqcad_ao.nn import QuantizedConv2d, QuantizedLayer, QuantizedLinear, Timestep, install_timestep
from pqcad_ao.plan import Plan, PlanRow

FORMAT = 1
FIELDS = {"quant_method", "format", "config", "plan", "timestep_groups", "num_train_timesteps", "transitions"}
OPTIONAL = {"schedule"}


class Method(str, Enum):
    """diffusers reads ``quant_method.value``."""

    PQCAD = "pqcad"


@dataclass
class QuantizedState:
    """What a quantized network knows about itself, beside its weights."""

    config: PQCADConfig
    plan: Plan
    timestep: Timestep
    transitions: list[dict[str, Any]] = field(default_factory=list)
    log: list[Any] = field(default_factory=list)  # updates of the run that learned it; not saved
    distilled: list[Any] = field(default_factory=list)  # updates of the run that distilled it; not saved

    def to_dict(self) -> dict[str, Any]:
        schedule = {} if self.timestep.schedule is None else {"schedule": self.timestep.schedule}
        return {
            **schedule,
            "quant_method": Method.PQCAD.value,
            "format": FORMAT,
            "config": config_to_dict(self.config),
            "plan": self.plan.to_list(),
            "timestep_groups": self.timestep.groups,
            "num_train_timesteps": self.timestep.num_train_timesteps,
            "transitions": self.transitions,
        }


def state_from_dict(values: dict[str, Any]) -> QuantizedState:
    """Invert :meth:`QuantizedState.to_dict`.

    Raises:
        ValueError: made by another version, incomplete, with unknown fields, or with values out of range.
    """
    if values.get("format") != FORMAT:
        raise ValueError(f"the checkpoint is of format {values.get('format')!r}; this pqcad_ao reads format {FORMAT}")
    try:
        unknown = values.keys() - FIELDS - OPTIONAL
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        config, plan = config_from_dict(values["config"]), Plan.from_list(values["plan"])
        if not isinstance(config, PQCADConfig):
            raise ValueError(f"its config is a {type(config).__name__}, not a PQCADConfig")
        for row in plan:
            _check_row(row)
        counts = values["timestep_groups"], values["num_train_timesteps"]
        if not all(_is_count(count) for count in counts):
            raise ValueError(f"timestep_groups and num_train_timesteps are {counts}")
        timestep, schedule = Timestep(*counts), values.get("schedule")
        if schedule is not None and not all(_is_count(t + 1) and t < counts[1] for t in schedule):
            raise ValueError(f"schedule is {schedule}")
        timestep.schedule = schedule
        return QuantizedState(config, plan, timestep, values["transitions"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        detail = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"the checkpoint's quantization config is damaged: {detail}") from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_row(row: PlanRow) -> None:
    sound = (
        isinstance(row.fqn, str)
        and all(_is_count(n) for n in [*row.shape, *row.segments])
        and (row.weight_bits is None or row.weight_bits in WEIGHT_BITS)
        and (row.activation_bits is None or row.activation_bits in ACTIVATION_BITS)
        and (row.segments or not row.quantized)
    )
    if not sound:
        raise ValueError(f"{row} has values out of range")


def quantized_state(model: nn.Module) -> QuantizedState | None:
    """The state of a network that pqcad_ao quantized, or None."""
    return getattr(model, "_pqcad_state", None)


def attach(model: nn.Module, state: QuantizedState) -> None:
    """Make ``model`` remember how it was quantized, for ``plan(model)``, for the report and for saving."""
    if isinstance(model, ConfigMixin):
        quantization_config = PQCADQuantizationConfig(**state.to_dict())
        model.register_to_config(quantization_config=quantization_config)
        model.hf_quantizer = PQCADDiffusersQuantizer(quantization_config, pre_quantized=True)
        # diffusers refuses .to(dtype) where this is set; our layers keep their grids in float32 through any cast
        model.is_quantized = False
    model._pqcad_state = state


def make_layers(model: nn.Module, state: QuantizedState) -> dict[str, QuantizedLayer]:
    """Quantized layers with nothing in them yet for the plan's layers of a full-precision skeleton, by name.

    Raises:
        ValueError: the skeleton does not have a layer of the plan, or has it in another shape.
    """
    layers: dict[str, QuantizedLayer] = {}
    for row in state.plan.quantized:
        try:
            original = model.get_submodule(row.fqn)
        except AttributeError as error:
            raise ValueError(
                f"the checkpoint quantizes {row.fqn}, which {type(model).__name__} does not have: it is of another "
                "network"
            ) from error
        kind = QuantizedConv2d if isinstance(original, nn.Conv2d) else QuantizedLinear
        if not isinstance(original, (nn.Conv2d, nn.Linear)) or list(original.weight.shape) != row.shape:
            found = f"{type(original).__name__} {list(getattr(original, 'weight', torch.empty(0)).shape)}"
            raise ValueError(f"the checkpoint has {row.fqn} as {row.kind} {row.shape}; the network has a {found}")
        channels = original.in_channels if isinstance(original, nn.Conv2d) else original.in_features
        if sum(row.segments) != channels:
            raise ValueError(
                f"the checkpoint splits {row.fqn} into {row.segments}; the network has {channels} channels"
            )
        with torch.device(original.weight.device):
            layer = kind.like(original, row.weight_bits, row.activation_bits, row.segments, state.timestep)
        layers[row.fqn] = layer.train(original.training)
    return layers


def insert_layers(model: nn.Module, layers: dict[str, QuantizedLayer], timestep: Timestep) -> None:
    """Replace layers of ``model`` by quantized ones that read ``timestep``."""
    for fqn, layer in layers.items():
        model.set_submodule(fqn, layer)
    install_timestep(model, timestep)


class PQCADQuantizationConfig(QuantizationConfigMixin):
    """What diffusers keeps under ``quantization_config`` in config.json."""

    def __init__(self, quant_method: str = Method.PQCAD.value, **values: Any) -> None:
        self.quant_method = Method(quant_method)
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method.value, **self.values}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()  # diffusers' repr asks for it, its base class does not have it


class PQCADDiffusersQuantizer(DiffusersQuantizer):
    """Lets ``from_pretrained`` rebuild a network that pqcad_ao quantized and saved."""

    requires_calibration = True  # only networks quantized before can be loaded: quantize_ does the rest

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.state = state_from_dict(self.quantization_config.to_dict())
        insert_layers(model, make_layers(model, self.state), self.state.timestep)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        empty = [name for name, value in model.state_dict().items() if value.is_meta]
        if empty:
            raise ValueError(
                f"the checkpoint is damaged: it holds no {', '.join(empty[:3])}{' ...' if len(empty) > 3 else ''}"
            )
        attach(model, self.state)
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        owner, _, _ = param_name.rpartition(".")
        return isinstance(model.get_submodule(owner), QuantizedLayer)

    def check_quantized_param_shape(self, param_name: str, current: Tensor | torch.Size, loaded: Tensor) -> bool:
        raise ValueError(
            f"the checkpoint is damaged: {param_name} has shape {tuple(loaded.shape)}, the plan in config.json says "
            f"{tuple(getattr(current, 'shape', current))}"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        owner, _, name = param_name.rpartition(".")
        # state_dict still holds the saved type; param_value was cast to torch_dtype, which would move the grid
        value = state_dict[param_name]
        layer = model.get_submodule(owner)
        if value.dtype != layer._buffers[name].dtype:
            raise ValueError(
                f"the checkpoint is damaged: {param_name} is {value.dtype}, expected {layer._buffers[name].dtype}"
            )
        layer._buffers[name] = value.to(target_device)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# diffusers 0.42 finds quantizers in these two dictionaries (quantizers/auto.py); packages add themselves on import.
auto.AUTO_QUANTIZER_MAPPING[Method.PQCAD.value] = PQCADDiffusersQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.PQCAD.value] = PQCADQuantizationConfig


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Save a quantized module that is no diffusers model (those have ``save_pretrained``) as one safetensors file.

    Raises:
        ValueError: the module is not quantized. OSError: the place cannot be written.
    """
    state = quantized_state(model)
    if state is None:
        raise ValueError(f"this {type(model).__name__} is not quantized; call quantize_ first")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # copies, since safetensors refuses tensors that share memory (tied weights)
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()
    }
    save_file(tensors, path, metadata={"format": "pt", "pqcad": json.dumps(state.to_dict())})


def load_quantized(model: nn.Module, path: str | Path) -> nn.Module:
    """Turn a full-precision ``model`` in place into the quantized one that :func:`save_quantized` wrote.

    A call that fails leaves the model as it was.

    Raises:
        ValueError: the file is damaged, foreign, or of another network. FileNotFoundError: it is not there.
    """
    if quantized_state(model) is not None:
        raise ValueError(
            f"this {type(model).__name__} is quantized already; load_quantized takes the full-precision one"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if "pqcad" not in metadata:
        raise ValueError(f"{path} was not written by pqcad_ao.save_quantized (its metadata has no 'pqcad')")
    try:
        state = state_from_dict(json.loads(metadata["pqcad"]))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the checkpoint's quantization config is damaged: {error}") from error
    layers = make_layers(model, state)
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
            f"{path} does not fit this {type(model).__name__}: missing, unknown or of another shape are "
            f"{', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}"
        )
    attach(model, state)
    insert_layers(model, layers, state.timestep)
    model.load_state_dict(tensors, strict=True)
    return model
