"""Arguments of the ``pqcad::`` operators, as hypothesis draws them for every kernel."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from pqcad_ao.ops.packing import pack


def integers(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    """Signed integers of ``bits`` bits, int8."""
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)


@st.composite
def convolutions(draw, winograd: bool, channels: int = 70, winograd_bits: int = 6):
    """Arguments of ``pqcad::conv2d``; with ``winograd`` those that the exact Winograd form takes.

    channels: the most that a segment has. winograd_bits: the most that inputs have with ``winograd``.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = 1 if winograd else draw(st.sampled_from([1, 1, 1, 2, 3]))
    if groups == 1:
        segments = draw(st.lists(st.integers(1, channels), min_size=1, max_size=3))
    else:
        segments = [groups * draw(st.integers(1, 9))]
    out_channels = groups * draw(st.integers(1, channels + 10 if groups == 1 else 9))
    weight_bits = draw(st.integers(2, 4 if winograd else 8))
    input_bits = draw(st.integers(2, winograd_bits if winograd else 8))
    kernel = [3, 3] if winograd else [draw(st.integers(1, 4)) for _ in range(2)]
    stride, dilation = ([1, 1] if winograd else [draw(st.integers(1, 3)) for _ in range(2)] for _ in range(2))
    padding = [draw(st.integers(0, 3)) for _ in range(2)]
    size = [
        max(d * (k - 1) + 1 - 2 * p, 1) + draw(st.integers(0, 6))
        for d, k, p in zip(dilation, kernel, padding, strict=True)
    ]
    batch = draw(st.integers(0, 3))
    # a grid anywhere, zero in it, as post-SiLU activations have it
    low = -draw(st.integers(0, 2 ** min(input_bits, 7) - 1))
    high = min(low + 2**input_bits - 1, 127)
    x = torch.randint(low, high + 1, (batch, sum(segments), *size), generator=generator, dtype=torch.int8)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    reduction = kernel[0] * kernel[1] * sum(segments) // groups
    return (
        x,
        pack(integers(generator, weight_bits, out_channels, reduction), weight_bits),
        torch.rand(out_channels, generator=generator) + 0.1,
        torch.rand(batch, len(segments), generator=generator) + 0.1,
        draw(st.sampled_from([None, torch.randn(out_channels, generator=generator)])),
        weight_bits,
        segments,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        torch.float32,
        input_bits,
    )


def extremes(low: int, high: int, weights: str) -> tuple:
    """A 3x3 convolution of inputs at ``low`` or ``high``; 4-bit weights at an end: lowest, highest, signs of both."""
    generator = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(2, 64, 8, 8, generator=generator) < 0.5, low, high).to(torch.int8)
    x[0] = high
    weight = {"lowest": torch.full((16, 576), -8), "highest": torch.full((16, 576), 7)}.get(weights)
    if weight is None:
        weight = torch.where(torch.rand(16, 576, generator=generator) < 0.5, -8, 7)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1, torch.float32, (high - low).bit_length())
    return (x, pack(weight, 4), torch.ones(16), torch.ones(2, 1), None, 4, [64], *geometry)
