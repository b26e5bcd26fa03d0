"""How good predictions are: signal-to-noise ratios, of tensors and over a sampling trajectory."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao.denoiser import predict


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two powers in dB.

    No noise is inf, whatever the signal; a signal of zero, or noise that is NaN or infinite, is -inf.
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def row_powers(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of the reference and of the difference, (B,) float64 each, for tensors (B, ...).

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != other.shape:
        raise ValueError(f"reference is {tuple(reference.shape)}, other {tuple(other.shape)}; the shapes must be equal")
    reference, other = (tensor.detach().double().unsqueeze(-1).flatten(1) for tensor in (reference, other))
    return reference.square().sum(1), (reference - other).square().sum(1)


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization-noise ratio 10 log10(Σ ref² / Σ (ref − other)²) in dB; inf where both are equal.

    Args:
        reference, other: of one shape, any dtype.

    Raises:
        ValueError: shapes that differ, NaN or infinite values.
    """
    _check_finite(reference, other)
    signal, noise = row_powers(reference[None], other[None])
    return decibels(signal.item(), noise.item())


def _check_finite(reference: Tensor, other: Tensor) -> None:
    if not (reference.isfinite().all() and other.isfinite().all()):
        raise ValueError("SQNR of NaN or infinite values is not defined; look for them in reference and other")


@torch.no_grad()
def trajectory_sqnr(
    reference_fn: nn.Module, other_fn: nn.Module, inputs: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """SQNR of one network's predictions against another's, on recorded points of sampling trajectories.

    Args:
        reference_fn, other_fn: called as ``f(x_t, timestep)``; whatever ``pqcad_ao.denoiser.predict`` understands.
        inputs: pairs of x_t (B, C, H, W) and timestep, 0-d or (B,); a batch may mix timesteps.

    Returns:
        ``sqnr_db`` over everything, and ``per_step``: {timestep: dB}, noisiest timestep first. Powers are summed before
        the ratio is taken: a point with a large prediction weighs more.
    """
    if not inputs:
        raise ValueError("no inputs given; record at least one pair of x_t and timestep")
    totals: dict[float, list[float]] = {}
    for x_t, timestep in inputs:
        reference, other = predict(reference_fn, x_t, timestep), predict(other_fn, x_t, timestep)
        _check_finite(reference, other)
        signal, noise = row_powers(reference, other)
        steps = torch.as_tensor(timestep).cpu().expand(len(x_t)).tolist()
        for step, *power in zip(steps, signal.tolist(), noise.tolist(), strict=True):
            total = totals.setdefault(step, [0.0, 0.0])
            total[0] += power[0]
            total[1] += power[1]
    overall = decibels(*(math.fsum(column) for column in zip(*totals.values(), strict=True)))
    return {"sqnr_db": overall, "per_step": {step: decibels(*totals[step]) for step in sorted(totals, reverse=True)}}
