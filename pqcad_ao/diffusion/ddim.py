"""The deterministic DDIM step between two timesteps of a schedule."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pqcad_ao.diffusion.noise import Sampler, process_of
from pqcad_ao.diffusion.schedule import refined


@dataclass
class DDIMSchedule:
    """A schedule with the numbers that its steps need.

    Attributes:
        timesteps: (S + 1,) from noise to image, and the one that stands for the image itself: int64, or float32 of a
            flow.
        alphas, sigmas: (S + 1,) signal and noise there: x_t = alpha_t·x_0 + sigma_t·noise.
        prediction_type: epsilon, v_prediction, sample or flow. clip: range of x_0 in the sampler, or None.
    """

    timesteps: Tensor
    alphas: Tensor
    sigmas: Tensor
    prediction_type: str
    clip: float | None

    @classmethod
    def of(
        cls, sampler: Sampler, num_inference_steps: int, device: torch.device | str = "cpu", *, substeps: int = 1
    ) -> "DDIMSchedule":
        """That of a sampler's steps, or of ``substeps`` as many, among which are the sampler's own."""
        process, timesteps = process_of(sampler), refined(sampler, num_inference_steps, substeps)
        alphas, sigmas = process.alphas_sigmas(timesteps)
        return cls(
            torch.tensor([*timesteps, process.image], device=device),
            alphas.float().to(device),
            sigmas.float().to(device),
            process.prediction_type,
            process.clip,
        )

    def alpha_sigma(self, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of each sample's step (B,), to multiply (B, C, H, W) with."""
        shape = [-1] + [1] * (like.dim() - 1)
        return self.alphas[step].view(shape), self.sigmas[step].view(shape)

    def add_noise(self, x_0: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """x_t of clean images at each sample's step."""
        alpha_t, sigma_t = self.alpha_sigma(step, x_0)
        return alpha_t * x_0 + sigma_t * noise

    def x_0_and_noise(self, prediction: Tensor, x_t: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The x_0 and the noise that a network's output stands for."""
        alpha_t, sigma_t = self.alpha_sigma(step, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma_t * prediction) / alpha_t, prediction
        if self.prediction_type == "sample":
            return prediction, (x_t - alpha_t * prediction) / sigma_t
        if self.prediction_type == "flow":
            return x_t - sigma_t * prediction, x_t + alpha_t * prediction
        return alpha_t * x_t - sigma_t * prediction, alpha_t * prediction + sigma_t * x_t

    def velocity(self, x_0: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """v = alpha_t·noise - sigma_t·x_0 of an x_t in which x_0 is the image, or a flow's noise - x_0; the error of
        either is x_0's over sigma."""
        alpha_t, sigma_t = self.alpha_sigma(step, x_t)
        return ((x_t if self.prediction_type == "flow" else alpha_t * x_t) - x_0) / sigma_t

    def prediction(self, x_0: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """The network's output for an x_t in which x_0 is the image: what :meth:`x_0_and_noise` inverts."""
        alpha_t, sigma_t = self.alpha_sigma(step, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - alpha_t * x_0) / sigma_t
        return x_0 if self.prediction_type == "sample" else self.velocity(x_0, x_t, step)

    def error_gain(self, step: Tensor, stride: int) -> Tensor:
        """How far an error of v carries over a step, (B,): where variance is preserved, the sine of the angle between
        both ends."""
        alpha_t, sigma_t, following = self.alphas[step], self.sigmas[step], step + stride
        return sigma_t * self.alphas[following] - alpha_t * self.sigmas[following]

    def reach(self, step: Tensor) -> Tensor:
        """How far an error of what the network predicts carries over a step, (B,): x_{t-1}'s error over it."""
        like = torch.ones(len(step), 1, device=step.device)
        x_0, noise = self.x_0_and_noise(like, torch.zeros_like(like), step)
        alpha_next, sigma_next = self.alpha_sigma(step + 1, like)
        return (alpha_next * x_0 + sigma_next * noise)[:, 0]

    def ddim_step(self, prediction: Tensor, x_t: Tensor, step: Tensor, stride: int = 1) -> Tensor:
        """DDIM (Song et al. 2021, eq. 12 with σ = 0) from each sample's step to the one ``stride`` on."""
        x_0, noise = self.x_0_and_noise(prediction, x_t, step)
        alpha_t, sigma_t = self.alpha_sigma(step + stride, x_t)
        return alpha_t * self.clipped(x_0) + sigma_t * noise

    def clipped(self, x_0: Tensor) -> Tensor:
        """x_0 within the sampler's range, where it has one."""
        return x_0 if self.clip is None else x_0.clamp(-self.clip, self.clip)

    def step_towards(self, x_0: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """Where one step leads from x_t in which x_0 is the image: :meth:`ddim_step` with no need of the noise."""
        (alpha_t, sigma_t), (alpha_next, sigma_next) = self.alpha_sigma(step, x_t), self.alpha_sigma(step + 1, x_t)
        ratio = sigma_next / sigma_t
        return ratio * x_t + (alpha_next - ratio * alpha_t) * x_0

    def target_x_0(self, x_next: Tensor, x_t: Tensor, step: Tensor, stride: int) -> Tensor:
        """The x_0 for which one step over ``stride`` leads from x_t to x_next (Salimans & Ho 2022, algorithm 2)."""
        (alpha_t, sigma_t), (alpha_next, sigma_next) = self.alpha_sigma(step, x_t), self.alpha_sigma(step + stride, x_t)
        ratio = sigma_next / sigma_t
        return (x_next - ratio * x_t) / (alpha_next - ratio * alpha_t)


def reach_of(sampler: Sampler, num_inference_steps: int, timesteps: Tensor) -> Tensor:
    """:meth:`DDIMSchedule.reach` at the sampler's steps that are nearest to timesteps (N,): (N,) float32."""
    schedule = DDIMSchedule.of(sampler, num_inference_steps, timesteps.device)
    step = (timesteps[:, None] - schedule.timesteps[None, :-1]).abs().argmin(1)
    return schedule.reach(step)
