"""``quantize_``: a full-precision UNet becomes a quantized one, in place, from its own sampling trajectories."""

import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.transform_module import register_quantize_module_handler

from pqcad_ao.calibration import CalibrationSet, as_ddim, calibration_set, find_scheduler
from pqcad_ao.capture import GEMMS, Capture, capture, check_conditioning, layer_fqn, placement, weight_fqn
from pqcad_ao.capture import sample_shape as find_sample_shape
from pqcad_ao.config import PQCADConfig
from pqcad_ao.fake_quant import quantize
from pqcad_ao.nn import QuantizedConv2d, QuantizedLayer, QuantizedLinear, Timestep, install_timestep
from pqcad_ao.observe import (
    activation_quantizers,
    fit_activations,
    fit_weights,
    observe,
    weight_quantizers,
    weights_in_full_precision,
)
from pqcad_ao.passes.insert_activations import insert_activations
from pqcad_ao.plan import Plan, resolve
from pqcad_ao.progressive import Learned, learn, policies
from pqcad_ao.quantizer import PQCADQuantizer, insert_fake_quantizers
from pqcad_ao.sampling import in_type
from pqcad_ao.sensitivity import layer_sensitivity, spare_bits, spend_bits
from pqcad_ao.serialization import QuantizedState, attach, quantized_state

logger = logging.getLogger(__name__)


def is_root(module: nn.Module, fqn: str) -> bool:
    """The ``filter_fn`` with which torchao's own ``quantize_`` hands us the whole network."""
    return fqn == ""


def plan(
    model: nn.Module,
    config: PQCADConfig | None = None,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    sample_shape: tuple[int, int, int] | None = None,
    conditioning: dict[str, Any] | None = None,
) -> Plan:
    """What was done to a quantized network, or what :func:`quantize_` would do to a full-precision one.

    Which layers ``target_bits`` raises is known when :func:`quantize_` has measured them; until then the plan says
    what may be spent.

    Args: as for :func:`quantize_`; a quantized network needs none.

    Raises:
        ValueError: a config for a network that is quantized already, or bits above ``target_bits``.
    """
    state = quantized_state(model)
    if state is not None:
        if config is not None:
            raise ValueError("the network is quantized already, no other bits can be planned for it: give no config")
        return state.plan
    config = config or PQCADConfig()
    return _resolve(_capture(model, sample_shape, conditioning), model, config, filter_fn)


def _resolve(
    captured: Capture, model: nn.Module, config: PQCADConfig, filter_fn: Callable[[nn.Module, str], bool] | None
) -> Plan:
    resolved = resolve(captured, model, config, filter_fn)
    if config.target_bits is not None:
        spare_bits(resolved, config.target_bits)
    return replace(resolved, target_bits=config.target_bits)


def _capture(model: nn.Module, shape: tuple[int, int, int] | None, conditioning: dict[str, Any] | None) -> Capture:
    return capture(model, find_sample_shape(model, shape), check_conditioning(model, conditioning))


def quantize_(
    model: nn.Module,
    config: PQCADConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | str | None = None,
    *,
    scheduler=None,
    sample_shape: tuple[int, int, int] | None = None,
    conditioning: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = True,
) -> None:
    """Quantize a diffusion network's convolutions and linears in place, without data.

    The network stays what it was, a diffusers model that its pipelines accept, with the layers of the plan replaced by
    :class:`~pqcad_ao.nn.QuantizedConv2d` and :class:`~pqcad_ao.nn.QuantizedLinear`. A call that fails leaves it as it
    was.

    Args:
        model: a diffusers ``UNet2DModel`` or ``UNet2DConditionModel``, or a module called as ``f(x_t, timesteps)``.
        config: what to do.
        filter_fn: ``(module, fqn) -> bool``; layers it refuses stay in floating point, and the plan says so.
        device: where the network goes first, as in torchao.
        scheduler: of the DDPM/DDIM family, the one the network was trained with; if None, the one saved beside the
            network, or else diffusers' ``DDIMScheduler()``, with a warning.
        sample_shape: (C, H, W), for networks whose config does not say it.
        conditioning: keyword arguments of ``model.forward`` with rows to draw from, for conditional networks: any
            number of them, each used as often as the next.
        folder: where a long run keeps what it needs to go on after it was killed: the calibration set, checkpoints, and
            ``log.jsonl`` with a line for each update. The same call with the same folder goes on, to the same result.
        callback: called as ``callback(stage, done, total)``.
        progress: show bars.

    Raises:
        ValueError: nothing to quantize, quantized before, conditioning missing, a foreign scheduler, a bad override,
            too few iterations for the ladders, another run's folder.
        FloatingPointError: NaN or infinity in the weights or during calibration, or learning that diverged; says where.
        RuntimeError: ``torch.export`` cannot capture the network.
    """
    if not isinstance(config, PQCADConfig):
        raise TypeError(
            f"config is a {type(config).__name__}: write PQCADConfig(); for other configs use torchao's quantize_"
        )
    _check_model(model)
    scheduler = _scheduler(model, scheduler)
    shape = find_sample_shape(model, sample_shape)
    home, _ = placement(model)
    try:
        if device is not None:
            model.to(device)
        conditioning = check_conditioning(model, conditioning)
        captured, resolved = planned(model, config, filter_fn, shape, conditioning)
        num_train_timesteps = scheduler.config.num_train_timesteps
        keeps = {"callback": callback, "progress": progress}
        points = calibration_set(model, scheduler, shape, config, conditioning, folder=folder, **keeps)
        if config.learns:
            points = CalibrationSet(points.x_t.float(), points.timesteps, in_type(points.conditioning))
        if config.learns or config.target_bits is not None:
            resolved = sensitive(captured, resolved, points, config, num_train_timesteps, **keeps)
        if config.learns:
            graph = insert_fake_quantizers(captured.graph, PQCADQuantizer(resolved, "weights"))
            learned = learn(graph, resolved, points, config, num_train_timesteps, folder=folder, **keeps)
        else:
            learned = Learned(prepare(captured, resolved, config, num_train_timesteps))
            calibrate(learned.graph, resolved, points, config, **keeps)
        timestep = Timestep(config.timestep_groups, num_train_timesteps)
        layers = fold(learned.graph, model, resolved, timestep)
        attach(model, QuantizedState(config, resolved, timestep, learned.transitions, learned.log))
    except BaseException:
        if device is not None:
            model.to(home)
        raise
    # nothing above touched the model's layers; nothing below can fail
    adopt(model, learned.graph if config.learns else None, layers)
    install_timestep(model, timestep)


def to_learn(network: nn.Module) -> nn.Module:
    """A copy to learn on: in float32, and channels last for fast convolutions.

    A network that is frozen as a whole, as teachers are, learns; single frozen parameters, such as fixed Fourier
    features, do not.
    """
    copied = copy.deepcopy(network).float().to(memory_format=torch.channels_last)
    if not any(parameter.requires_grad for parameter in copied.parameters()):
        for parameter in copied.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return copied


def planned(
    model: nn.Module,
    config: PQCADConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    shape: tuple[int, int, int],
    conditioning: dict[str, Any],
) -> tuple[Capture, Plan]:
    """The graph that will be quantized, and its plan; raises all that can be known before any work is done."""
    # learning trains the graph, which shares its parameters with what it is captured from
    subject = to_learn(model) if config.learns else model
    captured = capture(subject, shape, in_type(conditioning) if config.learns else conditioning)
    resolved = _resolve(captured, model, config, filter_fn)
    if not resolved.quantized:
        raise ValueError(f"the plan quantizes no layer of {type(model).__name__}:\n{resolved}")
    if config.learns:
        policies(config, resolved)
    return captured, resolved


def _check_model(model: nn.Module) -> None:
    if quantized_state(model) is not None:
        raise ValueError(
            f"this {type(model).__name__} is quantized already; quantize_ takes the full-precision network"
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"this {type(model).__name__} was quantized by something else; load it without quantization_config"
        )
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise ValueError(f"{name} is a {type(parameter).__name__}: the network was quantized by something else")
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no values; load the weights first")
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name} holds NaN or infinity; load sound weights first")


def _scheduler(model: nn.Module, scheduler) -> DDIMScheduler:
    if scheduler is not None:
        return as_ddim(scheduler)
    found = find_scheduler(model)
    if found is None:
        found = DDIMScheduler()
        warnings.warn(
            "no scheduler was given and none is saved beside the network: calibrating on DDIMScheduler()'s noise "
            "process (linear betas, epsilon prediction). Pass scheduler=... if the network was trained on another",
            stacklevel=3,
        )
    return found


def prepare(captured: Capture, resolved: Plan, config: PQCADConfig, num_train_timesteps: int) -> GraphModule:
    """Put the plan's fake quantizers into the captured graph, with the timestep wired to the activations'."""
    graph = insert_fake_quantizers(captured.graph, PQCADQuantizer(resolved, "weights"))
    quantizer = PQCADQuantizer(resolved, "activations", groups=config.timestep_groups)
    return insert_activations(graph, quantizer, num_train_timesteps)


def calibrate(
    prepared: GraphModule,
    resolved: Plan,
    points: CalibrationSet,
    config: PQCADConfig,
    *,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = True,
) -> None:
    """Fit every grid of a prepared graph by least squares: weights to themselves, activations to full-precision inputs.

    Raises:
        FloatingPointError: NaN or infinite activations; names the layer.
    """
    with weights_in_full_precision(prepared):
        observe(prepared, points, config.calibration_batch_size, callback=callback, progress=progress)
    fit_weights(prepared, {row.fqn: row.weight_bits or 0 for row in resolved.quantized})
    bits = {row.fqn: row.activation_bits for row in resolved.quantized if row.activation_bits is not None}
    fit_activations(prepared, bits, callback=callback, progress=progress)


def sensitive(
    captured: Capture,
    resolved: Plan,
    points: CalibrationSet,
    config: PQCADConfig,
    num_train_timesteps: int,
    *,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = True,
) -> Plan:
    """The plan with each layer's sensitivity, and more bits where ``config.target_bits`` allows them."""
    trial = Capture(copy.deepcopy(captured.graph), captured.x_t, captured.timesteps)
    graph = prepare(trial, resolved, config, num_train_timesteps)
    head = points[: config.calibration_points]
    with weights_in_full_precision(graph):
        observe(graph, head, config.calibration_batch_size)
    shown: dict[str, Any] = {"callback": callback, "progress": progress}
    found = layer_sensitivity(graph, resolved, head, rungs=config.target_bits is not None, **shown)
    return spend_bits(resolved, found, config.target_bits)


@torch.no_grad()
def fold(prepared: GraphModule, model: nn.Module, resolved: Plan, timestep: Timestep) -> dict[str, QuantizedLayer]:
    """Make the modules that compute what the prepared graph's fake-quantized layers compute, by layer name."""
    modules = dict(prepared.named_modules())
    layers: dict[str, QuantizedLayer] = {}
    for node in prepared.graph.nodes:
        if node.target not in GEMMS or node.args[1].op != "call_module":
            continue
        fqn = layer_fqn(node) or ""
        row, original = resolved[fqn], model.get_submodule(fqn)
        weights = modules[str(node.args[1].target)]
        kind = QuantizedConv2d if isinstance(original, nn.Conv2d) else QuantizedLinear
        layer = kind.like(original, row.weight_bits, row.activation_bits, row.segments, timestep)
        layer.to(original.weight.device)
        weight = prepared.get_parameter(f"unet.{weight_fqn(node)}").detach().float()
        if weight.dim() == 4:  # (out, in, kh, kw) to rows in (kh, kw, in) order
            weight = weight.permute(0, 2, 3, 1)
        integers = quantize(weight.flatten(1), weights.scale[:, None], weights.quant_min, weights.quant_max)
        bias = None if original.bias is None else prepared.get_parameter(f"unet.{fqn}.bias")
        layer.set_weight(integers, weights.scale, bias)
        if row.activation_bits is not None:
            activations = modules[str(node.args[0].target)]
            layer.set_grid(activations.scale, activations.low)
        layers[fqn] = layer.train(original.training)
    missing = {row.fqn for row in resolved.quantized} - layers.keys()
    if missing:
        raise RuntimeError(f"the prepared graph lost layers of the plan: {', '.join(sorted(missing))}")
    return layers


@torch.no_grad()
def adopt(model: nn.Module, learned: GraphModule | None, layers: dict[str, QuantizedLayer]) -> None:
    """Put the quantized layers into the network, and what else a graph learned into its parameters."""
    for fqn, layer in layers.items():
        model.set_submodule(fqn, layer)
    values = {} if learned is None else dict(learned.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():  # norms; what the forward never reads is not in the graph
        if f"unet.{name}" in values:
            parameter.copy_(values[f"unet.{name}"])


@torch.no_grad()
def dequantized_state(model: nn.Module, reference: nn.Module) -> dict[str, torch.Tensor]:
    """A quantized network's state as the full-precision network has it, weights dequantized.

    Raises:
        ValueError: the reference's state has other names or shapes.
    """
    layers = {row.fqn: model.get_submodule(row.fqn) for row in quantized_state(model).plan.quantized}
    values = {name: v for name, v in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    for fqn, layer in layers.items():
        values[f"{fqn}.weight"] = layer.dequantized_weight()
        if layer.bias is not None:
            values[f"{fqn}.bias"] = layer.bias
    check_structure(values, reference)
    return values


def check_structure(values: dict[str, torch.Tensor], reference: nn.Module) -> None:
    """Compare a network's full-precision state with another network's, by names and shapes.

    Raises:
        ValueError: they differ; names the first tensor that does.
    """
    own = reference.state_dict()
    wrong = [name for name in sorted(own.keys() | values.keys()) if _shape_of(own, name) != _shape_of(values, name)]
    if wrong:
        raise ValueError(
            f"the reference {type(reference).__name__} is of another structure than the network: {wrong[0]} is "
            f"{_shape_of(own, wrong[0])} there and {_shape_of(values, wrong[0])} here"
        )


@torch.no_grad()
def unfold(
    model: nn.Module, reference: nn.Module, shape: tuple[int, int, int], conditioning: dict[str, Any]
) -> tuple[GraphModule, nn.Module]:
    """Invert :func:`fold`: the fake-quantized graph that computes what a quantized network does, to learn on.

    Args:
        reference: the full-precision network of the same structure. shape: (C, H, W).

    Returns:
        the graph, whose parameters are its own, and the full-precision network that it was captured from.

    Raises:
        ValueError: the network is not quantized, or the reference is of another structure.
    """
    state = quantized_state(model)
    if state is None:
        raise ValueError(f"this {type(model).__name__} is not quantized by pqcad_ao: call quantize_ first")
    layers = {row.fqn: model.get_submodule(row.fqn) for row in state.plan.quantized}
    skeleton = to_learn(reference)
    skeleton.load_state_dict(dequantized_state(model, reference))
    captured = capture(skeleton, shape, in_type(conditioning))
    graph = prepare(captured, state.plan, state.config, state.timestep.num_train_timesteps)
    for fqn, (weights, _) in weight_quantizers(graph).items():
        bits = state.plan[fqn].weight_bits
        weights.move(bits, bits, 1.0)
        weights.scale.copy_(layers[fqn].weight_scale)
    for fqn, activations in activation_quantizers(graph).items():
        bits = state.plan[fqn].activation_bits
        activations.move(bits, bits, 1.0)
        activations.scale.copy_(layers[fqn].input_scale)
        activations.low.copy_(layers[fqn].input_low)
    return graph, skeleton


def _shape_of(values: dict[str, torch.Tensor], name: str) -> list[int] | None:
    return list(values[name].shape) if name in values else None


@register_quantize_module_handler(PQCADConfig)
def _quantize_root(module: nn.Module, config: PQCADConfig) -> nn.Module:
    """torchao's ``quantize_`` calls this for every module that its filter lets through."""
    if not any(True for _ in module.children()):
        raise ValueError(
            f"torchao's quantize_ handed PQCADConfig a single {type(module).__name__}: it quantizes a whole network, "
            "convolutions included. Write pqcad_ao.quantize_(unet, config), or "
            "torchao.quantization.quantize_(unet, config, filter_fn=pqcad_ao.is_root)"
        )
    quantize_(module, config)
    return module


__all__ = ["adopt", "calibrate", "fold", "is_root", "plan", "prepare", "quantize_", "unfold"]
