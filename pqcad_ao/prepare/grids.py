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


class SortedRows:
    """Rows of values in ascending order and their running sums, from which a grid's squared error is read.

    The integers of a grid share out the sorted values at the borders between them, so that an error takes one look-up
    for each integer, in place of one rounding for each value.

    Args:
        values: (R, N) float32. weights: (R, N), how many values each of them stands for; one if None.
    """

    def __init__(self, values: Tensor, weights: Tensor | None = None) -> None:
        self.values, order = values.sort(1)
        exact = self.values.double()
        count = torch.ones_like(exact) if weights is None else weights.double().gather(1, order)
        total = exact * count
        self.power = (exact * total).sum(1)
        # entry i: of the i lowest values
        self.count = torch.nn.functional.pad(count.cumsum(1), (1, 0))
        self.total = torch.nn.functional.pad(total.cumsum(1), (1, 0))

    def squared_error(self, scale: Tensor, low: Bound, size: int) -> Tensor:
        """Σ weights·(values - scale·clamp(round(values/scale), low, low + size - 1))² over each row.

        Shapes: scale, and low if it is a tensor, (C, R) or broadcastable to it; returns (C, R) float64.
        """
        scale = scale.double()
        low = torch.as_tensor(low, device=scale.device)
        scale, low = torch.broadcast_tensors(scale, low)
        below = low[..., None] + torch.arange(size - 1, device=scale.device)  # the integer on each border's left
        borders = ((below + 0.5) * scale[..., None]).movedim(0, 1).flatten(1)  # (R, C·(size - 1))
        at = torch.searchsorted(self.values, borders.to(self.values.dtype))
        counts, totals = (
            sums.gather(1, at).unflatten(1, (-1, size - 1)).movedim(0, 1) for sums in (self.count, self.total)
        )
        high = low + size - 1
        # Σ integer·values and Σ integer²·weights, summed by parts over the borders
        crossed = high * self.total[:, -1] - totals.sum(-1)
        squares = high.square() * self.count[:, -1] - ((2 * below + 1) * counts).sum(-1)
        return self.power - 2 * scale * crossed + scale.square() * squares


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
    rows, best = SortedRows(weight), weight.abs().amax(1).clamp_min(_TINY)
    top, parts = best, torch.linspace(0.2, 1.0, _CANDIDATES, device=weight.device)
    for width in range(2, bits + 1):
        low, high = weight_range(width)
        tried = torch.cat([best[None], (parts[:, None] * top / (high + 0.5)).clamp_min(_TINY)])
        best = tried.gather(0, rows.squared_error(tried, low, 2**width).argmin(0, keepdim=True))[0]
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
    rows = SortedRows(values, weights)
    smallest, largest = values.amin(1).clamp_max(0), values.amax(1).clamp_min(0)
    scale = torch.maximum(largest, -smallest).clamp_min(_TINY)
    low = torch.zeros_like(scale, dtype=torch.int64)
    parts = torch.linspace(0.15, 1.0, _CANDIDATES // 2, device=values.device)
    for width in range(2, bits + 1):
        size = 2**width
        if width == 8:
            low = torch.full_like(low, -128)
        error = rows.squared_error(scale[None], low, size)[0]
        for start in activation_lows(width, values.device):
            # the scale at which this grid just reaches both ends of the values
            reach = torch.maximum(largest / (start + size - 0.5), -smallest / (0.5 - start))
            tried = (parts[:, None] * reach).clamp_min(_TINY)
            tried_error, index = rows.squared_error(tried, start, size).min(0)
            better = tried_error < error
            scale = torch.where(better, tried.gather(0, index[None])[0], scale)
            error, low = torch.where(better, tried_error, error), torch.where(better, start, low)
    return scale, low
