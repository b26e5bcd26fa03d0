"""Solvers of a network's probability flow: how one walks from a noisy image to a less noisy one."""

from collections.abc import Callable

import torch
from torch import Tensor

from pqcad_ao.diffusion.ddim import DDIMSchedule

Predict = Callable[[Tensor, Tensor], Tensor]  # f(x_t, timesteps) -> prediction
Meet = Callable[[int, Tensor], None]  # f(steps taken, the x_t in which they end)


def ddim(
    predict: Predict, schedule: DDIMSchedule, x_t: Tensor, step: Tensor, steps: int, meet: Meet | None = None
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 with σ = 0), a solver of the first order."""
    for taken in range(steps):
        at = step + taken
        x_t = schedule.ddim_step(predict(x_t, schedule.timesteps[at]), x_t, at)
        if meet is not None:
            meet(taken + 1, x_t)
    return x_t


def dpmpp_2m(
    predict: Predict, schedule: DDIMSchedule, x_t: Tensor, step: Tensor, steps: int, meet: Meet | None = None
) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), a solver of the second order.

    Its first step, before which it knows of no other, is of the first order, and so is the one to the image, where
    λ has no bounds (as ``lower_order_final`` says in diffusers).
    """
    slope, before = _slopes(schedule), None
    for taken in range(steps):
        at = step + taken
        x_0 = _image(predict, schedule, x_t, at)
        ahead = x_0 if before is None else x_0 + _at(slope, at, x_t) * (x_0 - before)
        x_t, before = schedule.step_towards(ahead, x_t, at), x_0
        if meet is not None:
            meet(taken + 1, x_t)
    return x_t


def unipc(
    predict: Predict, schedule: DDIMSchedule, x_t: Tensor, step: Tensor, steps: int, meet: Meet | None = None
) -> Tensor:
    """UniPC (Zhao et al. 2023, algorithms 5 and 6) of the second order with B(h) = e^h - 1.

    Its predictor is DPM-Solver++ 2M, and what the network says of the x_t in which that ends corrects the way there, at
    no further call. Those that it meets on the way are the corrected ones; the last, of which no network was asked, is
    not.
    """
    slope, (first, second) = _slopes(schedule), _corrections(schedule)
    start, before, earlier = x_t, None, None  # of the step before this one: x_t, x_0, and the x_0 before that
    for taken in range(steps):
        at = step + taken
        x_0 = _image(predict, schedule, x_t, at)
        if before is not None:
            if earlier is None:
                middle = before + (x_0 - before) / 2
            else:
                middle = (
                    before + _at(first, at - 1, x_t) * (before - earlier) + _at(second, at - 1, x_t) * (x_0 - before)
                )
            x_t = schedule.step_towards(middle, start, at - 1)
            if meet is not None:
                meet(taken, x_t)
        ahead = x_0 if before is None else x_0 + _at(slope, at, x_t) * (x_0 - before)
        start, before, earlier = x_t, x_0, before
        x_t = schedule.step_towards(ahead, x_t, at)
    if meet is not None:
        meet(steps, x_t)
    return x_t


def _image(predict: Predict, schedule: DDIMSchedule, x_t: Tensor, step: Tensor) -> Tensor:
    """The x_0 that a network sees in x_t, within the sampler's range."""
    return schedule.clipped(schedule.x_0_and_noise(predict(x_t, schedule.timesteps[step]), x_t, step)[0])


def _at(values: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """Those of each sample's step, to be multiplied with images."""
    return values[step].view(-1, *[1] * (like.dim() - 1))


def _lengths(schedule: DDIMSchedule) -> Tensor:
    """Of each step in λ = log(alpha_t / sigma_t), (S,) float64."""
    return (schedule.alphas.double().log() - schedule.sigmas.double().log()).diff()


def _slopes(schedule: DDIMSchedule) -> Tensor:
    """1 / 2r (S,) of each step: how far the change of x_0 over the step before it goes on to the middle of this one.

    r = h of the step before / h of this one, with h its length in λ = log(alpha_t / sigma_t). After a start without
    signal, where λ is -inf, it is 0.
    """
    length = _lengths(schedule)
    slope = torch.zeros_like(length)
    slope[1:-1] = length[1:-1] / (2 * length[:-2])
    return slope.to(schedule.alphas.dtype)


def _corrections(schedule: DDIMSchedule) -> tuple[Tensor, Tensor]:
    """What UniPC's corrector takes of the change of x_0 over the step before each, and over the step itself: 2 x (S,).

    For the coefficients ρ of its quadrature B(h)·ρ·(1, r) = (φ_2(h)·h, 2·φ_3(h)·h), with r as in :func:`_slopes`.
    """
    h = _lengths(schedule)
    ratio = 2 * _slopes(schedule).double()  # of h to that of the step before
    decay = torch.expm1(-h)
    linear = (decay / -h - 1) / decay
    square = 2 * ((decay / -h - 1) / -h - 0.5) / decay
    past = (linear - square) * ratio / (1 + ratio)
    return (past * ratio).to(schedule.alphas.dtype), (linear - past).to(schedule.alphas.dtype)


# Each walks ``steps`` steps of a schedule from x_t (B, C, H, W), which is at each sample's ``step`` (B,), and returns
# the x_t (B, C, H, W) in which it arrives; ``meet`` sees those on the way, too.
SOLVERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
}
