"""Noise processes: how much of the image and of the noise is in x_t, and the timesteps that a sampler visits."""

import math
from typing import TypeAlias

import numpy as np
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

# deterministic, one for each process
Sampler: TypeAlias = DDIMScheduler | FlowMatchEulerDiscreteScheduler | EDMEulerScheduler


class VariancePreserving:
    """x_t = alpha·x_0 + sigma·noise with alpha² + sigma² = 1, at whole timesteps (Ho et al. 2020).

    Attributes:
        name: as errors say it. prediction_type: epsilon, v_prediction or sample. clip: range of x_0 in the sampler,
            or None.
        image: the timestep that stands for the image itself. continuous: whether timesteps are fractions up to T, and
            not whole numbers up to T - 1.
    """

    name, image, continuous = "a DDPM noise process", -1, False

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

    name, image, continuous, prediction_type, clip = "a rectified flow", 0.0, True, "flow", None

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


class EDM:
    """x_t = x_0 + sigma·noise, of which a network is called with c_in·x_t and c_noise (Karras et al. 2022, table 1).

    Counted in what the network is given, c_in·x_t, and with x_0 over sigma_data, variance is preserved: the angle of
    alpha and sigma has the tangent sigma / sigma_data. There the network's target is v or -v, and Euler's step is
    DDIM's. Timesteps are c_noise = ln(sigma) / 4. The attributes are those of :class:`VariancePreserving`;
    ``prediction_type`` is so up to its sign.
    """

    name, image, continuous, prediction_type, clip = "EDM's noise process", -math.inf, True, "v_prediction", None

    def __init__(self, sampler: EDMEulerScheduler) -> None:
        self.sampler = sampler

    def set_timesteps(self, steps: int) -> None:
        """Let the sampler walk ``steps`` timesteps."""
        self.sampler.set_timesteps(steps)

    def alphas_sigmas(self, timesteps: list) -> tuple[Tensor, Tensor]:
        """(S + 1,) float64 each: at S timesteps, and at the end of the walk."""
        to_the_end = self.sampler.config.final_sigmas_type == "zero"
        ends = [*timesteps, self.image if to_the_end else timesteps[-1]]
        angle = ((4 * torch.tensor(ends, dtype=torch.float64)).exp() / self.sampler.config.sigma_data).atan()
        return angle.cos(), angle.sin()

    def between(self, start: float, end: float, substeps: int) -> list:
        """``substeps`` timesteps from ``start`` on, evenly spaced in sigma, of which none is ``end``."""
        from_, to = math.exp(4 * start), math.exp(4 * end)
        rest = [c_noise(from_ - number * (from_ - to) / substeps) for number in range(1, substeps)]
        return [start, *rest]


def c_noise(sigma: float) -> float:
    """What a network of EDM's process is called with at sigma (Karras et al. 2022, table 1)."""
    return math.log(sigma) / 4


def process_of(sampler: Sampler) -> VariancePreserving | RectifiedFlow | EDM:
    """The noise process that a sampler walks."""
    if isinstance(sampler, EDMEulerScheduler):
        return EDM(sampler)
    if isinstance(sampler, FlowMatchEulerDiscreteScheduler):
        return RectifiedFlow(sampler)
    return VariancePreserving(sampler)
