"""``distill_`` and ``compress``: a network learns, in place, to sample in half the steps; or is quantized first."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pqcad_ao import denoiser
from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.denoiser import check_conditioning, set_time_scale
from pqcad_ao.diffusion.noise import Sampler
from pqcad_ao.diffusion.process import find_scheduler, process_name, settings_of
from pqcad_ao.diffusion.schedule import check_substeps, teachable
from pqcad_ao.diffusion.trajectories import checked_trajectories
from pqcad_ao.graph.suitable import check_network, check_whole
from pqcad_ao.learn.halving import teach
from pqcad_ao.learn.unfold import check_structure, dequantized_state
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.plan import planned
from pqcad_ao.quantize import quantize_
from pqcad_ao.utils.processes import check_share
from pqcad_ao.utils.runs import shared_run

OUTERMOST = 1.001  # value of a real picture


def check_distillation(
    reference: nn.Module,
    scheduler,
    config: CADConfig,
    *,
    images: Tensor | None = None,
    conditioning: dict[str, Any] | None = None,
    sample_shape: tuple[int, ...] | None = None,
) -> tuple[Sampler, tuple[int, ...]]:
    """What :func:`distill_` can say before any work is done; its arguments and errors.

    Returns:
        the sampler to halve, and the (C, H, W) of a sample.
    """
    scheduler = find_scheduler(reference) if scheduler is None else scheduler
    if scheduler is None:
        raise ValueError("no scheduler was given, none is saved beside the network: pass the one it was trained with")
    if quantized_state(reference) is not None:
        raise ValueError("the reference is quantized: give the full-precision network that the student was made from")
    check_share(config.batch_size)
    ddim = teachable(scheduler, config.steps, config.halvings)
    check_substeps(ddim, config.steps, config.substeps)
    if config.guidance == "baked" and denoiser.GUIDANCE_SCALE not in (conditioning or {}):
        raise ValueError(
            "guidance='baked' without guidance in the conditioning: write conditioning={..., 'guidance_scale': number, "
            "'negative': {...}}, or leave guidance='kept'"
        )
    shape = denoiser.sample_shape(reference, sample_shape)
    if images is None:
        return ddim, shape
    if conditioning:
        raise ValueError(
            f"images were given together with conditioning ({', '.join(conditioning)}), and nothing says which rows of "
            "it are theirs: leave the images out, C_DC is drawn under the conditioning"
        )
    if tuple(images.shape[1:]) != shape or not len(images):
        raise ValueError(f"images has shape {tuple(images.shape)}: write (N, {', '.join(map(str, shape))}), N from 1")
    if not images.is_floating_point() or not images.abs().max() <= OUTERMOST:
        raise ValueError(
            f"images is {images.dtype}, from {images.min():g} to {images.max():g}: give floating point numbers from -1 "
            "to 1 (of bytes: images / 127.5 - 1)"
        )
    return ddim, shape


def distill_(
    student: nn.Module,
    reference: nn.Module,
    scheduler=None,
    config: CADConfig | None = None,
    *,
    images: Tensor | None = None,
    conditioning: dict[str, Any] | None = None,
    sample_shape: tuple[int, ...] | None = None,
    time_scale: float | None = None,
    folder: str | Path | None = None,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = True,
) -> Sampler:
    """Teach a network, in place, to sample in half the steps (or a quarter: ``config.halvings``).

    A quantized student stays quantized, on the grid widths of its plan; weights, scales, biases and norms learn. A
    full-precision student is plain progressive distillation (Salimans & Ho 2022), and only the sampler that is returned
    knows its timesteps. What sets the targets: the probability flow of the full-precision ``reference``, walked more
    finely than the sampler does (``config.reference_substeps``), and the student as it was, at two of its own steps.

    Under torchrun all processes make this call alike, share the work, and have the same student afterwards.

    Args:
        student: a network that ``quantize_`` has quantized, or a full-precision one.
        reference: the full-precision network it was made from.
        scheduler: as for :func:`~pqcad_ao.quantize.quantize_`, but none that draws noise, such as ``DDPMScheduler``;
            timesteps other than a flow's become trailing ones. If None, the one saved beside the reference.
        images: (N, C, H, W) real pictures in [-1, 1], mixed into C_DC, each as often as a drawn one (so give about
            ``config.points`` of them for half); none are needed. Unconditional networks only.
        conditioning: keyword arguments of ``forward`` with rows to draw from, for conditional networks. With
            ``{"guidance_scale": 5.0, "negative": {...}}`` in it, targets and student are guided, two calls each; the
            student in one where ``config.guidance`` is ``"baked"``.
        sample_shape: (C, H, W), for networks whose config does not say it.
        time_scale: as for :func:`~pqcad_ao.quantize.quantize_`; a quantized student knows its own.
        folder: keeps C_DC, checkpoints and ``log.jsonl``: the same call with the same folder goes on after a kill, to
            the same result. Of several processes one that all of them see.
        callback: called as ``callback(stage, done, total)``. progress: show bars.

    Returns:
        the sampler whose timesteps the student now walks: sample with ``num_inference_steps = steps / 2^halvings``.

    Raises:
        ValueError: steps or scheduler that cannot be halved, substeps that the training timesteps do not hold, betas
            that are not the network's, a reference of another structure, no pictures in ``images``.
            FloatingPointError: the reference's flow or the loss left the finite numbers, or the loss exploded.
            BlockingIOError: a run is at work in ``folder``. Whatever is raised, the student is as it was.

    Example:
        >>> config = CADConfig(steps=4, iterations=4, batch_size=4, points=4)  # of a length for an example
        >>> sampler = distill_(quantized, unet, scheduler, config, progress=False)
        >>> sampler.set_timesteps(2)
        >>> sampler.timesteps
        tensor([999, 499])
    """
    config = config or CADConfig()
    ddim, shape = check_distillation(
        reference, scheduler, config, images=images, conditioning=conditioning, sample_shape=sample_shape
    )
    for network in (student, reference):
        set_time_scale(network, time_scale)
    _check_student(student, reference, ddim)
    _check_config(student, config, conditioning or {})
    keeps: dict[str, Any] = {"folder": folder, "callback": callback, "progress": progress}
    alike = (student.state_dict(), reference.state_dict(), settings_of(ddim), config, images, conditioning)
    with shared_run(folder, *alike):
        pictures = checked_trajectories(reference, ddim, shape, config, conditioning, images=images, **keeps)
        return teach(student, reference, ddim, shape, config, pictures, **keeps)


def compress(
    unet: nn.Module,
    scheduler,
    pq: PQCADConfig | None = None,
    cad: CADConfig | None = None,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    images: Tensor | None = None,
    conditioning: dict[str, Any] | None = None,
    sample_shape: tuple[int, ...] | None = None,
    time_scale: float | None = None,
    folder: str | Path | None = None,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = True,
) -> tuple[nn.Module, Sampler]:
    """Progressive quantization, then distillation: a quantized network for half the steps, and its sampler.

    The plan is made and C_DC is drawn first: what does not fit is found out before anything is learned.

    Args:
        unet: full precision; left as it is. pq: its ``calibration_steps`` become ``cad.steps``.
        filter_fn: as for :func:`~pqcad_ao.quantize.quantize_`. images: as for :func:`distill_`.
        conditioning, sample_shape, time_scale, folder, callback, progress: as for both.

    Raises: as both.

    Example:
        >>> pq = PQCADConfig(mode="ptq", calibration_points=32)  # both of a length for an example
        >>> cad = CADConfig(steps=4, iterations=4, batch_size=4, points=4)
        >>> compressed, sampler = compress(unet, scheduler, pq, cad, progress=False)
        >>> plan(compressed).average_bits < 8, unet is compressed
        (True, False)
    """
    set_time_scale(unet, time_scale)
    student, pq, cad = copy.deepcopy(unet), pq or PQCADConfig(), cad or CADConfig()
    ddim, shape = check_distillation(
        unet, scheduler, cad, images=images, conditioning=conditioning, sample_shape=sample_shape
    )
    keeps: dict[str, Any] = {"folder": folder, "callback": callback, "progress": progress}
    planned(student, pq, filter_fn, shape, check_conditioning(student, conditioning))
    pq = replace(pq, calibration_steps=cad.steps)
    given = {"conditioning": conditioning, "sample_shape": sample_shape, **keeps}
    with shared_run(folder, unet.state_dict(), settings_of(ddim), pq, cad, images, conditioning):
        pictures = checked_trajectories(unet, ddim, shape, cad, conditioning, images=images, **keeps)
        quantize_(student, pq, filter_fn, scheduler=ddim, **given)
        return student, teach(student, unet, ddim, shape, cad, pictures, **keeps)


def _check_config(student: nn.Module, config: CADConfig, conditioning: dict[str, Any]) -> None:
    """Raises ValueError: what the configuration asks for does not go with the student."""
    state = quantized_state(student)
    if config.shard and state is None:
        raise ValueError(
            "shard=True divides the weights of quantized layers, and the student is in full precision: quantize_ it "
            "first, or leave shard out"
        )
    scale = None if state is None else state.timestep.guidance
    if scale is not None and config.guidance == "kept" and denoiser.GUIDANCE_SCALE in conditioning:
        raise ValueError(
            f"one call of the student does what guidance of {scale:g} does, and guidance='kept' would guide it again: "
            "write CADConfig(guidance='baked')"
        )


def _check_student(student: nn.Module, reference: nn.Module, ddim: Sampler) -> None:
    """Raises ValueError: the student is not one of this reference's and this sampler's."""
    if student is reference:
        raise ValueError("student and reference are one network: hand over copy.deepcopy(reference) to be taught")
    for network in (student, reference):
        check_network(network)
        check_whole(network)
    state = quantized_state(student)
    if state is not None:
        set_time_scale(reference, state.timestep.time_scale)
    if state is not None and state.timestep.process != process_name(ddim):
        raise ValueError(
            f"the student was quantized for {state.timestep.process}, and the scheduler walks {process_name(ddim)}: "
            "pass the scheduler that quantize_ was given"
        )
    if state is not None and state.timestep.num_train_timesteps != ddim.config.num_train_timesteps:
        raise ValueError(
            f"the scheduler has {ddim.config.num_train_timesteps} training timesteps, the student was quantized for "
            f"{state.timestep.num_train_timesteps}"
        )
    places = {str(value.device) for network in (student, reference) for value in network.state_dict().values()}
    if len(places) > 1:
        raise ValueError(f"student and reference are on {' and '.join(sorted(places))}: move both to one device")
    if state is None:
        check_structure(student.state_dict(), reference)
    else:
        dequantized_state(student, reference)
