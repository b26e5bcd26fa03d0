"""The operators in Triton: implicit GEMM on packed weights, int8 products with exact int32 sums, one fused epilogue.

``pqcad::conv2d`` and ``pqcad::linear`` on a GPU are these kernels; ``pqcad::quantize`` and ``norm_silu_quantize`` stay
plain PyTorch there, which Inductor fuses with the norm in front of them. Each 3x3 layer of stride one whose integers
allow it has a second form, Winograd F(2x2, 3x3), exact in int8; :func:`faster_form` measures which one a shape takes.

Without a GPU the kernels run in Triton's interpreter: set ``TRITON_INTERPRET=1`` before this file is imported.
"""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.library import triton_op, wrap_triton
from triton.testing import do_bench

from pqcad_ao.utils.files import write_whole

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMS = ("direct", "winograd")


def _configs(*shapes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """What autotuning tries, as (rows, columns, reduction, warps, stages); an interpreter has nothing to tune."""
    found = [
        triton.Config({"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}, num_warps=warps, num_stages=stages)
        for rows, columns, depth, warps, stages in shapes
    ]
    return found[:1] if INTERPRETED else found


_DIRECT = _configs(
    (64, 64, 64, 4, 3),
    (32, 64, 128, 4, 3),
    (64, 128, 64, 4, 4),
    (128, 64, 64, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 128, 8, 3),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
)
_WINOGRAD = _configs((16, 32, 32, 4, 2), (32, 32, 32, 4, 2), (32, 32, 64, 8, 2), (32, 64, 32, 8, 2))


@triton.jit
def _weights(weight, row, row_mask, row_bytes, first, channel, channel_mask, BITS: tl.constexpr, PAIRS: tl.constexpr):
    """Values ``first + channel`` of packed rows, widened to int8: (len(channel), len(row)).

    PAIRS: ``first`` and the length of a row are even and ``channel`` begins at an even number, so that every byte of
    4-bit values belongs to two neighbours.
    """
    start = weight + row.to(tl.int64)[:, None] * row_bytes
    if BITS == 8:
        values = tl.load(start + first + channel[None, :], mask=row_mask[:, None] & channel_mask[None, :], other=0)
        return tl.trans(values.to(tl.int8, bitcast=True))
    if PAIRS:
        half: tl.constexpr = channel.shape[0] // 2
        base = tl.min(channel, 0)
        pair = base // 2 + tl.arange(0, half)
        last = tl.max(tl.where(channel_mask, channel, -1), 0)
        packed = tl.load(
            start + first // 2 + pair[None, :], mask=row_mask[:, None] & (2 * pair <= last)[None, :], other=0
        ).to(tl.int8, bitcast=True)
        low, high = (packed << 4) >> 4, packed >> 4
        return tl.trans(tl.reshape(tl.join(low, high), (row.shape[0], channel.shape[0])))
    # a stream of bits: a value lies in one byte or in two
    position = (first + channel) * BITS
    byte = position >> 3
    mask = row_mask[:, None] & channel_mask[None, :]
    low = tl.load(start + byte[None, :], mask=mask, other=0).to(tl.int32)
    high = tl.load(start + byte[None, :] + 1, mask=mask & (byte + 1 < row_bytes)[None, :], other=0).to(tl.int32)
    code = ((low | (high << 8)) >> (position & 7)[None, :]) & ((1 << BITS) - 1)
    return tl.trans((code - ((code >> (BITS - 1)) << BITS)).to(tl.int8))


@triton.jit
def _finish(total, bias, addend, output, batch, pixel, column, out_channels, pixels, mask, BIAS, ADDEND, EACH_PIXEL):
    """Bias and addend on top, and into the output's memory (B, pixels, O)."""
    if BIAS:
        total += tl.load(bias + column, mask=column < out_channels, other=0).to(tl.float32)[None, :]
    place = (batch.to(tl.int64) * pixels + pixel)[:, None] * out_channels + column[None, :]
    if ADDEND:
        added = place
        if not EACH_PIXEL:
            added = batch.to(tl.int64)[:, None] * out_channels + column[None, :]
        total += tl.load(addend + added, mask=mask, other=0).to(tl.float32)
    tl.store(output + place, total.to(output.dtype.element_ty), mask=mask)


@triton.autotune(configs=_DIRECT, key=["rows", "out_channels", "channels", "KERNEL_H"], cache_results=True)
@triton.jit
def _direct_kernel(
    input,
    weight,
    weight_scale,
    input_scale,
    bias,
    addend,
    output,
    rows,
    out_channels,
    channels,
    group_out,
    input_channels,
    height,
    width,
    out_height,
    out_width,
    row_bytes,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    start,
    middle,
    stop,
    segment,
    segments,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    TWO: tl.constexpr,
    BIAS: tl.constexpr,
    ADDEND: tl.constexpr,
    EACH_PIXEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of output pixels and channels of one group; input channels start ... middle ... stop have two scales."""
    group = tl.program_id(2)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = row < rows, column < group_out
    column = group * group_out + column
    pixels = out_height * out_width
    batch, pixel = row // pixels, row % pixels
    top = (pixel // out_width) * stride_h - padding_h
    left = (pixel % out_width) * stride_w - padding_w
    scale = tl.load(weight_scale + column, mask=column_mask, other=0)[None, :]
    of_sample = input_scale + batch * segments + segment
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for part in tl.static_range(1 + TWO):
        first, last = (start, middle) if part == 0 else (middle, stop)
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
        blocks = tl.cdiv(last - first, DEPTH)
        for step in range(KERNEL_H * KERNEL_W * blocks):  # one loop: Triton overlaps loads of the innermost alone
            tap = step // blocks
            channel = first + (step % blocks) * DEPTH + tl.arange(0, DEPTH)
            channel_mask = channel < last
            y = top + (tap // KERNEL_W) * dilation_h
            x = left + (tap % KERNEL_W) * dilation_w
            inside = row_mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            place = ((batch * height + y) * width + x)[:, None] * input_channels + (group * channels + channel)[None, :]
            values = tl.load(input + place, mask=inside[:, None] & channel_mask[None, :], other=0)
            filters = _weights(
                weight, column, column_mask, row_bytes, tap * channels, channel, channel_mask, BITS, PAIRS
            )
            sums = tl.dot(values, filters, sums, out_dtype=tl.int32)
        factor = tl.load(of_sample + part, mask=row_mask, other=0)[:, None] * scale
        total += sums.to(tl.float32) * factor
    mask = row_mask[:, None] & column_mask[None, :]
    _finish(total, bias, addend, output, batch, pixel, column, out_channels, pixels, mask, BIAS, ADDEND, EACH_PIXEL)


# ------------------------------------------------------------------------------------------- Winograd F(2x2, 3x3)


@triton.jit
def _signed(position, a, b):
    """What Bᵀ makes of the two values that enter its row ``position``: d0 - d2, d1 + d2, d2 - d1 or d1 - d3."""
    return tl.where(position == 1, a + b, tl.where(position == 2, b - a, a - b))


@triton.jit
def _pixel(input, batch, y, x, channel, mask, height, width, channels):
    inside = mask & ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
    place = ((batch * height + y) * width + x)[:, None] * channels + channel[None, :]
    return tl.load(input + place, mask=inside, other=0).to(tl.int32)


@triton.jit
def _winograd_input(
    input,
    planes,
    tiles,
    channels,
    height,
    width,
    tiles_h,
    tiles_w,
    padding_h,
    padding_w,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """BᵀdB of every 4x4 tile d: one of 16 planes (tiles, channels) int8 for each position; padding is zero."""
    tile = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    position = tl.program_id(2)
    mask = (tile < tiles)[:, None] & (channel < channels)[None, :]
    batch, inner = tile // (tiles_h * tiles_w), tile % (tiles_h * tiles_w)
    top = (inner // tiles_w) * 2 - padding_h
    left = (inner % tiles_w) * 2 - padding_w
    y, x = position // 4, position % 4
    # two of the four rows and of the four columns enter
    first_y = tl.where(y == 0, 0, 1)
    second_y = tl.where(y == 3, 3, 2)
    first_x = tl.where(x == 0, 0, 1)
    second_x = tl.where(x == 3, 3, 2)
    a = _pixel(input, batch, top + first_y, left + first_x, channel, mask, height, width, channels)
    b = _pixel(input, batch, top + first_y, left + second_x, channel, mask, height, width, channels)
    c = _pixel(input, batch, top + second_y, left + first_x, channel, mask, height, width, channels)
    d = _pixel(input, batch, top + second_y, left + second_x, channel, mask, height, width, channels)
    upper = _signed(x, a, b)
    lower = _signed(x, c, d)
    value = _signed(y, upper, lower)
    place = (position * tiles + tile)[:, None] * channels + channel[None, :]
    tl.store(planes + place, value.to(tl.int8), mask=mask)


@triton.jit
def _doubled(position, tap: tl.constexpr):
    """Entry of 2G, the rows [2 0 0], [1 1 1], [1 -1 1], [0 0 2]."""
    outer = tl.where(position == 1, 1, tl.where(position == 2, 1 - 2 * (tap % 2), 0))
    return tl.where(position == 0, 2 * (tap == 0), tl.where(position == 3, 2 * (tap == 2), outer))


@triton.jit
def _winograd_weights(
    weight,
    planes,
    out_channels,
    channels,
    row_bytes,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """(2G)g(2G)ᵀ of every 3x3 filter g: one of 16 planes (out_channels, channels) int8 for each position."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    position = tl.program_id(2)
    column_mask, channel_mask = column < out_channels, channel < channels
    total = tl.zeros((DEPTH, COLUMNS), dtype=tl.int32)
    for tap in tl.static_range(9):
        values = _weights(weight, column, column_mask, row_bytes, tap * channels, channel, channel_mask, BITS, PAIRS)
        total += values.to(tl.int32) * (_doubled(position // 4, tap // 3) * _doubled(position % 4, tap % 3))
    place = (position * out_channels + column)[None, :] * channels + channel[:, None]
    tl.store(planes + place, total.to(tl.int8), mask=channel_mask[:, None] & column_mask[None, :])


@triton.jit
def _transposed(position, entry: tl.constexpr):
    """Row ``entry`` of Aᵀ, [1 1 1 0] or [0 1 -1 -1], at ``position``."""
    first = tl.where(position < 3, 1, 0)
    second = tl.where(position == 0, 0, tl.where(position == 1, 1, -1))
    return first if entry == 0 else second


@triton.jit
def _output(sums, Y: tl.constexpr, X: tl.constexpr):
    """Entry (Y, X) of Aᵀ sums A, over the four that G's doubling left in it."""
    position = tl.arange(0, 16)
    row, column = position // 4, position % 4
    of_row = _transposed(row, Y)
    of_column = _transposed(column, X)
    return (tl.sum(sums * (of_row * of_column)[:, None, None], axis=0) >> 2).to(tl.float32)


@triton.autotune(configs=_WINOGRAD, key=["tiles", "out_channels", "channels"], cache_results=True)
@triton.jit
def _winograd_kernel(
    inputs,
    weights,
    weight_scale,
    input_scale,
    bias,
    addend,
    output,
    tiles,
    out_channels,
    channels,
    out_height,
    out_width,
    tiles_h,
    tiles_w,
    start,
    middle,
    stop,
    segment,
    segments,
    TWO: tl.constexpr,
    BIAS: tl.constexpr,
    ADDEND: tl.constexpr,
    EACH_PIXEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of 2x2 output tiles and channels; input channels start ... middle ... stop have two scales."""
    tile = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tile_mask, column_mask = tile < tiles, column < out_channels
    batch, inner = tile // (tiles_h * tiles_w), tile % (tiles_h * tiles_w)
    scale = tl.load(weight_scale + column, mask=column_mask, other=0)[None, :]
    of_sample = input_scale + batch * segments + segment
    position = tl.arange(0, 16)[:, None, None]
    zero = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    a, b, c, d = zero, zero, zero, zero
    for part in tl.static_range(1 + TWO):
        first, last = (start, middle) if part == 0 else (middle, stop)
        sums = tl.zeros((16, ROWS, COLUMNS), dtype=tl.int32)
        for block in range(first, last, DEPTH):
            channel = block + tl.arange(0, DEPTH)
            channel_mask = channel < last
            rows = (position * tiles + tile[None, :, None]) * channels
            values = tl.load(
                inputs + rows + channel[None, None, :],
                mask=tile_mask[None, :, None] & channel_mask[None, None, :],
                other=0,
            )
            columns = (position * out_channels + column[None, None, :]) * channels
            filters = tl.load(
                weights + columns + channel[None, :, None],
                mask=column_mask[None, None, :] & channel_mask[None, :, None],
                other=0,
            )
            sums = tl.dot(values, filters, sums, out_dtype=tl.int32)
        factor = tl.load(of_sample + part, mask=tile_mask, other=0)[:, None] * scale
        a, b = a + _output(sums, 0, 0) * factor, b + _output(sums, 0, 1) * factor
        c, d = c + _output(sums, 1, 0) * factor, d + _output(sums, 1, 1) * factor
    pixels = out_height * out_width
    for corner in tl.static_range(4):
        y, x = (inner // tiles_w) * 2 + corner // 2, (inner % tiles_w) * 2 + corner % 2
        mask = (tile_mask & (y < out_height) & (x < out_width))[:, None] & column_mask[None, :]
        if corner == 0:
            total = a
        elif corner == 1:
            total = b
        elif corner == 2:
            total = c
        else:
            total = d
        pixel = y * out_width + x
        _finish(total, bias, addend, output, batch, pixel, column, out_channels, pixels, mask, BIAS, ADDEND, EACH_PIXEL)


# --------------------------------------------------------------------------------------------------- the operators


def _pairs(segments: Sequence[int]) -> list[tuple[int, int, int]]:
    """Where each two neighbouring segments start, meet and stop; the last may be alone."""
    ends = [sum(segments[: index + 1]) for index in range(len(segments))]
    starts = [0, *ends[:-1]]
    return [
        (starts[index], ends[index], ends[min(index + 1, len(segments) - 1)]) for index in range(0, len(segments), 2)
    ]


def _image(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


@triton_op("pqcad::triton_conv2d", mutates_args={})
def conv2d(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    segments: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    input_bits: int = 8,
    addend: Tensor | None = None,
    form: str = "direct",
) -> Tensor:
    """``pqcad::conv2d``; ``form``: one of ``FORMS``, Winograd only where :func:`has_winograd` says so."""
    batch, in_channels, height, width = input.shape
    out_channels, channels = weight_scale.shape[0], in_channels // groups
    out_height, out_width = (
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, p, d, k, s in zip((height, width), padding, dilation, kernel_size, stride, strict=True)
    )

    def empty(kind: torch.dtype) -> Tensor:
        shape = (batch, out_channels, out_height, out_width)
        return torch.empty(shape, dtype=kind, device=input.device, memory_format=torch.channels_last)

    if batch == 0:
        return empty(dtype)
    input, weight, input_scale = _image(input), weight.contiguous(), input_scale.float().contiguous()
    weight_scale, row_bytes = weight_scale.float().contiguous(), weight.shape[1]
    if addend is not None:
        addend = addend.contiguous() if addend.shape[2:] == (1, 1) else _image(addend)
    pairs, output = _pairs(segments if groups == 1 else [channels]), None
    even = weight_bits == 4 and channels % 2 == 0 and all(part % 2 == 0 for part in segments)
    tiles_h, tiles_w = (out_height + 1) // 2, (out_width + 1) // 2
    tiles = batch * tiles_h * tiles_w
    if form == "winograd":
        inputs = torch.empty((16, tiles, channels), dtype=torch.int8, device=input.device)
        planes = torch.empty((16, out_channels, channels), dtype=torch.int8, device=input.device)
        wrap_triton(_winograd_input)[(triton.cdiv(tiles, 32), triton.cdiv(channels, 64), 16)](
            input,
            inputs,
            tiles,
            channels,
            height,
            width,
            tiles_h,
            tiles_w,
            padding[0],
            padding[1],
            ROWS=32,
            DEPTH=64,
        )
        wrap_triton(_winograd_weights)[(triton.cdiv(out_channels, 32), triton.cdiv(channels, 64), 16)](
            weight, planes, out_channels, channels, row_bytes, BITS=weight_bits, PAIRS=even, COLUMNS=32, DEPTH=64
        )
    for index, (start, middle, stop) in enumerate(pairs):
        last = index == len(pairs) - 1
        # more than two segments come in turns, each on top of the one before, in float32 until the last
        added = addend if index == 0 else output
        output = empty(dtype if last else torch.float32)
        options = {
            "TWO": stop > middle,
            "BIAS": index == 0 and bias is not None,
            "ADDEND": added is not None,
            "EACH_PIXEL": added is not None and (added.shape[2] != 1 or added.shape[3] != 1),
        }
        bias_or_any = weight_scale if bias is None else bias.float().contiguous()
        added_or_any = weight_scale if added is None else added
        shared = (weight_scale, input_scale, bias_or_any, added_or_any, output)
        if form == "winograd":

            def grid(meta, tiles=tiles):
                return (triton.cdiv(tiles, meta["ROWS"]), triton.cdiv(out_channels, meta["COLUMNS"]))

            wrap_triton(_winograd_kernel)[grid](
                inputs,
                planes,
                *shared,
                tiles,
                out_channels,
                channels,
                out_height,
                out_width,
                tiles_h,
                tiles_w,
                start,
                middle,
                stop,
                2 * index,
                len(segments),
                **options,
            )
        else:
            rows, group_out = batch * out_height * out_width, out_channels // groups

            def grid(meta, rows=rows, group_out=group_out):
                return (triton.cdiv(rows, meta["ROWS"]), triton.cdiv(group_out, meta["COLUMNS"]), groups)

            wrap_triton(_direct_kernel)[grid](
                input,
                weight,
                *shared,
                rows,
                out_channels,
                channels,
                group_out,
                in_channels,
                height,
                width,
                out_height,
                out_width,
                row_bytes,
                *stride,
                *padding,
                *dilation,
                start,
                middle,
                stop,
                2 * index,
                len(segments),
                KERNEL_H=kernel_size[0],
                KERNEL_W=kernel_size[1],
                BITS=weight_bits,
                PAIRS=even,
                **options,
            )
    return output


@triton_op("pqcad::triton_linear", mutates_args={})
def linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    segments: list[int],
    dtype: torch.dtype,
    addend: Tensor | None = None,
) -> Tensor:
    """``pqcad::linear``: a 1x1 convolution of an image whose pixels are a sample's rows."""
    batch, *inner, _ = input.shape

    def image(tensor: Tensor) -> Tensor:
        return tensor.reshape(batch, -1 if batch else 0, 1, tensor.shape[-1]).permute(0, 3, 1, 2)

    ones, zeros = [1, 1], [0, 0]
    output = conv2d(
        image(input),
        weight,
        weight_scale,
        input_scale,
        bias,
        weight_bits,
        segments,
        ones,
        ones,
        zeros,
        ones,
        1,
        dtype,
        8,
        None if addend is None else image(addend),
    )
    return output.permute(0, 2, 3, 1).reshape(batch, *inner, weight_scale.shape[0])


# the shape rules that are there already: quicker than a walk through the wrappers, and the interpreter has no other
@conv2d.register_fake
def _(*arguments, form="direct", **options):
    return torch.ops.pqcad.conv2d(*arguments[:15], **options)


@linear.register_fake
def _(*arguments, **options):
    return torch.ops.pqcad.linear(*arguments, **options)


# --------------------------------------------------------------------------------------------------- which form


def has_winograd(
    weight_bits: int,
    input_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether the Winograd form of a convolution is exact: every plane's integers fit into int8."""
    plain = list(kernel_size) == [3, 3] and list(stride) == [1, 1] and list(dilation) == [1, 1] and groups == 1
    return plain and weight_bits <= 4 and input_bits <= 5


def faster_form(arguments: Sequence, cache: str | Path | None = None) -> str:
    """Measure both forms of a convolution on the GPU, once for each shape; the answers are kept in a file.

    Args:
        arguments: all of ``pqcad::conv2d``, in order. Tensors may be fake: shapes, types and the device matter.
        cache: the file; by default beside Inductor's own cache.

    Returns:
        one of ``FORMS``.
    """
    input, weight_bits, (kernel_size, stride) = arguments[0], arguments[5], arguments[7:9]
    dilation, groups, input_bits = arguments[10], arguments[11], arguments[13]
    if not has_winograd(weight_bits, input_bits, kernel_size, stride, dilation, groups):
        return "direct"
    file = Path(cache) if cache else Path(cache_dir()) / "pqcad_forms.json"
    shapes = [_sizes(value) if isinstance(value, Tensor) else str(value) for value in arguments]
    key = json.dumps([torch.cuda.get_device_name(input.device), torch.__version__, triton.__version__, shapes])
    found = _read(file)
    if key not in found:
        with unset_fake_temporarily():
            call = functools.partial(conv2d, *map(_real, arguments))
            times = {form: do_bench(functools.partial(call, form=form)) for form in FORMS}
        found = {**_read(file), key: min(times, key=times.__getitem__)}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(found).encode())
    return found[key]


def _sizes(value: Tensor) -> list[int]:
    """A tensor's sizes; of a dynamic one that of the call which is compiled for, without a guard on it."""
    return [size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape]


def _real(value: Any) -> Any:
    """Zeros in place of a tensor."""
    return torch.zeros(_sizes(value), dtype=value.dtype, device=value.device) if isinstance(value, Tensor) else value


def _read(file: Path) -> dict[str, str]:
    """Answers kept in a file; a damaged file holds none."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
