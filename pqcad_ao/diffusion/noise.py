"""Noise processes: how much of the image and of the noise is in x_t, and the timesteps that a sampler visits."""

from typing import TypeAlias

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

Sampler: TypeAlias = DDIMScheduler | FlowMatchEulerDiscreteScheduler  # deterministic, one for each process


class VariancePreserving:
    """x_t = alpha·x_0 + sigma·noise with alpha² + sigma² = 1, at whole timesteps (Ho et al. 2020).

    Attributes:
        prediction_type: epsilon, v_prediction or sample. clip: range of x_0 in the sampler, or None.
        image: the timestep that stands for the image itself. continuous: whether timesteps are fractions up to T, and
            not whole numbers up to T - 1.
    """

    image, continuous = -1, False

    def __init__(self, sampler: DDIMScheduler) -> None:
        self.sampler, self.prediction_type = sampler, sampler.config.prediction_type
        self.clip = sampler.config.clip_sample_range if sampler.config.clip_sample else None

    def set_timesteps(self, steps: int) -> None:
        """Let the sampler walk ``steps`` timesteps."""
        self.sampler.set_timesteps(steps)

    def alphas_sigmas(self, timesteps: list) -> tuple[Tensor, Tensor]:
        """(S + 1,) float64 each: at S timesteps, and at the end of the walk."""
        squared = torch.cat([self.sampler.alphas_cumprod[timesteps], self.sampler.final_alpha_cumprod.reshape(1)])
        return squared.double().sqrt(), (1 - squared.double()).sqrt()

    def between(self, start: int, end: int, substeps: int) -> list:
        """``substeps`` timesteps from ``start`` on, evenly spaced up to rounding, of which none is ``end``."""
        return [start - round(number * (start - end) / substeps) for number in range(substeps)]


class RectifiedFlow:
    """x_t = (1 - s)·x_0 + s·noise with s = timestep / T, of which a network predicts noise - x_0 (Liu et al. 2023).

    With alpha = 1 - s and sigma = s, Euler's step of the flow is DDIM's. The attributes are those of
    :class:`VariancePreserving`.
    """

    image, continuous, prediction_type, clip = 0.0, True, "flow", None

    def __init__(self, sampler: FlowMatchEulerDiscreteScheduler) -> None:
        self.sampler = sampler

    def set_timesteps(self, steps: int) -> None:
        """Let the sampler walk ``steps`` timesteps: before its shift evenly spaced from all noise on, as Flux's
        pipelines have them. Half as many are every second of them."""
        self.sampler.set_timesteps(sigmas=(np.arange(steps, 0, -1) / steps).tolist())

    def alphas_sigmas(self, timesteps: list) -> tuple[Tensor, Tensor]:
        """(S + 1,) float64 each: at S timesteps, and at the end of the walk."""
        sigmas = torch.tensor([*timesteps, self.image], dtype=torch.float64) / self.sampler.config.num_train_timesteps
        return 1 - sigmas, sigmas

    def between(self, start: float, end: float, substeps: int) -> list:
        """``substeps`` timesteps from ``start`` on, evenly spaced, of which none is ``end``."""
        return [start - number * (start - end) / substeps for number in range(substeps)]


def process_of(sampler: Sampler) -> VariancePreserving | RectifiedFlow:
    """The noise process that a sampler walks."""
    if isinstance(sampler, FlowMatchEulerDiscreteScheduler):
        return RectifiedFlow(sampler)
    return VariancePreserving(sampler)
