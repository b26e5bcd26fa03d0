"""``quantize_``: a full-precision UNet becomes a quantized one, in place, from its own sampling trajectories."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from pqcad_ao import denoiser
from pqcad_ao.config import PQCADConfig
from pqcad_ao.denoiser import cast_floats, check_conditioning, placement
from pqcad_ao.diffusion.calibration import CalibrationSet, calibration_set
from pqcad_ao.diffusion.process import as_ddim, find_scheduler
from pqcad_ao.graph.capture import Capture
from pqcad_ao.graph.plan import Plan
from pqcad_ao.learn.progressive import Learned, learn
from pqcad_ao.learn.ptq import calibrate, prepare
from pqcad_ao.learn.sensitivity import sensitive
from pqcad_ao.nn.diffusers_plugin import attach
from pqcad_ao.nn.state import QuantizedState, quantized_state
from pqcad_ao.nn.timestep import Timestep, install_timestep
from pqcad_ao.plan import planned
from pqcad_ao.prepare.annotate import PQCADQuantizer, insert_fake_quantizers
from pqcad_ao.prepare.fold import adopt, fold
from pqcad_ao.utils.runs import only_run_in


def is_root(module: nn.Module, fqn: str) -> bool:
    """The ``filter_fn`` with which torchao's own ``quantize_`` hands us the whole network."""
    return fqn == ""


def quantize_(
    model: nn.Module,
    config: PQCADConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | str | None = None,
    *,
    scheduler: Any = None,
    sample_shape: tuple[int, int, int] | None = None,
    conditioning: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = True,
) -> None:
    """Quantize a diffusion network's convolutions and linears in place, without data.

    The network stays what it was, a diffusers model that its pipelines accept, with the layers of the plan replaced by
    their :class:`~pqcad_ao.nn.layers.QuantizedLayer`. A call that fails leaves it as it was.

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
            too few iterations for the ladders, another run's folder. BlockingIOError: a run is at work in ``folder``.
        FloatingPointError: NaN or infinity in the weights or during calibration, or learning that diverged; says where.
        RuntimeError: ``torch.export`` cannot capture the network.
    """
    _check_config(config)
    _check_model(model)
    scheduler = _scheduler(model, scheduler)
    shape = denoiser.sample_shape(model, sample_shape)
    num_train_timesteps = scheduler.config.num_train_timesteps
    keeps: dict[str, Any] = {"folder": folder, "callback": callback, "progress": progress}
    with _moved(model, device):
        conditioning = check_conditioning(model, conditioning)
        captured, resolved = planned(model, config, filter_fn, shape, conditioning)
        with only_run_in(folder):
            points = calibration_set(model, scheduler, shape, config, conditioning, **keeps)
            resolved, learned = _learn(captured, resolved, points, config, num_train_timesteps, **keeps)
        timestep = Timestep(config.timestep_groups, num_train_timesteps)
        layers = fold(learned.graph, model, resolved, timestep)
        attach(model, QuantizedState(config, resolved, timestep, learned.transitions, learned.log))
    # nothing above touched the model's layers; nothing below can fail
    adopt(model, learned.graph if config.learns else None, layers)
    install_timestep(model, timestep)


def _learn(
    captured: Capture,
    resolved: Plan,
    points: CalibrationSet,
    config: PQCADConfig,
    num_train_timesteps: int,
    *,
    folder: str | Path | None,
    callback: Callable[[str, int, int], None] | None,
    progress: bool,
) -> tuple[Plan, Learned]:
    """The plan with what was measured on the calibration set, and the graph with every grid fitted or learned."""
    if config.learns:
        points = CalibrationSet(points.x_t.float(), points.timesteps, cast_floats(points.conditioning))
    if config.learns or config.target_bits is not None:
        resolved = sensitive(
            captured, resolved, points, config, num_train_timesteps, callback=callback, progress=progress
        )
    if config.learns:
        graph = insert_fake_quantizers(captured.graph, PQCADQuantizer(resolved, "weights"))
        return resolved, learn(
            graph, resolved, points, config, num_train_timesteps, folder=folder, callback=callback, progress=progress
        )
    graph = prepare(captured, resolved, config, num_train_timesteps)
    calibrate(graph, resolved, points, config, callback=callback, progress=progress)
    return resolved, Learned(graph)


@contextmanager
def _moved(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """Move a network to ``device``, and back where it was if anything is raised."""
    home, _ = placement(model)
    try:
        if device is not None:
            model.to(device)
        yield
    except BaseException:
        if device is not None:
            model.to(home)
        raise


def _check_config(config: PQCADConfig) -> None:
    if not isinstance(config, PQCADConfig):
        raise TypeError(
            f"config is a {type(config).__name__}: write PQCADConfig(); for other configs use torchao's quantize_"
        )


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


def _scheduler(model: nn.Module, given: Any) -> DDIMScheduler:
    """The DDIM sampler of the scheduler that was given, or of the one saved beside the network, or diffusers' own."""
    scheduler = find_scheduler(model) if given is None else as_ddim(given)
    if scheduler is None:
        scheduler = DDIMScheduler()
        warnings.warn(
            "no scheduler was given and none is saved beside the network: calibrating on DDIMScheduler()'s noise "
            "process (linear betas, epsilon prediction). Pass scheduler=... if the network was trained on another",
            stacklevel=3,
        )
    return scheduler


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
