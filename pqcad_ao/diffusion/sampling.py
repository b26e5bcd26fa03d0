"""The one DDIM sampler that calibration, distillation, evaluation and the demo share."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pqcad_ao.denoiser import GUIDANCE_SCALE, GUIDED_AGAIN, predict, take_rows
from pqcad_ao.diffusion.correction import CorrectionTable, correction_of
from pqcad_ao.diffusion.noise import RectifiedFlow
from pqcad_ao.diffusion.process import FLOWS, as_sampler, clip_of, process_name
from pqcad_ao.utils.checks import NOT_FINITE
from pqcad_ao.utils.processes import fill_in
from pqcad_ao.utils.progress import tqdm


def _cause(dtype: torch.dtype, scheduler) -> str:
    """What makes a sampler leave the finite numbers, most likely."""
    if dtype == torch.float16:
        return "float16 ends at 65504, which the network's activations may exceed: give it in float32 or bfloat16"
    names = ("prediction_type", "beta_schedule", "shift")
    said = ", ".join(str(scheduler.config[name]) for name in names if name in scheduler.config)
    return f"check the network's weights and that the scheduler is the one it was trained with ({said})"


def overflow(doing: str, dtype: torch.dtype, scheduler) -> FloatingPointError:
    """The error of a full-precision sampler that meets NaN or infinity, with its likeliest cause."""
    return FloatingPointError(
        f"the full-precision sampler left the finite numbers while {doing}: {_cause(dtype, scheduler)}"
    )


def first_overflow(unet: Any, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Any]) -> str:
    """The first layer, by name, whose result for finite inputs is not finite; "" where none is found."""
    network = getattr(unet, "_orig_mod", unet)  # what torch.compile wraps
    if not isinstance(network, nn.Module):
        return ""
    found: list[str] = []

    def look(fqn: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            tensors = [[v for v in tree_leaves(values) if isinstance(v, Tensor)] for values in (args, output)]
            given, made = (all(bool(v.isfinite().all()) for v in values) for values in tensors)
            if not found and given and not made:
                found.append(fqn)

        return hook

    leaves = {fqn: layer for fqn, layer in network.named_modules() if fqn and not any(layer.children())}
    handles = [layer.register_forward_hook(look(fqn)) for fqn, layer in leaves.items()]
    try:
        predict(network, x_t, timesteps, conditioning)
    except FloatingPointError as error:  # a quantized layer that names itself
        return str(error)
    finally:
        for handle in handles:
            handle.remove()
    return "first in the result of layer " + found[0] if found else ""


@torch.no_grad()
def sample(
    unet: Callable[..., Any],
    scheduler,
    noise: Tensor,
    num_inference_steps: int,
    *,
    conditioning: dict[str, Any] | None = None,
    batch_size: int = 100,
    correction: CorrectionTable | Literal["own"] | None = "own",
    share: tuple[int, int] = (0, 1),
    callback: Callable[[int, int, Tensor, Tensor], bool | None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Walk a scheduler from ``noise`` (N, C, H, W) to images x_0 in [-1, 1]: DDIM (Song et al. 2021, eq. 12 with
    σ = 0) where it is one.

    Args:
        unet: anything called as ``f(x_t, timesteps, **conditioning)`` with (B,) timesteps. What keeps something from
            step to step, as a :class:`~pqcad_ao.cache.CachedUNet` does, begins a walk of its own for every batch.
        scheduler: of diffusers; a fresh copy is stepped, the one given is not touched. A flow is walked as
            :func:`~pqcad_ao.diffusion.process.as_sampler` says.
        conditioning: keyword arguments with one row per image, sliced along with the batch.
        batch_size: images per forward call.
        correction: of predictions or samples, at each step: ``"own"``, what :func:`~pqcad_ao.correct.correct_` attached
            to the network, if anything; None: none.
        share: (rank, world) of this process where several draw a part each, in the same batches as one alone, and call
            this alike: all of them get all images. ``pqcad_ao.utils.processes.rank_and_world()`` under torchrun.
        callback: called as ``callback(first_row, step_index, timestep, x_t)`` before each forward call, with the x_t
            that the network is given. If it returns True, the walk of these rows ends there.
        progress: show a bar.

    Returns:
        (N, C, H, W) float tensor, on the noise's device.

    Warns where a network is sampled otherwise than it was made for: by its timesteps, process, clipping or guidance.

    Raises:
        ValueError: the correction was fitted to another walk.
        FloatingPointError: NaN or infinity in the noise or after a step; names the step and, where the network can be
            looked into, the layer. On a GPU a batch is looked at when its last step is done.
    """
    if not noise.isfinite().all():
        raise FloatingPointError("the noise that sampling starts from holds NaN or infinity")
    # not from_config, to which a value that was given without its name is a default
    scheduler = as_sampler(scheduler) if isinstance(scheduler, FLOWS) else copy.deepcopy(scheduler)
    _start(scheduler, num_inference_steps)
    # the scheduler looks its constants up on the CPU: a timestep from a GPU would have to be waited for at every step
    timesteps = scheduler.timesteps
    shown = timesteps.to(noise.device)
    conditioning = conditioning or {}
    known = getattr(unet, "_pqcad_timestep", None)
    _check_walk(known, scheduler)
    if getattr(known, "guidance", None) is not None and GUIDANCE_SCALE in conditioning:
        warnings.warn(GUIDED_AGAIN.format(known.guidance), stacklevel=3)  # of what is decorated with no_grad
    table = correction_of(unet) if correction == "own" else correction
    if table is not None:
        table.check(timesteps.tolist(), conditioning, cached=_walk_of(unet) is not None)
    rank, world = share
    images = torch.zeros_like(noise)
    starts = range(0, noise.shape[0], batch_size)[rank::world]
    total = len(starts) * len(timesteps)
    with tqdm(total=total, desc="sampling", disable=not progress, leave=False) as bar:
        for first in starts:
            rows = slice(first, first + batch_size)
            _start(scheduler, num_inference_steps)
            x_t = noise[rows] * getattr(scheduler, "init_noise_sigma", 1.0)
            chosen = take_rows(conditioning, rows)
            network = _walk_of(unet) or unet
            finite: list[Tensor] = []
            for index, timestep in enumerate(timesteps):
                # oneDNN and cuDNN convolve in this layout, and a network keeps its input's from end to end
                x_t = like_images(x_t)
                given = scheduler.scale_model_input(x_t, timestep) if hasattr(scheduler, "scale_model_input") else x_t
                if callback is not None and callback(first, index, timestep, given):
                    break
                inputs = (given, shown[index].repeat(len(x_t)), chosen)
                try:
                    prediction = predict(network, *inputs)
                except (ArithmeticError, ValueError, RuntimeError) as error:
                    if NOT_FINITE not in str(error) and not isinstance(error, FloatingPointError):
                        raise
                    raise _left(unet, inputs, scheduler, index) from error
                if table is None:
                    x_t = scheduler.step(prediction, timestep, x_t).prev_sample
                else:
                    prediction = table.predicted(prediction, index)
                    x_t = table.sampled(scheduler.step(prediction, timestep, x_t).prev_sample, index)
                finite.append(x_t.isfinite().all())
                if x_t.device.type == "cpu" and not finite[-1]:
                    raise _left(unet, inputs, scheduler, index)
                bar.update()
            sound = [bool(step) for step in finite]  # on a GPU, where nothing waits for a single step
            if not all(sound):
                raise _left(None, inputs, scheduler, sound.index(False))
            images[rows] = x_t
    return fill_in(images) if world > 1 else images


def _walk_of(unet: Any) -> Callable[..., Any] | None:
    """What keeps features on one walk through the schedule; None where nothing is kept."""
    return unet.begin_walk() if hasattr(unet, "begin_walk") else None


def _check_walk(known: Any, scheduler) -> None:
    """Warn where a quantized network was made for another walk than a scheduler's, by what it knows about its time."""
    schedule, clip = getattr(known, "schedule", None), getattr(known, "clip", None)
    timesteps = scheduler.timesteps.tolist()
    if schedule is not None and timesteps != schedule:
        warnings.warn(
            f"this network was distilled for the timesteps {schedule} and is sampled at {timesteps}: use "
            f"num_inference_steps={len(schedule)} and the scheduler that came with it",
            stacklevel=4,  # of what is decorated with no_grad
        )
    clips = clip_of(scheduler)
    if known is not None and known.process != process_name(scheduler):
        warnings.warn(
            f"this network was quantized for {known.process}, and {type(scheduler).__name__} walks another: sample "
            "with the scheduler that quantize_ was given",
            stacklevel=4,
        )
    elif clip is not None and clips != clip:
        here, there = (f"clips x_0 to ±{bound:g}" if bound else "does not clip x_0" for bound in (clips, clip))
        warnings.warn(
            f"this sampler {here}, and the one that the network was calibrated on {there}: its activations are others. "
            "Give quantize_ the scheduler that you sample with",
            stacklevel=4,
        )


def _start(scheduler, num_inference_steps: int) -> None:
    """Let a scheduler begin a walk; some keep a history of the last one."""
    if isinstance(scheduler, FLOWS):
        RectifiedFlow(scheduler).set_timesteps(num_inference_steps)
    else:
        scheduler.set_timesteps(num_inference_steps)


def like_images(x_t: Tensor) -> Tensor:
    """Images (B, C, H, W) in the layout that convolutions like best; of other samples there is one layout."""
    return x_t.to(memory_format=torch.channels_last) if x_t.dim() == 4 else x_t


def _left(unet: Any, inputs: tuple[Tensor, Tensor, dict[str, Any]], scheduler, index: int) -> FloatingPointError:
    """The error of a sampler after whose step ``index`` x_t is not finite."""
    where = first_overflow(unet, *inputs)
    return FloatingPointError(
        f"the sampler left the finite numbers in step {index + 1} of {len(scheduler.timesteps)} (timestep "
        f"{float(scheduler.timesteps[index]):g}){', ' if where else ''}{where}: {_cause(inputs[0].dtype, scheduler)}"
    )
