"""Convolutions whose blocks a copy engine brings (compute capability 9.0): the fastest form for large batches.

The weights are widened to int8 once per call, into memory that is free again after it. Then every tap of a filter is a
product of a box of pixels with a block of weights; where a box reaches over the image's edge, the engine fills in
zeros.

The operator is opaque to Inductor: descriptors are made on the host at each call, which is free under CUDA graphs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pqcad_ao.ops.triton.kernels import INTERPRETED, Blocks, add_and_store, widen

TMA = [  # the faster ones first
    Blocks("tma", 128, 256, 128, 8, 3),
    Blocks("tma", 256, 128, 128, 8, 3),
    Blocks("tma", 128, 128, 128, 8, 4),
    Blocks("tma", 64, 64, 128, 4, 4),
    Blocks("tma", 128, 256, 64, 8, 4),
    Blocks("tma", 128, 128, 64, 8, 4),
    Blocks("tma", 64, 64, 64, 4, 4),
    Blocks("tma", 128, 64, 32, 4, 4),
    Blocks("tma", 64, 64, 32, 4, 4),
]
BLOCKS = {str(blocks): blocks for blocks in TMA}


@triton.jit
def _tma_kernel(
    image,
    filters,
    weight_scale,
    input_scale,
    bias,
    addend,
    output,
    batch_size,
    out_channels,
    channels,
    out_height,
    out_width,
    padding_h,
    padding_w,
    start,
    middle,
    stop,
    segment,
    segments,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TWO: tl.constexpr,
    BIAS: tl.constexpr,
    ADDEND: tl.constexpr,
    EACH_PIXEL: tl.constexpr,
    IMAGES: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of images x rows x pixels and channels; input channels start ... middle ... stop have two scales."""
    ROWS: tl.constexpr = IMAGES * TILE_H * TILE_W
    blocks_of_columns = tl.cdiv(out_channels, COLUMNS)  # neighbours read the same pixels, which are in L2 then
    tile = tl.program_id(0) // blocks_of_columns
    first_column = tl.program_id(0) % blocks_of_columns * COLUMNS
    tiles_w, tiles_h = tl.cdiv(out_width, TILE_W), tl.cdiv(out_height, TILE_H)
    left = tile % tiles_w * TILE_W
    top = tile // tiles_w % tiles_h * TILE_H
    first = tile // (tiles_w * tiles_h) * IMAGES
    row = tl.arange(0, ROWS)
    x = left + row % TILE_W
    y = top + row // TILE_W % TILE_H
    batch = first + row // (TILE_W * TILE_H)
    column = first_column + tl.arange(0, COLUMNS)
    row_mask, column_mask = (x < out_width) & (y < out_height) & (batch < batch_size), column < out_channels
    scale = tl.load(weight_scale + column, mask=column_mask, other=0)[None, :]
    of_sample = input_scale + batch * segments + segment
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for part in tl.static_range(1 + TWO):
        begin, end = (start, middle) if part == 0 else (middle, stop)
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
        blocks = (end - begin) // DEPTH
        for step in range(KERNEL_H * KERNEL_W * blocks):
            tap = step // blocks
            channel = begin + step % blocks * DEPTH
            above = top + tap // KERNEL_W * DILATION_H - padding_h
            before = left + tap % KERNEL_W * DILATION_W - padding_w
            values = image.load([first, above, before, channel]).reshape(ROWS, DEPTH)
            block = filters.load([first_column, tap * channels + channel])
            sums = tl.dot(values, block.T, sums, out_dtype=tl.int32)
        factor = tl.load(of_sample + part, mask=row_mask, other=0)[:, None] * scale
        total += sums.to(tl.float32) * factor
    mask = row_mask[:, None] & column_mask[None, :]
    pixel, pixels = y * out_width + x, out_height * out_width
    add_and_store(
        total, bias, addend, output, batch, pixel, column, out_channels, pixels, mask, BIAS, ADDEND, EACH_PIXEL
    )


def blocks_for(
    out_channels: int, segments: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], groups: int
) -> list[Blocks]:
    """The blocks that a layer can have, the fastest first; none where the copy engine cannot serve it.

    Its boxes are dense (stride one), and blocks of channels are whole ones of one segment.
    """
    if list(stride) != [1, 1] or groups != 1 or len(segments) > 2:
        return []
    depth = max((d for d in (128, 64, 32) if all(part % d == 0 for part in segments)), default=0)
    return [blocks for blocks in TMA if blocks.depth == depth and blocks.columns <= max(out_channels, 64)]


def _tile(size: int, most: int) -> int:
    """The power of two up to ``most`` whose multiples cover ``size`` with the least waste, the largest of equals."""
    choices = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return min(choices, key=lambda tile: (triton.cdiv(size, tile) * tile, -tile))


torch.library.define(
    "pqcad::tma_conv2d",
    "(Tensor input, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor? bias, int weight_bits, "
    "int[] segments, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, ScalarType dtype, "
    "int input_bits, Tensor? addend, str form) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def conv2d(
    input,
    weight,
    weight_scale,
    input_scale,
    bias,
    weight_bits,
    segments,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    dtype,
    input_bits=8,
    addend=None,
    form="tma-128x128x128",
) -> Tensor:
    """``pqcad::conv2d`` of a layer that :func:`blocks_for` gives blocks for; ``form``: their name."""
    blocks = BLOCKS[form]
    batch, channels, height, width = input.shape
    out_channels, reduction = weight_scale.shape[0], kernel_size[0] * kernel_size[1] * channels
    out_height, out_width = (
        length + 2 * p - d * (k - 1)
        for length, p, d, k in zip((height, width), padding, dilation, kernel_size, strict=True)
    )
    shape = (batch, out_channels, out_height, out_width)
    output = torch.empty(shape, dtype=dtype, device=input.device, memory_format=torch.channels_last)
    if output.numel() == 0:
        return output
    nhwc = input.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    filters = weight.view(torch.int8)
    if weight_bits != 8:
        filters = torch.empty((out_channels, reduction), dtype=torch.int8, device=input.device)
        grid = (triton.cdiv(out_channels, 16), triton.cdiv(reduction, 256))
        even = {"BITS": weight_bits, "PAIRS": weight_bits == 4}  # segments are multiples of 32
        widen[grid](weight, filters, out_channels, reduction, weight.shape[1], **even, COLUMNS=16, DEPTH=256)
    if addend is not None:
        each_pixel = addend.shape[2:] != (1, 1)
        addend = addend.contiguous(memory_format=torch.channels_last) if each_pixel else addend.contiguous()
    tile_w = _tile(out_width, min(blocks.rows, 64))
    tile_h = _tile(out_height, blocks.rows // tile_w)
    images = blocks.rows // (tile_w * tile_h)
    programs = triton.cdiv(batch, images) * triton.cdiv(out_height, tile_h) * triton.cdiv(out_width, tile_w)
    strides = (height * width * channels, width * channels, channels, 1)  # of dimensions of one, too
    sizes = (batch, height, width, channels)
    _tma_kernel[(programs * triton.cdiv(out_channels, blocks.columns),)](
        TensorDescriptor(nhwc, list(sizes), list(strides), [images, tile_h, tile_w, blocks.depth]),
        TensorDescriptor(filters, [out_channels, reduction], [reduction, 1], [blocks.columns, blocks.depth]),
        weight_scale.float().contiguous(),
        input_scale.float().contiguous(),
        weight_scale if bias is None else bias.float().contiguous(),
        weight_scale if addend is None else addend,
        output,
        batch,
        out_channels,
        channels,
        out_height,
        out_width,
        *padding,
        0,
        segments[0],
        sum(segments),
        0,
        len(segments),
        KERNEL_H=kernel_size[0],
        KERNEL_W=kernel_size[1],
        DILATION_H=dilation[0],
        DILATION_W=dilation[1],
        TWO=len(segments) > 1,
        BIAS=bias is not None,
        ADDEND=addend is not None,
        EACH_PIXEL=addend is not None and each_pixel,
        IMAGES=images,
        TILE_H=tile_h,
        TILE_W=tile_w,
        COLUMNS=blocks.columns,
        DEPTH=blocks.depth,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return output


torch.library.impl("pqcad::tma_conv2d", "CPU" if INTERPRETED else "CUDA", conv2d)


@torch.library.register_fake("pqcad::tma_conv2d")
def _(*arguments):
    return torch.ops.pqcad.conv2d(*arguments[:15])
