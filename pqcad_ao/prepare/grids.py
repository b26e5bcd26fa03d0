"""Least-squares clipping: the grid of b-bit integers times a scale that lies closest to given values."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

Bound: TypeAlias = Any  # a Tensor or an int; torch.clamp takes two of the one kind or two of the other
_CANDIDATES = 48  # scales tried per width, as parts of the one that reaches the largest value
_TINY = 1e-8  # the scale of a row that is all zero: everything is then the integer 0


def weight_range(bits: int) -> tuple[int, int]:
    """Integers of a signed symmetric weight: [-2^(bits-1), 2^(bits-1) - 1]."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def squared_error(values: Tensor, scale: Tensor, low: Bound, high: Bound, weights: Tensor | None = None) -> Tensor:
    """Σ weights·(values - scale·clamp(round(values/scale), low, high))² over the last dimension.

    Shapes: values, weights (R, N); scale, low, high broadcastable to (..., R); returns (..., R).
    """
    scale = scale[..., None]
    if isinstance(low, Tensor):
        low, high = low[..., None], high[..., None]
    steps = torch.clamp((values * scale.reciprocal()).round(), low, high)
    squares = (values - steps * scale).square()
    return squares.sum(-1) if weights is None else (squares * weights).sum(-1)


def fit_weight_scale(weight: Tensor, bits: int) -> Tensor:
    """Per-row scale of a symmetric ``bits``-bit grid with the least squared error among those tried.

    A width is also given the best scale of every smaller width (its integers are a subset), so more bits never fit
    worse.

    Args:
        weight: (R, N), a row for each output channel. bits: 2 to 8.

    Returns:
        (R,) float32, positive.
    """
    weight = weight.float()
    top = weight.abs().amax(1).clamp_min(_TINY)
    parts = torch.linspace(0.2, 1.0, _CANDIDATES, device=weight.device)
    best, error = top, torch.full_like(top, float("inf"))
    for width in range(2, bits + 1):
        low, high = weight_range(width)
        error = squared_error(weight, best, low, high)
        for part in parts:
            scale = (top * part / (high + 0.5)).clamp_min(_TINY)
            tried_error = squared_error(weight, scale, low, high)
            better = tried_error < error
            best, error = torch.where(better, scale, best), torch.where(better, tried_error, error)
    return best


def activation_lows(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """The lowest integers a ``bits``-bit activation grid may start at.

    Such a grid holds the integers low ... low + 2^bits - 1, always with zero. Up to 7 bits every start keeps them in
    int8; an 8-bit grid is [-128, 127].
    """
    if bits == 8:
        return torch.tensor([-128], device=device)
    size = 2**bits
    return torch.linspace(-(size - 1), 0, min(size, 17), device=device).round().to(torch.int64)


def fit_activation_grid(values: Tensor, bits: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per-row scale and lowest integer of a ``bits``-bit grid with the least squared error among those tried.

    Like :func:`fit_weight_scale`, with the position of the grid searched as well: signed, unsigned, and what lies
    between (SiLU's outputs start at -0.28).

    Args:
        values: (R, N), a row for each timestep group. bits: 2 to 8.
        weights: (R, N), how many values each of them stands for; one if None.

    Returns:
        scale (R,) float32 and low (R,) int64.
    """
    values = values.float()
    smallest, largest = values.amin(1).clamp_max(0), values.amax(1).clamp_min(0)
    scale = torch.maximum(largest, -smallest).clamp_min(_TINY)
    low = torch.zeros_like(scale, dtype=torch.int64)
    parts = torch.linspace(0.15, 1.0, _CANDIDATES // 2, device=values.device)
    for width in range(2, bits + 1):
        size = 2**width
        if width == 8:
            low = torch.full_like(low, -128)
        error = squared_error(values, scale, low, low + size - 1, weights)
        for start in activation_lows(width, values.device):
            # the scale at which this grid just reaches both ends of the values
            reach = torch.maximum(largest / (start + size - 0.5), -smallest / (0.5 - start))
            for part in parts:
                tried = (reach * part).clamp_min(_TINY)
                tried_error = squared_error(values, tried, start, start + size - 1, weights)
                better = tried_error < error
                scale, error = torch.where(better, tried, scale), torch.where(better, tried_error, error)
                low = torch.where(better, start, low)
    return scale, low
