"""The one DDIM sampler that calibration, distillation, evaluation and the demo share."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm


def take_rows(conditioning: dict[str, Any], rows: Any) -> dict[str, Any]:
    """The chosen rows of every tensor in a (nested) conditioning dictionary."""
    return tree_map(lambda value: value[rows] if isinstance(value, Tensor) else value, conditioning)


def in_type(values: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Every floating-point tensor of a nested value in ``dtype``."""
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)


def predict(
    unet: torch.nn.Module, x_t: Tensor, timestep: Tensor | int, conditioning: dict[str, Any] | None = None
) -> Tensor:
    """The network's raw prediction as a tensor, whatever wrapping its output has.

    Args:
        x_t: (B, C, H, W). timestep: int, 0-d or (B,). conditioning: further keyword arguments of ``unet.forward``.
    """
    output = unet(x_t, timestep, **(conditioning or {}))
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put every module of ``model`` into evaluation mode, and each back to what it was on leaving."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@torch.no_grad()
def sample(
    unet: torch.nn.Module,
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
