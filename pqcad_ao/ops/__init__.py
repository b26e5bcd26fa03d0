"""The ``pqcad::`` operators: schema, shape rule and an exact reference kernel in plain PyTorch.

Activations arrive as int8 integers on their 4- or 8-bit grid, weights packed (``pqcad_ao.packing``); what comes out is
floating point: ``bias + Σ_s accumulator_s · (input_scale_s · weight_scale)``. Importing this module registers them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pqcad_ao.packing import unpack

torch.library.define(
    "pqcad::conv2d",
    "(Tensor input, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor? bias, int weight_bits, "
    "int[] segments, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, ScalarType dtype) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "pqcad::linear",
    "(Tensor input, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor? bias, int weight_bits, "
    "int[] segments, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def arithmetic(device: str = "cpu") -> str:
    """What the machine really multiplies when these operators run on ``device``."""
    return "4-bit weights and activations carried to floating-point multiply-accumulates (exact integers)"


def unpack_conv_weight(weight: Tensor, bits: int, in_channels: int, kernel_size: list[int]) -> Tensor:
    """Packed rows in (kh, kw, in) order to (out, in, kh, kw) int8. ``in_channels`` is per group."""
    height, width = kernel_size
    rows = unpack(weight, bits, height * width * in_channels)
    return rows.unflatten(1, (height, width, in_channels)).permute(0, 3, 1, 2)


def exact_dtype(weight_bits: int, reduction: int) -> torch.dtype:
    """The floating-point type in which a sum of ``reduction`` products of an int8 and a weight is exact.

    float32 holds every integer up to 2^24, in any order of summation; float64 up to 2^53.
    """
    return torch.float32 if reduction * 128 * 2 ** (weight_bits - 1) <= 2**24 else torch.float64


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Keep autocast from rounding sums to bfloat16, and cuDNN from algorithms (Winograd) whose sums are not exact."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with torch.backends.cudnn.flags(enabled=False):
            yield


def conv2d_accumulators(
    input: Tensor,
    weight: Tensor,
    weight_bits: int,
    segments: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> list[Tensor]:
    """Integer sums, one tensor (B, O, H', W') for each segment of the input channels, as integer-valued floats."""
    in_channels = input.shape[1] // groups
    dtype = exact_dtype(weight_bits, in_channels * kernel_size[0] * kernel_size[1])
    integers = unpack_conv_weight(weight, weight_bits, in_channels, kernel_size).to(dtype)
    with _exact(input.device):
        if len(segments) == 1:
            return [torch.nn.functional.conv2d(input.to(dtype), integers, None, stride, padding, dilation, groups)]
        return [
            torch.nn.functional.conv2d(part.to(dtype), rows, None, stride, padding, dilation)
            for part, rows in zip(input.split(segments, 1), integers.split(segments, 1), strict=True)
        ]


def linear_accumulators(input: Tensor, weight: Tensor, weight_bits: int, segments: list[int]) -> list[Tensor]:
    """Integer sums, one tensor (B, ..., O) for each segment of the input features, as integer-valued floats."""
    dtype = exact_dtype(weight_bits, input.shape[-1])
    integers = unpack(weight, weight_bits, input.shape[-1]).to(dtype)
    with _exact(input.device):
        return [
            torch.nn.functional.linear(part.to(dtype), rows)
            for part, rows in zip(input.split(segments, -1), integers.split(segments, -1), strict=True)
        ]


def _rescale(
    input: Tensor,
    accumulators: list[Tensor],
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    channel_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    rank = accumulators[0].dim()
    per_channel = [1] * rank
    per_channel[channel_dim] = -1
    layout = torch._prims_common.suggest_memory_format(input)  # the shape rule promises the input's
    output = None
    for sums, scale in zip(accumulators, input_scale.unbind(1), strict=True):
        scaled = sums.float().mul_(scale.view(-1, *[1] * (rank - 1)) * weight_scale.view(per_channel))
        output = scaled if output is None else output.add_(scaled)
    if bias is not None:
        output = output.add_(bias.view(per_channel))
    return output.to(dtype).contiguous(memory_format=layout)


def _check(input: Tensor, input_scale: Tensor, segments: list[int], channels: int) -> None:
    if input.dtype != torch.int8:
        raise TypeError(f"input is {input.dtype}: the pqcad operators take int8 integers (quantize first)")
    if sum(segments) != channels:
        raise ValueError(f"segments {list(segments)} sum to {sum(segments)}, the input has {channels} channels")
    if input_scale.shape != (input.shape[0], len(segments)):
        expected = (input.shape[0], len(segments))
        raise ValueError(f"input_scale has shape {tuple(input_scale.shape)}: expected (batch, segments) = {expected}")


@torch.library.impl("pqcad::conv2d", "CompositeExplicitAutograd")
def _conv2d(
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
):
    _check(input, input_scale, segments, input.shape[1])
    if len(segments) > 1 and groups > 1:
        raise ValueError("a grouped convolution takes one segment of input channels")
    sums = conv2d_accumulators(input, weight, weight_bits, segments, kernel_size, stride, padding, dilation, groups)
    return _rescale(input, sums, weight_scale, input_scale, bias, 1, dtype)


@torch.library.impl("pqcad::linear", "CompositeExplicitAutograd")
def _linear(input, weight, weight_scale, input_scale, bias, weight_bits, segments, dtype):
    _check(input, input_scale, segments, input.shape[-1])
    return _rescale(
        input, linear_accumulators(input, weight, weight_bits, segments), weight_scale, input_scale, bias, -1, dtype
    )


@torch.library.register_fake("pqcad::conv2d")
def _(
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
):
    size = [
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, p, d, k, s in zip(input.shape[2:], padding, dilation, kernel_size, stride, strict=True)
    ]
    layout = torch._prims_common.suggest_memory_format(input)
    shape = [input.shape[0], weight_scale.shape[0], *size]
    return torch.empty(shape, dtype=dtype, device=input.device, memory_format=layout)


@torch.library.register_fake("pqcad::linear")
def _(input, weight, weight_scale, input_scale, bias, weight_bits, segments, dtype):
    return input.new_empty([*input.shape[:-1], weight_scale.shape[0]], dtype=dtype)
