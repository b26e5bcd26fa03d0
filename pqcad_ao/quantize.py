"""``quantize_``: a full-precision UNet becomes a quantized one, in place, from its own sampling trajectories."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.transform_module import register_quantize_module_handler
from tqdm.auto import tqdm

from pqcad_ao.calibration import CalibrationSet, as_ddim, calibration_set, find_scheduler
from pqcad_ao.capture import GEMMS, Capture, capture, check_conditioning, placement, weight_fqn
from pqcad_ao.capture import sample_shape as find_sample_shape
from pqcad_ao.config import PQCADConfig
from pqcad_ao.fake_quant import ActivationFakeQuantize, WeightFakeQuantize, quantize
from pqcad_ao.nn import QuantizedConv2d, QuantizedLayer, QuantizedLinear, Timestep, install_timestep
from pqcad_ao.passes.wire_timesteps import wire_timesteps
from pqcad_ao.plan import Plan, resolve
from pqcad_ao.quantizer import PQCADQuantizer
from pqcad_ao.serialization import attach, quantized_state

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

    Args: as for :func:`quantize_`; a quantized network needs none.
    """
    state = quantized_state(model)
    if state is not None:
        return state.plan
    return resolve(_capture(model, sample_shape, conditioning), model, config or PQCADConfig(), filter_fn)


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
        conditioning: keyword arguments of ``model.forward`` with one row for each sample, for conditional networks.
        callback: called as ``callback(stage, done, total)``.
        progress: show bars.

    Raises:
        ValueError: nothing to quantize, quantized before, conditioning missing, a foreign scheduler, a bad override.
        FloatingPointError: NaN or infinity in the weights or during calibration; says where.
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
        captured = capture(model, shape, conditioning)
        resolved = resolve(captured, model, config, filter_fn)
        if not resolved.quantized:
            raise ValueError(f"the plan quantizes no layer of {type(model).__name__}:\n{resolved}")
        points = calibration_set(model, scheduler, shape, config, conditioning, progress=progress)
        num_train_timesteps = scheduler.config.num_train_timesteps
        prepared = prepare(captured, resolved, config, num_train_timesteps)
        calibrate(prepared, points, config, callback=callback, progress=progress)
        timestep = Timestep(config.timestep_groups, num_train_timesteps)
        layers = fold(prepared, model, resolved, timestep)
        attach(model, config, resolved, timestep)
    except BaseException:
        if device is not None:
            model.to(home)
        raise
    for fqn, layer in layers.items():  # nothing above touched the model's layers; nothing below can fail
        model.set_submodule(fqn, layer)
    install_timestep(model, timestep)


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
    quantizer = PQCADQuantizer(resolved, groups=config.timestep_groups, seed=config.seed)
    # PT2E would merge a batch norm into the convolution before it, which here stays a module of its own
    _retarget(captured.graph, torch.ops.aten.batch_norm.default, _batch_norm)
    with torch.random.fork_rng(devices=[]):  # PT2E draws example inputs from the global generator
        graph = prepare_qat_pt2e(captured.graph, quantizer)
    _retarget(graph, _batch_norm, torch.ops.aten.batch_norm.default)
    timesteps = [node for node in graph.graph.nodes if node.op == "placeholder"][1]
    return wire_timesteps(graph, timesteps, config.timestep_groups, num_train_timesteps)


def _batch_norm(*args: Any) -> torch.Tensor:
    return torch.ops.aten.batch_norm.default(*args)


def _retarget(graph: GraphModule, old: Callable, new: Callable) -> None:
    for node in graph.graph.nodes:
        if node.target is old:
            node.target = new


@torch.no_grad()
def calibrate(
    prepared: GraphModule,
    points: CalibrationSet,
    config: PQCADConfig,
    *,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = True,
) -> None:
    """Fit every grid of a prepared graph by least squares: weights at once, activations to full-precision inputs.

    Raises:
        FloatingPointError: NaN or infinite activations; names the layer.
    """
    names = layer_names(prepared)
    activations = {
        name: module for name, module in prepared.named_modules() if isinstance(module, ActivationFakeQuantize)
    }
    quantizers = [m for m in prepared.modules() if isinstance(m, (ActivationFakeQuantize, WeightFakeQuantize))]
    for module in quantizers:
        module.enable_observer(isinstance(module, ActivationFakeQuantize))
        module.enable_fake_quant(False)
    total = -(-len(points) // config.calibration_batch_size)
    for done, batch in enumerate(
        tqdm(
            points.batches(config.calibration_batch_size),
            total=total,
            desc="observing",
            disable=not progress,
            leave=False,
        )
    ):
        prepared(*batch)
        if callback is not None:
            callback("observe", done + 1, total)
    for done, (name, module) in enumerate(
        tqdm(activations.items(), desc="fitting activations", disable=not progress, leave=False)
    ):
        try:
            module.fit()
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} at the input of {names[name]} while calibrating") from error
        if callback is not None:
            callback("fit", done + 1, len(activations))
    for module in quantizers:
        module.enable_observer(False)
        module.enable_fake_quant(True)


def layer_names(prepared: GraphModule) -> dict[str, str]:
    """The layer that each fake quantizer of a prepared graph serves: graph module name to layer name."""
    found = {}
    for node in prepared.graph.nodes:
        if node.target in GEMMS:
            for source in node.args[:2]:
                if source.op == "call_module":
                    found[str(source.target)] = _layer_fqn(node)
    return found


def _layer_fqn(node: torch.fx.Node) -> str:
    """Like ``capture.weight_fqn``, seen through a weight's fake quantizer."""
    weight = node.args[1]
    if weight.op == "call_module":
        weight = weight.args[0]
    return str(weight.target).removeprefix("unet.").rpartition(".")[0]


@torch.no_grad()
def fold(prepared: GraphModule, model: nn.Module, resolved: Plan, timestep: Timestep) -> dict[str, QuantizedLayer]:
    """Make the modules that compute what the prepared graph's fake-quantized layers compute, by layer name."""
    modules = dict(prepared.named_modules())
    layers: dict[str, QuantizedLayer] = {}
    for node in prepared.graph.nodes:
        if node.target not in GEMMS or node.args[1].op != "call_module":
            continue
        fqn = _layer_fqn(node)
        row, original = resolved[fqn], model.get_submodule(fqn)
        weights = modules[str(node.args[1].target)]
        kind = QuantizedConv2d if isinstance(original, nn.Conv2d) else QuantizedLinear
        layer = kind.like(original, row.weight_bits, row.activation_bits, row.segments, timestep)
        layer.to(original.weight.device)
        weight = original.weight.detach().float()
        if not weights.fitted:
            weights(weight)
        if weight.dim() == 4:  # (out, in, kh, kw) to rows in (kh, kw, in) order
            weight = weight.permute(0, 2, 3, 1)
        integers = quantize(weight.flatten(1), weights.scale[:, None], weights.quant_min, weights.quant_max)
        layer.set_weight(integers, weights.scale, original.bias)
        if row.activation_bits is not None:
            activations = modules[str(node.args[0].target)]
            layer.set_grid(activations.scale, activations.low)
        layers[fqn] = layer.train(original.training)
    missing = {row.fqn for row in resolved.quantized} - layers.keys()
    if missing:
        raise RuntimeError(f"the prepared graph lost layers of the plan: {', '.join(sorted(missing))}")
    return layers


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


__all__ = ["calibrate", "fold", "is_root", "layer_names", "plan", "prepare", "quantize_", "weight_fqn"]
