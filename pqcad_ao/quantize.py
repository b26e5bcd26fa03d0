"""``quantize_``: a full-precision UNet becomes a quantized one, in place, from its own sampling trajectories."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from pqcad_ao import denoiser
from pqcad_ao.config import PQCADConfig
from pqcad_ao.denoiser import Span, cast_floats, check_conditioning, placement, timestep_group
from pqcad_ao.diffusion.cache_plan import drop_cache_plan
from pqcad_ao.diffusion.calibration import CalibrationSet, calibration_set, to_observe
from pqcad_ao.diffusion.ddim import reach_of
from pqcad_ao.diffusion.layer_inputs import LayerInputs
from pqcad_ao.diffusion.noise import Sampler
from pqcad_ao.diffusion.process import as_sampler, clip_of, find_scheduler, is_flow, settings_of, span_of
from pqcad_ao.graph.capture import Capture
from pqcad_ao.graph.plan import Plan
from pqcad_ao.graph.suitable import check_suitable
from pqcad_ao.learn.progressive import Learned, learn
from pqcad_ao.learn.ptq import calibrate, fit_grids, prepare
from pqcad_ao.learn.selective import marked
from pqcad_ao.learn.sensitivity import sensitive
from pqcad_ao.nn.diffusers_plugin import attach
from pqcad_ao.nn.state import QuantizedState, quantized_state
from pqcad_ao.nn.timestep import Timestep, install_timestep
from pqcad_ao.pipeline import PipelineWalk, network_of
from pqcad_ao.plan import planned
from pqcad_ao.prepare.annotate import PQCADQuantizer, insert_fake_quantizers
from pqcad_ao.prepare.fold import adopt, fold
from pqcad_ao.prepare.observe import input_forms, take_inputs
from pqcad_ao.utils.processes import check_share, rank_and_world
from pqcad_ao.utils.runs import shared_run


def is_root(module: nn.Module, fqn: str) -> bool:
    """The ``filter_fn`` with which torchao's own ``quantize_`` hands us the whole network.

    Example:
        >>> from torchao.quantization import quantize_
        >>> config = PQCADConfig(mode="ptq", calibration_points=32, calibration_steps=4)  # of a length for an example
        >>> quantize_(unet, config, filter_fn=is_root)
        >>> plan(unet)["conv_in"].weight_bits
        8
    """
    return fqn == ""


def quantize_(
    model: nn.Module | DiffusionPipeline,
    config: PQCADConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | str | None = None,
    *,
    scheduler: Any = None,
    sample_shape: tuple[int, ...] | None = None,
    conditioning: dict[str, Any] | None = None,
    prompts: list[str] | None = None,
    call: dict[str, Any] | None = None,
    time_scale: float | None = None,
    folder: str | Path | None = None,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = True,
) -> None:
    """Quantize a diffusion network's convolutions and linears in place, without data.

    The network stays what it was, a diffusers model that its pipelines accept, with the layers of the plan replaced by
    their :class:`~pqcad_ao.nn.layers.QuantizedLayer`. A call that fails leaves it as it was. Under torchrun all
    processes make this call alike, share the work, and have the same network afterwards.

    Args:
        model: a diffusers ``UNet2DModel`` or ``UNet2DConditionModel``, or a module called as ``f(x_t, timesteps)``. Or
            a diffusers pipeline, whose network is quantized; it brings scheduler, shape and conditioning of its own.
        config: what to do.
        filter_fn: ``(module, fqn) -> bool``; layers it refuses stay in floating point, and the plan says so.
        device: where the network goes first, as in torchao.
        scheduler: of diffusers, the pipeline's own: any of a DDPM noise process given by betas (DDIM, Euler,
            DPM-Solver++, UniPC, LCM ...), of flow matching or of EDM. Calibration walks the deterministic sampler
            of its process (:func:`~pqcad_ao.diffusion.process.as_sampler`), with its prediction type and clipping. If
            None, the one saved beside the network, or else diffusers' ``DDIMScheduler()``, with a warning.
        sample_shape: (C, H, W), for networks whose config does not say it.
        conditioning: keyword arguments of ``model.forward`` with rows to draw from, for conditional networks: any
            number of them, each used as often as the next; without learning eight, spread evenly.
            ``{"guidance_scale": 5.0, "negative": {...}}`` in it calibrate under guidance: ``negative`` holds what is
            otherwise in the call without the prompt.
        prompts: of a pipeline: what it draws while it is calibrated, a few dozen as its users write them.
        call: of a pipeline: further arguments of its call, such as ``{"guidance_scale": 5.0}``; a list with as many
            entries as there are prompts goes along with them. C_QC is what its network is given under these.
        time_scale: of a network that is called with a timestep times this, such as 1 / 1000 where its time goes from 0
            to 1; it remembers that. None: as diffusers' pipelines call it (Flux with 1 / 1000), or 1.
        folder: where a long run keeps what it needs to go on after it was killed: the calibration set, checkpoints, and
            ``log.jsonl`` with a line for each update. The same call with the same folder goes on, to the same result.
            Of several processes one that all of them see.
        callback: called as ``callback(stage, done, total)``.
        progress: show bars.

    Raises:
        ValueError: nothing to quantize, quantized before, conditioning missing, a foreign scheduler, a bad override or
            ``time_scale``, too few iterations for the ladders, another run's folder. BlockingIOError: a run is at work
            in ``folder``.
        FloatingPointError: NaN or infinity in the weights or during calibration, or learning that diverged; says where.
        RuntimeError: ``torch.export`` cannot capture the network. ConnectionError: another process ended, or did not
            make this call.

    Example:
        >>> config = PQCADConfig(mode="ptq", calibration_points=32, calibration_steps=4)  # of a length for an example
        >>> quantize_(unet, config, scheduler=scheduler, progress=False)
        >>> row = plan(unet)["mid_block.resnets.0.conv1"]
        >>> row.weight_bits, row.activation_bits
        (4, 6)
    """
    _check_config(config)
    network = network_of(model) if isinstance(model, DiffusionPipeline) else model
    _check_model(network)
    if config.learns:
        check_share(config.batch_size)
    denoiser.set_time_scale(network, time_scale)
    keeps: dict[str, Any] = {"folder": folder, "callback": callback, "progress": progress and rank_and_world()[0] == 0}
    with _moved(model, network, device):
        source: _Source
        if isinstance(model, DiffusionPipeline):
            _check_brought(model, scheduler=scheduler, sample_shape=sample_shape, conditioning=conditioning)
            source = PipelineWalk(model, prompts, call, config)
        else:
            _check_no_pipeline(model, prompts=prompts, call=call)
            source = _Trajectories(model, config, scheduler, sample_shape, conditioning)
        span = span_of(source.scheduler)
        captured, resolved = planned(network, config, filter_fn, source.shape, source.conditioning)
        given = (source.shape, source.conditioning, settings_of(source.scheduler), prompts)
        with shared_run(folder, network.state_dict(), config, *given):
            resolved, learned = _learn(captured, resolved, source, config, span, **keeps)
        timestep = Timestep(
            config.timestep_groups,
            source.scheduler.config.num_train_timesteps,
            continuous=is_flow(source.scheduler),
            time_scale=denoiser.time_scale(network),
            bounds=None if isinstance(span, int) else span,
        )
        timestep.clip = clip_of(source.scheduler)
        layers = fold(learned.graph, network, resolved, timestep)
        attach(
            network, QuantizedState(config, resolved, timestep, learned.transitions, learned.log, facts=learned.facts)
        )
    # nothing above touched the network's layers; nothing below can fail
    adopt(network, learned.graph if config.learns else None, layers)
    install_timestep(network, timestep)
    drop_cache_plan(network, "quantize_")


class _Trajectories:
    """A network and its sampler, as a source of C_QC; :class:`~pqcad_ao.pipeline.PipelineWalk` is another."""

    def __init__(
        self,
        network: nn.Module,
        config: PQCADConfig,
        scheduler: Any,
        sample_shape: tuple[int, ...] | None,
        conditioning: dict[str, Any] | None,
    ) -> None:
        self.network, self.config, self.scheduler = network, config, _scheduler(network, scheduler)
        self.shape = denoiser.sample_shape(network, sample_shape)
        self.conditioning = check_conditioning(network, conditioning)

    def points(self, **keeps: Any) -> CalibrationSet:
        given = (self.network, self.scheduler, self.shape, self.config, self.conditioning)
        return calibration_set(*given, share=rank_and_world(), **keeps)


_Source: TypeAlias = _Trajectories | PipelineWalk


def _learn(
    captured: Capture,
    resolved: Plan,
    source: _Source,
    config: PQCADConfig,
    span: Span,
    *,
    folder: str | Path | None,
    callback: Callable[[str, int, int], None] | None,
    progress: bool,
) -> tuple[Plan, Learned]:
    """The plan with what was measured on the calibration set, and the graph with every grid fitted or learned."""
    forms = input_forms(resolved)
    if not (config.learns or config.target_bits is not None or forms):  # weights alone: no point is looked at
        graph = prepare(captured, resolved, config, span)
        fit_grids(graph, resolved, callback=callback, progress=progress)
        return resolved, Learned(graph)
    # without learning it is known beforehand which points are looked at
    inputs = None if config.learns or config.clusters else LayerInputs(forms)
    points = source.points(inputs=inputs, folder=folder, callback=callback, progress=progress)
    reach = None
    if config.sample_weights == "reach":
        reach = reach_of(as_sampler(source.scheduler), config.calibration_steps, points.timesteps)
    if config.learns:
        points = CalibrationSet(points.x_t.float(), points.timesteps, cast_floats(points.conditioning))
    if config.learns or config.target_bits is not None:
        resolved = sensitive(captured, resolved, points, config, span, callback=callback, progress=progress)
    if config.learns:
        graph = insert_fake_quantizers(captured.graph, PQCADQuantizer(resolved, "weights"))
        keeps: dict[str, Any] = {"folder": folder, "callback": callback, "progress": progress}
        learned = learn(graph, resolved, points, config, span, reach=reach, **keeps)
        return marked(resolved, learned.trained), learned
    graph = prepare(captured, resolved, config, span)
    if inputs is None:
        seen = to_observe(points, config, span)
        calibrate(graph, resolved, seen, config, callback=callback, progress=progress)
    else:
        take_inputs(graph, inputs.values, timestep_group(points.timesteps, config.timestep_groups, span))
        fit_grids(graph, resolved, callback=callback, progress=progress)
    return resolved, Learned(graph)


@contextmanager
def _moved(
    model: nn.Module | DiffusionPipeline, network: nn.Module, device: torch.device | str | None
) -> Iterator[None]:
    """Move a network, or its pipeline, to ``device``, and back where it was if anything is raised."""
    home, _ = placement(network)
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


def _check_brought(pipeline: DiffusionPipeline, **given: Any) -> None:
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise ValueError(
            f"{type(pipeline).__name__} brings its own {' and '.join(wrong)}: leave it out, or hand over the network "
            "itself in place of the pipeline"
        )


def _check_no_pipeline(model: nn.Module, **given: Any) -> None:
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise ValueError(
            f"{' and '.join(wrong)} are for pipelines, and a {type(model).__name__} is none: hand over the pipeline, "
            "or conditioning={'name of forward's argument': tensor}"
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
    check_suitable(model)
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise ValueError(f"{name} is a {type(parameter).__name__}: the network was quantized by something else")
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no values; load the weights first")
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name} holds NaN or infinity; load sound weights first")


def _scheduler(model: nn.Module, given: Any) -> Sampler:
    """The sampler of the scheduler that was given, or of the one saved beside the network, or diffusers' own."""
    scheduler = find_scheduler(model) if given is None else as_sampler(given)
    if scheduler is None:
        scheduler = DDIMScheduler()
        warnings.warn(
            "no scheduler was given and none is saved beside the network: calibrating on DDIMScheduler()'s noise "
            "process (linear betas, epsilon prediction). Pass scheduler=... if the network was trained on another",
            stacklevel=4,
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
