"""The one DDIM sampler that calibration, distillation, evaluation and the demo share."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pqcad_ao.denoiser import predict, take_rows


def overflow(doing: str, dtype: torch.dtype, scheduler) -> FloatingPointError:
    """The error of a full-precision sampler that meets NaN or infinity, with its likeliest cause."""
    cause = (
        "float16 ends at 65504, which the network's activations may exceed: give it in float32 or bfloat16"
        if dtype == torch.float16
        else "check the network's weights and that the scheduler is the one it was trained with "
        f"({scheduler.config.prediction_type}, {scheduler.config.beta_schedule})"
    )
    return FloatingPointError(f"the full-precision sampler left the finite numbers while {doing}: {cause}")


@torch.no_grad()
def sample(
    unet: Callable[..., Any],
    scheduler,
    noise: Tensor,
    num_inference_steps: int,
    *,
    conditioning: dict[str, Any] | None = None,
    batch_size: int = 100,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with σ = 0) from ``noise`` (N, C, H, W) to images x_0 in [-1, 1].

    Args:
        unet: anything called as ``f(x_t, timesteps, **conditioning)`` with (B,) timesteps.
        scheduler: a diffusers scheduler; a fresh copy is stepped, the one given is not touched.
        conditioning: keyword arguments with one row per image, sliced along with the batch.
        batch_size: images per forward call.
        callback: called as ``callback(first_row, step_index, timestep, x_t)`` before each forward call.
        progress: show a bar.

    Returns:
        (N, C, H, W) float tensor, on the noise's device.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    # the scheduler looks its constants up on the CPU: a timestep from a GPU would have to be waited for at every step
    timesteps = scheduler.timesteps
    shown = timesteps.to(noise.device)
    conditioning = conditioning or {}
    schedule = getattr(getattr(unet, "_pqcad_timestep", None), "schedule", None)
    if schedule is not None and timesteps.tolist() != schedule:
        warnings.warn(
            f"this network was distilled for the timesteps {schedule} and is sampled at {timesteps.tolist()}: use "
            f"num_inference_steps={len(schedule)} and the scheduler that came with it",
            stacklevel=3,  # of what is decorated with no_grad
        )
    images = torch.empty_like(noise)
    total = -(-noise.shape[0] // batch_size) * len(timesteps)
    with tqdm(total=total, desc="sampling", disable=not progress, leave=False) as bar:
        for first in range(0, noise.shape[0], batch_size):
            rows = slice(first, first + batch_size)
            scheduler.set_timesteps(num_inference_steps)  # some keep a history of the last batch
            x_t = noise[rows] * scheduler.init_noise_sigma
            chosen = take_rows(conditioning, rows)
            for index, timestep in enumerate(timesteps):
                # oneDNN and cuDNN convolve in this layout, and a network keeps its input's from end to end
                x_t = x_t.to(memory_format=torch.channels_last)
                if callback is not None:
                    callback(first, index, timestep, x_t)
                prediction = predict(unet, x_t, shown[index].repeat(len(x_t)), chosen)
                x_t = scheduler.step(prediction, timestep, x_t).prev_sample
                bar.update()
            images[rows] = x_t
    return images
