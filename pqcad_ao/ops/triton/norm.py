"""``pqcad::norm_silu_quantize`` in Triton: an image is read once from memory, normalised, and written as integers.

Inductor would read it twice, once for GroupNorm's moments and once to normalise. Here a program holds whole groups of
one image's channels in registers; of a large image it reads them again, out of the cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from pqcad_ao.ops.triton.kernels import INTERPRETED

HELD = 256 if INTERPRETED else 32768  # values that a program holds in registers: 64 of each of 512 threads
ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: added to a float32 below 2^22 it leaves the integer in the last bits
APPROXIMATE = tl.constexpr(not INTERPRETED)
# without line breaks: Inductor writes it into a string of its own, where an escaped one would become real; -log2(e)
SILU = tl.constexpr(
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
    "rcp.approx.ftz.f32 t, t; mul.f32 $0, $1, t; }"
)


@triton.jit
def _silu(x):
    """x · sigmoid(x); on a GPU by its units for powers and reciprocals: to 2^-21, in a third of the instructions."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(SILU, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x * tl.sigmoid(x)


@triton.jit
def _load(first, second, batch, pixel, channel, pixels, first_channels, second_channels, mask, TWO: tl.constexpr):
    """(pixel, channel) of the images side by side, zero where ``mask`` is not set."""
    place = (batch * pixels + pixel).to(tl.int64)[:, None]
    if TWO:
        in_first = (channel < first_channels)[None, :]
        a = tl.load(first + place * first_channels + channel[None, :], mask=mask & in_first, other=0)
        other = (channel - first_channels)[None, :]
        b = tl.load(second + place * second_channels + other, mask=mask & ~in_first, other=0)
        return tl.where(in_first, a, b)
    return tl.load(first + place * first_channels + channel[None, :], mask=mask, other=0)


@triton.jit
def _norm_silu_quantize(
    first,
    second,
    weight,
    bias,
    scale,
    low,
    output,
    pixels,
    width,
    first_channels,
    second_channels,
    group_channels,
    eps,
    span,
    middle,
    segments,
    TWO: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """BLOCK channels of one image, whole groups; channels below and from ``middle`` on have grids of their own.

    WHOLE: PIXELS are all of them, and the channels are held in registers; else they are read again from the cache.
    EVEN: every program has BLOCK = CHANNELS channels and, in each turn, PIXELS pixels.
    """
    batch = tl.program_id(1)
    lane = tl.arange(0, CHANNELS)
    channel = tl.program_id(0) * BLOCK + lane
    channels = first_channels + second_channels
    channel_mask = (lane < BLOCK) & (channel < channels)
    given = (first, second, batch)
    sizes = (pixels, first_channels, second_channels)
    factor = tl.full((CHANNELS,), 1.0, tl.float32)
    shift = tl.zeros((CHANNELS,), tl.float32)
    pixel = tl.arange(0, PIXELS)
    mask = (pixel < pixels)[:, None] & channel_mask[None, :]
    if WHOLE:
        values = _load(*given, pixel, channel, *sizes, mask, TWO)
    if NORM:
        group = channel // group_channels
        same = (group[:, None] == group[None, :]) & channel_mask[None, :]
        count = pixels * group_channels
        if WHOLE:
            sums = tl.sum(values.to(tl.float32), 0)
        else:
            sums = tl.zeros((CHANNELS,), tl.float32)
            for start in range(0, pixels, PIXELS):
                mask = (start + pixel < pixels)[:, None] & channel_mask[None, :]
                sums += tl.sum(_load(*given, start + pixel, channel, *sizes, mask, TWO).to(tl.float32), 0)
        mean = tl.sum(tl.where(same, sums[None, :], 0.0), 1) / count
        if WHOLE:
            centred = values.to(tl.float32) - mean[None, :]
            squares = tl.sum(centred * centred if EVEN else tl.where(mask, centred * centred, 0.0), 0)
        else:
            squares = tl.zeros((CHANNELS,), tl.float32)
            for start in range(0, pixels, PIXELS):
                mask = (start + pixel < pixels)[:, None] & channel_mask[None, :]
                centred = _load(*given, start + pixel, channel, *sizes, mask, TWO).to(tl.float32) - mean[None, :]
                squares += tl.sum(tl.where(mask, centred * centred, 0.0), 0)
        variance = tl.sum(tl.where(same, squares[None, :], 0.0), 1) / count
        factor = tl.rsqrt(variance + eps)
        if WEIGHT:
            factor *= tl.load(weight + channel, mask=channel_mask, other=0).to(tl.float32)
        shift = -mean * factor
        if BIAS:
            shift += tl.load(bias + channel, mask=channel_mask, other=0).to(tl.float32)
    segment = batch * segments + tl.where(channel < middle, 0, 1) * (segments > 1)
    inverse = 1 / tl.load(scale + segment, mask=channel_mask, other=1)
    lowest = tl.load(low + segment, mask=channel_mask, other=0).to(tl.float32)
    highest = lowest + span
    for start in range(0, pixels, PIXELS):
        place = start + pixel
        mask = (place < pixels)[:, None] & channel_mask[None, :]
        x = (values if WHOLE else _load(*given, place, channel, *sizes, mask, TWO)).to(tl.float32)
        if NORM:
            x = x * factor[None, :] + shift[None, :]
        if ACTIVATE:
            x = _silu(x)
        x = tl.minimum(tl.maximum(x * inverse[None, :], lowest[None, :]), highest[None, :])
        integers = (x + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
        image = output + batch.to(tl.int64) * pixels * (UPSAMPLE * UPSAMPLE) * channels
        if UPSAMPLE == 1:
            tl.store(image + place[:, None] * channels + channel[None, :], integers, mask=mask)
        else:
            y, left = place // width * UPSAMPLE, place % width * UPSAMPLE
            for copy in tl.static_range(UPSAMPLE * UPSAMPLE):
                copied = (y + copy // UPSAMPLE) * (width * UPSAMPLE) + left + copy % UPSAMPLE
                tl.store(image + copied[:, None] * channels + channel[None, :], integers, mask=mask)


# a compiler that traces a kernel takes its warps from a configuration alone
KERNELS = {
    warps: triton.autotune([triton.Config({}, num_warps=warps)], key=[])(_norm_silu_quantize)
    for warps in (1, 2, 4, 8, 16)
}


def fits(types: Sequence[torch.dtype | None], segments: Sequence[int], norm_groups: int) -> bool:
    """Whether the kernel takes images of these types side by side: at most two of one type, and of two segments."""
    narrow = norm_groups == 0 or sum(segments) // norm_groups <= 64
    return len(types) <= 2 and len(set(types)) == 1 and len(segments) <= 2 and narrow


def _block(channels: int, norm_groups: int) -> int:
    """Channels of a program: whole groups, 32 where they come to that: a memory transaction at a pixel, or two."""
    group = channels // norm_groups if norm_groups else 1
    return min(channels, group * max(1, 32 // group))


@triton_op("pqcad::triton_norm_silu_quantize", mutates_args={})
def norm_silu_quantize(
    inputs: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    norm_groups: int,
    eps: float,
    silu: bool,
    scale: Tensor,
    low: Tensor,
    segments: list[int],
    bits: int,
    upsample: int,
) -> Tensor:
    """``pqcad::norm_silu_quantize`` of arguments that :func:`fits` accepts."""
    batch, _, height, width = inputs[0].shape
    channels = sum(x.shape[1] for x in inputs)
    output = torch.empty(
        (batch, channels, height * upsample, width * upsample),
        dtype=torch.int8,
        device=inputs[0].device,
        memory_format=torch.channels_last,
    )
    if output.numel() == 0:
        return output
    images = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    block = _block(channels, norm_groups)
    lanes, pixels = triton.next_power_of_2(block), height * width
    at_once = min(triton.next_power_of_2(pixels), HELD // lanes)
    warps = max(1, min(16, at_once * lanes // 2048))
    wrap_triton(KERNELS[warps])[(triton.cdiv(channels, block), batch)](
        images[0],
        images[-1],
        scale if weight is None else weight,
        scale if bias is None else bias,
        scale.float().contiguous(),
        low.contiguous(),
        output,
        pixels,
        width,
        images[0].shape[1],
        images[1].shape[1] if len(images) > 1 else 0,
        channels // max(norm_groups, 1),
        eps,
        2**bits - 1,
        segments[0],
        len(segments),
        TWO=len(images) > 1,
        NORM=norm_groups > 0,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        ACTIVATE=silu,
        UPSAMPLE=upsample,
        BLOCK=block,
        PIXELS=at_once,
        CHANNELS=lanes,
        WHOLE=at_once >= pixels,
        EVEN=block == lanes and channels % block == 0 and pixels % at_once == 0,
    )
    return output


@norm_silu_quantize.register_fake
def _(*arguments):
    return torch.ops.pqcad.norm_silu_quantize(*arguments)
