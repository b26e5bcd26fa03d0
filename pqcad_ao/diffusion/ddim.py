"""The deterministic DDIM jump between two timesteps of a schedule."""

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pqcad_ao.diffusion.schedule import timesteps_of


@dataclass
class Walk:
    """A schedule with the numbers that its jumps need.

    Attributes:
        timesteps: (S + 1,) int64 from noise to image, and -1 for the image itself.
        alpha, sigma: (S + 1,) signal and noise there: x_t = alpha·x_0 + sigma·noise.
        prediction_type: epsilon, v_prediction or sample. clip: range of x_0 in the sampler, or None.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    prediction_type: str
    clip: float | None

    @classmethod
    def of(cls, scheduler: DDIMScheduler, num_inference_steps: int, device: torch.device | str = "cpu") -> "Walk":
        visited = timesteps_of(scheduler, num_inference_steps)
        squared = torch.cat([scheduler.alphas_cumprod[visited], scheduler.final_alpha_cumprod.reshape(1)]).double()
        config = scheduler.config
        return cls(
            torch.tensor([*visited, -1], device=device),
            squared.sqrt().float().to(device),
            (1 - squared).sqrt().float().to(device),
            config.prediction_type,
            config.clip_sample_range if config.clip_sample else None,
        )

    def at(self, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of each sample's step (B,), to multiply (B, C, H, W) with."""
        shape = [-1] + [1] * (like.dim() - 1)
        return self.alpha[step].view(shape), self.sigma[step].view(shape)

    def noised(self, x_0: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """x_t of clean images at each sample's step."""
        alpha, sigma = self.at(step, x_0)
        return alpha * x_0 + sigma * noise

    def clean(self, prediction: Tensor, x_t: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The x_0 and the noise that a network's output stands for."""
        alpha, sigma = self.at(step, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / alpha, prediction
        if self.prediction_type == "sample":
            return prediction, (x_t - alpha * prediction) / sigma
        return alpha * x_t - sigma * prediction, alpha * prediction + sigma * x_t

    def velocity(self, x_0: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """v = alpha·noise - sigma·x_0 of an x_t in which x_0 is the image; its error is x_0's over sigma."""
        alpha, sigma = self.at(step, x_t)
        return (alpha * x_t - x_0) / sigma

    def reach(self, step: Tensor, stride: int) -> Tensor:
        """How far an error of v carries over a jump, (B,): the sine of the angle between both ends."""
        alpha, sigma, following = self.alpha[step], self.sigma[step], step + stride
        return sigma * self.alpha[following] - alpha * self.sigma[following]

    def jump(self, prediction: Tensor, x_t: Tensor, step: Tensor, stride: int = 1) -> Tensor:
        """DDIM (Song et al. 2021, eq. 12 with σ = 0) from each sample's step to the one ``stride`` on."""
        x_0, noise = self.clean(prediction, x_t, step)
        if self.clip is not None:
            x_0 = x_0.clamp(-self.clip, self.clip)
        alpha, sigma = self.at(step + stride, x_t)
        return alpha * x_0 + sigma * noise

    def image_behind(self, x_next: Tensor, x_t: Tensor, step: Tensor, stride: int) -> Tensor:
        """The x_0 for which one jump over ``stride`` steps leads from ``x_t`` to ``x_next``."""
        (alpha, sigma), (alpha_next, sigma_next) = self.at(step, x_t), self.at(step + stride, x_t)
        ratio = sigma_next / sigma
        return (x_next - ratio * x_t) / (alpha_next - ratio * alpha)
