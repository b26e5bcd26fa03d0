"""What a quantized network knows about itself, and the empty layers that this describes."""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from math import inf, prod
from typing import Any

import torch
from torch import nn
from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig, config_to_dict

from pqcad_ao.config import ACTIVATION_BITS, WEIGHT_BITS, CacheConfig, CADConfig, PQCADConfig, config_from_json
from pqcad_ao.diffusion.correction import CorrectionTable
from pqcad_ao.diffusion.process import MOST_TIMESTEPS
from pqcad_ao.graph.operators import OPERATORS
from pqcad_ao.graph.plan import Plan, PlanRow
from pqcad_ao.nn.layers import QuantizedLayer, quantized_class
from pqcad_ao.nn.timestep import Timestep, install_timestep
from pqcad_ao.utils.checks import is_whole
from pqcad_ao.utils.fields import at_default

FORMAT = 1
FIELDS = {"quant_method", "format", "config", "plan", "timestep_groups", "num_train_timesteps", "transitions"}
OPTIONAL = {"schedule", "continuous", "bounds", "time_scale", "clip", "guidance", "correction"}
WEIGHTS = "weights"  # field of a config.json, beside those of a state: the checksum of what was saved with it
ATTRIBUTE = "_pqcad_state"  # of a quantized network

for _kind in (PQCADConfig, CADConfig, CacheConfig):  # as torchao knows its own; their files import no PyTorch
    AOBaseConfig.register(_kind)
# torchao rebuilds a config from JSON by calling whatever a module on this list has under the name that the JSON gives
# (torchao 0.18, core/config.py). The face of that folder holds nothing but configurations and their words; the package,
# which holds import_module and load_pt2, must never stand there.
ALLOWED_AO_MODULES.add("pqcad_ao.config")


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
    correction: CorrectionTable | None = None  # of its sampling
    facts: dict[str, Any] = field(default_factory=dict)  # of the run that learned it, as Learned has them; not saved

    def to_dict(self) -> dict[str, Any]:
        return {
            **_of_time(self.timestep),
            "quant_method": Method.PQCAD.value,
            "format": FORMAT,
            "config": _of_config(self.config),
            "plan": self.plan.to_list(),
            "timestep_groups": self.timestep.groups,
            "num_train_timesteps": self.timestep.num_train_timesteps,
            "transitions": self.transitions,
            **({} if self.correction is None else {"correction": self.correction.to_dict()}),
        }


def state_from_dict(values: dict[str, Any]) -> QuantizedState:
    """Invert :meth:`QuantizedState.to_dict`.

    Raises:
        ValueError: made by another version, incomplete, with unknown fields, or with values out of range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"its quantization config is damaged: a {type(values).__name__}, expected a JSON object")
    if values.get("format") != FORMAT:
        raise ValueError(f"the checkpoint is of format {values.get('format')!r}; this pqcad_ao reads format {FORMAT}")
    try:
        unknown = values.keys() - FIELDS - OPTIONAL
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        config, plan = config_from_json(values["config"]), Plan.from_list(values["plan"])
        for row in plan:
            _check_row(row)
        names = Counter(row.fqn for row in plan)
        for row in plan.quantized:
            if names[row.fqn] > 1:
                raise ValueError(f"its plan has {names[row.fqn]} rows for {row.fqn!r}")
        timestep = _time_from(values)
        if not all(isinstance(entry, dict) for entry in values["transitions"]):
            raise ValueError(f"transitions is {values['transitions']!r}")
        correction = CorrectionTable.from_dict(values["correction"]) if "correction" in values else None
        return QuantizedState(config, plan, timestep, values["transitions"], correction=correction)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        detail = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"the checkpoint's quantization config is damaged: {detail}") from error


def _of_config(config: PQCADConfig) -> dict[str, Any]:
    """As torchao writes it, without later fields that are at their defaults: releases without them read it, too."""
    values = config_to_dict(config)
    hidden = at_default(config)
    return {**values, "_data": {name: value for name, value in values["_data"].items() if name not in hidden}}


def _of_time(timestep: Timestep) -> dict[str, Any]:
    """The optional fields, of what a network knows about its time."""
    fields: dict[str, Any] = {} if timestep.schedule is None else {"schedule": timestep.schedule}
    if timestep.continuous:
        fields["continuous"] = True
    if timestep.bounds is not None:
        fields["bounds"] = [*timestep.bounds]
    if timestep.time_scale != 1:
        fields["time_scale"] = timestep.time_scale
    if timestep.clip is not None:
        fields["clip"] = timestep.clip
    if timestep.guidance is not None:
        fields["guidance"] = timestep.guidance
    return fields


def _time_from(values: dict[str, Any]) -> Timestep:
    """Invert :func:`_of_time`. Raises ValueError: a value is out of range."""
    counts = values["timestep_groups"], values["num_train_timesteps"]
    if not all(is_whole(count, most=MOST_TIMESTEPS) for count in counts):
        raise ValueError(f"timestep_groups and num_train_timesteps are {counts}")
    continuous, time_scale = values.get("continuous", False), values.get("time_scale", 1.0)
    if not isinstance(continuous, bool):
        raise ValueError(f"continuous is {continuous!r}")
    if not isinstance(time_scale, float) or not 0 < time_scale <= 1:
        raise ValueError(f"time_scale is {time_scale!r}")
    bounds = None if values.get("bounds") is None else _bounds(values["bounds"])
    timestep = Timestep(*counts, continuous=continuous, time_scale=time_scale, bounds=bounds)
    schedule, timestep.clip = values.get("schedule"), values.get("clip")
    if timestep.clip is not None and not (isinstance(timestep.clip, float) and 0 <= timestep.clip < inf):
        raise ValueError(f"clip is {timestep.clip!r}")
    timestep.guidance = values.get("guidance")
    if timestep.guidance is not None and not (isinstance(timestep.guidance, float) and abs(timestep.guidance) < inf):
        raise ValueError(f"guidance is {timestep.guidance!r}")
    if schedule is not None and not _is_schedule(schedule, timestep):
        raise ValueError(f"schedule is {schedule}, expected are falling timesteps from {counts[1] - 1} to 0")
    timestep.schedule = schedule
    return timestep


def _bounds(values: Any) -> tuple[float, float]:
    """Raises ValueError: they are not the least and the greatest timestep of a process."""
    sound = isinstance(values, list) and len(values) == 2 and all(isinstance(t, float) for t in values)
    if not sound or not -inf < values[0] < values[1] < inf:
        raise ValueError(f"bounds is {values!r}")
    return values[0], values[1]


def _is_schedule(schedule: Any, of: Timestep) -> bool:
    if not isinstance(schedule, list) or not schedule:
        return False
    if of.continuous:
        sound = all(isinstance(t, float) and 0 < t <= of.num_train_timesteps for t in schedule)
    else:
        sound = all(is_whole(t, 0, of.num_train_timesteps - 1) for t in schedule)
    return sound and all(a > b for a, b in pairwise(schedule))


def _check_row(row: PlanRow) -> None:
    words, lists, width = (row.fqn, row.kind, row.role, row.reason), (row.shape, row.segments), row.activation_bits
    sound = (
        all(isinstance(word, str) for word in words)
        and all(isinstance(numbers, list) and all(is_whole(n) for n in numbers) for numbers in lists)
        and is_whole(row.parameters, 0)
        and (row.weight_bits is None or is_whole(row.weight_bits, WEIGHT_BITS[0], WEIGHT_BITS[-1]))
        and (width is None or (row.quantized and is_whole(width, ACTIVATION_BITS[0], ACTIVATION_BITS[-1])))
        and (row.sensitivity is None or isinstance(row.sensitivity, float))
        and (not row.quantized or (row.segments and row.fqn and row.parameters == prod(row.shape)))
    )
    if not sound:
        raise ValueError(f"{row} has values out of range")


def quantized_state(model: nn.Module) -> QuantizedState | None:
    """The state of a network that pqcad_ao quantized, or None."""
    return getattr(model, ATTRIBUTE, None)


def required_state(model: nn.Module, otherwise: str = "") -> QuantizedState:
    """The state of a network that pqcad_ao quantized.

    Raises:
        ValueError: nothing has quantized it, or something else has; what the message ends with is ``otherwise``.
    """
    state = quantized_state(model)
    if state is not None:
        return state
    kind = type(model).__name__
    if getattr(model, "is_quantized", False) or any(type(value) is not nn.Parameter for value in model.parameters()):
        raise ValueError(f"this {kind} was quantized by something else: load it in full precision and call quantize_")
    raise ValueError(f"this {kind} is not quantized by pqcad_ao: call quantize_ first{otherwise}")


def check_layers(model: nn.Module, state: QuantizedState) -> None:
    """Look whether the layers that were quantized are still there.

    Raises:
        ValueError: one of them was replaced since.
    """
    for row in state.plan.quantized:
        layer = model.get_submodule(row.fqn)
        if not isinstance(layer, QuantizedLayer):
            raise ValueError(
                f"{row.fqn} of this {type(model).__name__} was quantized, and is a {type(layer).__name__} now: replace "
                "layers before quantize_, and remove adapters first"
            )


def make_layers(model: nn.Module, state: QuantizedState) -> dict[str, QuantizedLayer]:
    """Quantized layers for the plan's layers of a full-precision skeleton, by name.

    They are on the meta device: what a file says takes no memory before its tensors are found to fit.

    Raises:
        ValueError: the skeleton does not have a layer of the plan, or has it in another shape.
    """
    layers: dict[str, QuantizedLayer] = {}
    for row in state.plan.quantized:
        try:
            original: Any = model.get_submodule(row.fqn)
        except AttributeError as error:
            raise ValueError(
                f"the checkpoint quantizes {row.fqn}, which {type(model).__name__} does not have: it is of another "
                "network"
            ) from error
        operator = OPERATORS.get(row.kind)
        known = operator is not None and operator.quantized is not None and isinstance(original, operator.module)
        if operator is None or not known or list(original.weight.shape) != row.shape:
            present = f"{type(original).__name__} {list(getattr(original, 'weight', torch.empty(0)).shape)}"
            raise ValueError(f"the checkpoint has {row.fqn} as {row.kind} {row.shape}; the network has a {present}")
        channels = getattr(original, operator.channels)
        if sum(row.segments) != channels:
            raise ValueError(
                f"the checkpoint splits {row.fqn} into {row.segments}; the network has {channels} channels"
            )
        with torch.device("meta"):
            layer = quantized_class(operator).like(
                original, row.weight_bits, row.activation_bits, row.segments, state.timestep
            )
        layers[row.fqn] = layer.train(original.training)
    return layers


def insert_layers(model: nn.Module, layers: dict[str, QuantizedLayer], timestep: Timestep) -> None:
    """Replace layers of ``model`` by quantized ones that read ``timestep``."""
    for fqn, layer in layers.items():
        model.set_submodule(fqn, layer)
    install_timestep(model, timestep)
