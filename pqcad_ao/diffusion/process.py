"""Schedulers of diffusers: which noise process each stands for, as a deterministic sampler walks it."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from pqcad_ao.denoiser import Span
from pqcad_ao.diffusion.noise import EDM, RectifiedFlow, Sampler, VariancePreserving, c_noise, process_of
from pqcad_ao.utils.checks import check_count
from pqcad_ao.utils.files import read_json

# Each walks the variance-preserving process of Ho et al. 2020 in its own way. A file may name these, FLOWS and EDMS.
VARIANCE_PRESERVING = (
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMParallelScheduler,
    DDPMParallelScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    SASolverScheduler,
    TCDScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
# They draw noise while they sample.
STOCHASTIC = (
    DDPMScheduler,
    DDPMParallelScheduler,
    CogVideoXDPMScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UnCLIPScheduler,
    FlowMatchLCMScheduler,
)
FLOWS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
EDMS = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)
FAMILY = (*VARIANCE_PRESERVING, *FLOWS, *EDMS)
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # that DDIMScheduler knows by name
PREDICTIONS = ("epsilon", "v_prediction", "sample")
LARGEST_SHIFT = 1.15  # mu of the largest pictures, where a scheduler does not say it
MOST_TIMESTEPS = 2**20  # of a noise process that is read from a file; of those that are known most have 1000
LEAST_SIGNAL = 1e-6  # power of the image in x_t


def as_sampler(scheduler) -> Sampler:
    """A deterministic sampler of a scheduler's noise process: DDIM, or Euler's steps of a rectified flow or of EDM.

    Calibration walks this one and not the scheduler itself. Where x_t is at a timestep hangs on the process and hardly
    on the solver; a solver without noise of its own and without memory makes a walk that can be cut anywhere, and gone
    on with to the same bits. What a network was trained on is kept (betas, prediction type, a flow's shift), and how
    its pictures are drawn, where the scheduler says it: timesteps' spacing and offset, thresholding, clipping.

    A flow's dynamic shift is a static one of the largest pictures, ``max_shift``; Karras' and other spacings of sigmas
    are left out. Both change which timesteps are visited, and not what the network is given there.

    Raises:
        ValueError: it is none of ``FAMILY``, or has options with which it walks another process.
    """
    if not isinstance(scheduler, FAMILY):
        raise ValueError(
            f"scheduler is a {getattr(scheduler, '__name__', type(scheduler).__name__)}: allowed are instances of "
            f"{', '.join(kind.__name__ for kind in FAMILY)}. "
            "If the network was trained on a DDPM noise process, pass a DDIMScheduler with its betas and "
            "prediction_type; if on a rectified flow, a FlowMatchEulerDiscreteScheduler with its shift"
        )
    if isinstance(scheduler, EDMS):
        return _as_edm(scheduler)
    return _as_flow(scheduler) if is_flow(scheduler) else _as_ddim(scheduler)


def is_flow(scheduler) -> bool:
    """Whether a scheduler walks a rectified flow."""
    return isinstance(scheduler, FLOWS) or bool(scheduler.config.get("use_flow_sigmas"))


def process_name(scheduler) -> str:
    """The noise process that a scheduler walks, as errors say it."""
    if isinstance(scheduler, EDMS):
        return EDM.name
    return RectifiedFlow.name if is_flow(scheduler) else VariancePreserving.name


def span_of(scheduler) -> Span:
    """What a network is called with under a scheduler, which groups of timesteps divide."""
    if isinstance(scheduler, EDMS):
        return c_noise(scheduler.config.sigma_min), c_noise(scheduler.config.sigma_max)
    return scheduler.config.num_train_timesteps


def check_counted(span: Span, doing: str) -> None:
    """Raises ValueError: the timesteps are EDM's, for which something is not made."""
    if not isinstance(span, int):
        raise ValueError(
            f"{doing} is not for networks of {EDM.name}, which are called with ln(sigma) / 4: such a network is "
            "quantized, sampled, saved and compiled with torch.compile(backend='pqcad')"
        )


def draws_noise(scheduler) -> bool:
    """Whether a scheduler draws noise of its own while it samples."""
    config = scheduler.config
    by_option = config.get("algorithm_type", "").startswith("sde") or config.get("stochastic_sampling", False)
    return isinstance(scheduler, STOCHASTIC) or by_option


def clip_of(scheduler) -> float:
    """The range to which a scheduler clips x_0; 0 where it does not."""
    config = scheduler.config
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else 0.0


def _as_ddim(scheduler) -> DDIMScheduler:
    config, name = scheduler.config, type(scheduler).__name__
    kind = config.get("prediction_type", "epsilon").replace("original_", "")
    if kind not in PREDICTIONS:
        raise ValueError(
            f"{name} has prediction_type={kind!r}: allowed are {', '.join(PREDICTIONS)}, and flow_prediction together "
            "with use_flow_sigmas=True"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"{name} has timestep_type={config.timestep_type!r}, with which the network is called with logarithms of "
            "sigma: of those, networks of timesteps from 0 on are quantized, timestep_type='discrete'"
        )
    known = inspect.signature(DDIMScheduler.__init__).parameters
    values = {name: value for name, value in config.items() if name in known}
    values |= {"prediction_type": kind, "clip_sample": config.get("clip_sample", False)}
    if values.get("beta_schedule", "linear") in BETA_SCHEDULES:
        ddim = DDIMScheduler(**values)
        powers = scheduler.alphas_cumprod.to(ddim.alphas_cumprod)
        # some put a power of 2^-24 in the place of none
        if torch.allclose(ddim.alphas_cumprod, powers, rtol=1e-4, atol=LEAST_SIGNAL):
            return ddim
    alphas = scheduler.alphas_cumprod.double()
    betas = (1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])).tolist()
    values |= {"trained_betas": betas, "rescale_betas_zero_snr": False, "beta_schedule": "linear"}
    return DDIMScheduler(**values)


def _as_flow(scheduler) -> FlowMatchEulerDiscreteScheduler:
    config, name = scheduler.config, type(scheduler).__name__
    kind = config.get("prediction_type", "flow_prediction")
    if kind != "flow_prediction":
        raise ValueError(f"{name} has use_flow_sigmas=True and prediction_type={kind!r}: allowed is 'flow_prediction'")
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} has invert_sigmas=True: allowed are flows whose timesteps fall from noise to image")
    # one that set_shift has changed is not in the configuration
    shift = getattr(scheduler, "_shift", config.get("shift", config.get("flow_shift")))
    if config.get("use_dynamic_shifting"):
        mu = config.get("max_shift") or LARGEST_SHIFT
        shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    # by name: what diffusers is given without one, from_config takes for a default and leaves out
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps, shift=shift, shift_terminal=config.get("shift_terminal")
    )


def _as_edm(scheduler) -> EDMEulerScheduler:
    config, name = scheduler.config, type(scheduler).__name__
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"{name} has prediction_type={config.prediction_type!r}: allowed are epsilon, v_prediction")
    if not 0 < config.sigma_min < config.sigma_max < math.inf or not 0 < config.sigma_data < math.inf:
        raise ValueError(
            f"{name} has sigma_min={config.sigma_min}, sigma_max={config.sigma_max}, sigma_data={config.sigma_data}: "
            "allowed are numbers above 0, sigma_min less than sigma_max"
        )
    known = inspect.signature(EDMEulerScheduler.__init__).parameters
    return EDMEulerScheduler(**{option: value for option, value in config.items() if option in known})


def settings_of(scheduler) -> str:
    """What a scheduler computes with, the same in every process (diffusers keeps a list in a set's order beside it)."""
    return repr(sorted((name, value) for name, value in scheduler.config.items() if not name.startswith("_")))


def check_signal(scheduler, timesteps: Tensor) -> None:
    """Look whether a network that predicts epsilon can be sampled from the first of these timesteps on.

    Raises:
        ValueError: the signal there is zero, and a prediction of the noise says nothing about the image.
    """
    first = int(timesteps[0])
    if process_of(scheduler).prediction_type == "epsilon" and float(scheduler.alphas_cumprod[first]) < LEAST_SIGNAL:
        raise ValueError(
            f"at timestep {first} the schedule has no signal, and a prediction of epsilon says nothing about the image "
            "there: such a network predicts v or the sample, or its betas are others (rescale_betas_zero_snr?)"
        )


def matching_sampler(scheduler, num_train_timesteps: int, process: str) -> Sampler:
    """:func:`as_sampler` of the scheduler that a network was quantized with, for programs that hold its steps.

    Args:
        process: that the network was quantized for, as :func:`process_name` says it.

    Raises:
        ValueError: as :func:`as_sampler`, it walks another process, or EDM's, or has another number of training
            timesteps.
    """
    sampler = as_sampler(scheduler)
    if process_name(sampler) != process:
        raise ValueError(
            f"the network was quantized for {process}, and {type(scheduler).__name__} walks {process_name(sampler)}: "
            "pass the scheduler it was quantized with"
        )
    check_counted(span_of(sampler), "a program with the sampler's steps")
    trained = sampler.config.num_train_timesteps
    if trained != num_train_timesteps:
        raise ValueError(
            f"the scheduler has {trained} training timesteps, the network was quantized for {num_train_timesteps}: "
            "pass the scheduler it was quantized with"
        )
    return sampler


def sampler_of(config: str) -> Sampler:
    """The sampler whose configuration a program holds, as ``to_json_string`` wrote it.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    values = json.loads(config)
    kind = {kind.__name__: kind for kind in (DDIMScheduler, FlowMatchEulerDiscreteScheduler)}[values["_class_name"]]
    return kind.from_config(values)


def find_scheduler(model: nn.Module) -> Sampler | None:
    """The scheduler saved beside a network that was loaded from a diffusers folder, if there is one.

    Raises:
        ValueError: as :func:`read_scheduler`.
    """
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not path:
        return None
    for folder in (Path(path) / "scheduler", Path(path), Path(path).parent / "scheduler"):
        if (folder / "scheduler_config.json").is_file():
            return read_scheduler(folder)
    return None


def read_scheduler(folder: Path) -> Sampler:
    """:func:`as_sampler` of the scheduler that a folder holds.

    Raises:
        ValueError: as :func:`as_sampler`, or it is damaged.
    """
    file = folder / "scheduler_config.json"
    kind, values = class_of(file, {kind.__name__: kind for kind in FAMILY}), read_json(file)
    # before anything is made of them: each becomes as many numbers
    check_count(f"{file}: num_train_timesteps", values.get("num_train_timesteps", 1000), most=MOST_TIMESTEPS)
    try:
        scheduler = as_sampler(kind.from_pretrained(folder))
        sound = _is_sound(scheduler)
    except Exception as error:  # what a configuration says reaches every line of diffusers' constructors
        raise ValueError(f"{file} cannot be read as a {kind.__name__}: {error}") from error
    if not sound:
        raise ValueError(f"{file} is damaged: with its betas, or its shift, the signal is not from 0 to 1")
    return scheduler


def _is_sound(sampler: Sampler) -> bool:
    """Whether the signal is from none to all, at every training timestep and wherever the sampler stops."""
    process, trained = process_of(sampler), sampler.config.num_train_timesteps
    process.set_timesteps(min(20, trained))
    alphas, _ = process.alphas_sigmas([*range(trained), *sampler.timesteps.tolist()])
    return bool(((alphas >= 0) & (alphas <= 1)).all())


def class_of(config: Path, allowed: dict[str, Any]) -> Any:
    """The class that a diffusers config file names.

    Raises:
        ValueError: it names another than those allowed, or is no such file.
    """
    name = read_json(config).get("_class_name")
    if not isinstance(name, str) or name not in allowed:
        hint = ""
        if config.name == "scheduler_config.json":
            hint = (
                ". If the network was trained on a DDPM noise process, pass "
                f"DDIMScheduler.from_pretrained({str(config.parent)!r})"
            )
        raise ValueError(f"{config} names the class {name}: allowed are {', '.join(allowed)}{hint}")
    return allowed[name]
