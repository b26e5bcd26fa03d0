"""The operators in Triton: implicit GEMM on packed weights, int8 products with exact int32 sums, one fused epilogue.

``pqcad::conv2d`` and ``pqcad::linear`` on a GPU are these kernels. A layer has several forms, and ``forms`` says
which one a shape takes: ``direct`` widens packed weights in registers, block by block; ``wide`` widens them once, into
memory that is free again after the call; ``tma`` is in ``tma``. Winograd's form, which is what four bits are worth on a
CPU, is none of them: on an H100 it ran at a fifth of the speed, for its planes are four times the image.

Without a GPU the kernels run in Triton's interpreter: set ``TRITON_INTERPRET=1`` before this file is imported.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Blocks:
    """A form of a layer: output pixels and channels of a program, channels of a product, and how the program runs."""

    kind: str
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.rows}x{self.columns}x{self.depth}"

    def variant(self, kernel: Any) -> Any:
        """The kernel with these blocks; a compiler that traces it takes warps and stages from a configuration alone."""
        sizes = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return triton.autotune([triton.Config(sizes, num_warps=self.warps, num_stages=self.stages)], key=[])(kernel)


# the larger ones first
DIRECT = [Blocks("direct", 64, 64, 64, 4, 3), Blocks("direct", 32, 64, 128, 4, 4), Blocks("direct", 16, 64, 128, 4, 4)]
WIDE = [Blocks("wide", 64, 128, 128, 4, 4), Blocks("wide", 64, 64, 64, 4, 3)]


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
def widen(
    weight,
    output,
    out_channels,
    reduction,
    row_bytes,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Packed rows as int8 (out_channels, reduction): what a large product reads many times is unpacked once."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    column_mask, mask = column < out_channels, place < reduction
    values = _weights(weight, column, column_mask, row_bytes, 0, place, mask, BITS, PAIRS)
    target = output + column.to(tl.int64)[None, :] * reduction + place[:, None]
    tl.store(target, values, mask=column_mask[None, :] & mask[:, None])


@triton.jit
def add_and_store(
    total, bias, addend, output, batch, pixel, column, out_channels, pixels, mask, BIAS, ADDEND, EACH_PIXEL
):
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
    DIVISOR: tl.constexpr,
    FAR: tl.constexpr,
    TWO: tl.constexpr,
    BIAS: tl.constexpr,
    ADDEND: tl.constexpr,
    EACH_PIXEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of output pixels and channels of one group; input channels start ... middle ... stop have two scales.

    DIVISOR: of start, middle and stop. FAR: the input has more than 2^31 values.
    """
    group = tl.program_id(1)
    blocks_of_columns = tl.cdiv(group_out, COLUMNS)  # neighbours read the same pixels, which are in L2 then
    row = tl.program_id(0) // blocks_of_columns * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks_of_columns * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = row < rows, column < group_out
    column = group * group_out + column
    pixels = out_height * out_width
    batch, pixel = row // pixels, row % pixels
    top = (pixel // out_width) * stride_h - padding_h
    left = (pixel % out_width) * stride_w - padding_w
    first_row = batch * height
    if FAR:
        first_row = first_row.to(tl.int64)
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
            place = ((first_row + y) * width + x)[:, None] * input_channels + (group * channels + channel)[None, :]
            mask = inside[:, None] if DIVISOR % DEPTH == 0 else inside[:, None] & channel_mask[None, :]
            values = tl.load(input + place, mask=mask, other=0)
            filters = _weights(
                weight, column, column_mask, row_bytes, tap * channels, channel, channel_mask, BITS, PAIRS
            )
            sums = tl.dot(values, filters, sums, out_dtype=tl.int32)
        factor = tl.load(of_sample + part, mask=row_mask, other=0)[:, None] * scale
        total += sums.to(tl.float32) * factor
    mask = row_mask[:, None] & column_mask[None, :]
    add_and_store(
        total, bias, addend, output, batch, pixel, column, out_channels, pixels, mask, BIAS, ADDEND, EACH_PIXEL
    )


# --------------------------------------------------------------------------------------------------- the operators

KERNELS = {str(blocks): blocks.variant(_direct_kernel) for blocks in (*DIRECT, *WIDE)}
DEFAULT = str(DIRECT[0])


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
    form: str = DEFAULT,
) -> Tensor:
    """``pqcad::conv2d``; ``form``: a key of ``KERNELS``."""
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
    pairs = _pairs(segments if groups == 1 else [channels])
    output: Any = None
    even = weight_bits == 4 and channels % 2 == 0 and all(part % 2 == 0 for part in segments)
    filters, bits = weight, weight_bits
    if form.startswith("wide") and weight_bits != 8:
        reduction = kernel_size[0] * kernel_size[1] * channels
        filters, bits = torch.empty((out_channels, reduction), dtype=torch.int8, device=input.device), 8
        wrap_triton(widen)[(triton.cdiv(out_channels, 16), triton.cdiv(reduction, 256))](
            weight, filters, out_channels, reduction, row_bytes, BITS=weight_bits, PAIRS=even, COLUMNS=16, DEPTH=256
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
        rows, group_out = batch * out_height * out_width, out_channels // groups

        def grid(meta, rows=rows, group_out=group_out):
            return (triton.cdiv(rows, meta["ROWS"]) * triton.cdiv(group_out, meta["COLUMNS"]), groups)

        wrap_triton(KERNELS[form])[grid](
            input,
            filters,
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
            filters.shape[1],
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
            BITS=bits,
            PAIRS=even,
            DIVISOR=math.gcd(128, start, middle, stop),
            FAR=input.numel() > 2**31 - 1,
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
    form: str = DEFAULT,
) -> Tensor:
    """``pqcad::linear``: a 1x1 convolution of an image whose pixels are a sample's rows; ``form`` as there."""
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
        form,
    )
    return output.permute(0, 2, 3, 1).reshape(batch, *inner, weight_scale.shape[0])


# the shape rules that are there already: quicker than a walk through the wrappers, and the interpreter has no other
@conv2d.register_fake
def _(*arguments, form=DEFAULT, **options):
    return torch.ops.pqcad.conv2d(*arguments[:15], **options)


@linear.register_fake
def _(*arguments, form=DEFAULT, **options):
    return torch.ops.pqcad.linear(*arguments[:9], **options)
