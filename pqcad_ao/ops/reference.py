"""The operators' arithmetic in plain PyTorch: exact integer sums, carried by floating-point multiply-accumulates."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pqcad_ao.ops.packing import unpack
from pqcad_ao.utils.checks import NOT_FINITE


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
    accumulators: list[Tensor],
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    channel_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    rank = accumulators[0].dim()
    per_channel = [1] * rank
    per_channel[channel_dim] = -1
    output = None
    for sums, scale in zip(accumulators, input_scale.unbind(1), strict=True):
        scaled = sums.float().mul_(scale.view(-1, *[1] * (rank - 1)) * weight_scale.view(per_channel))
        output = scaled if output is None else output.add_(scaled)
    if bias is not None:
        output = output.add_(bias.view(per_channel))
    if addend is not None:
        output = output.add_(addend)
    return output.to(dtype)


def check_linear(input: Tensor, input_scale: Tensor, segments: list[int], channel_dim: int = -1) -> None:
    """Raise ValueError where the input is none of integers, or the segments are not its own."""
    if input.dtype != torch.int8:
        raise ValueError(f"input is {input.dtype}: the pqcad operators take int8 integers (quantize first)")
    _check_grid("input_scale", input_scale, segments, input.shape[0], input.shape[channel_dim])


def check_conv2d(input: Tensor, input_scale: Tensor, segments: list[int], groups: int) -> None:
    """The same of a convolution."""
    check_linear(input, input_scale, segments, 1)
    if len(segments) > 1 and groups > 1:
        raise ValueError("a grouped convolution takes one segment of input channels")


def channels_last(output: Tensor, dtype: torch.dtype) -> Tensor:
    """Strides, too, as the shape rule promises them, where a dimension of one leaves a choice."""
    promised = torch.empty_like(output, dtype=dtype, memory_format=torch.channels_last)
    same = output.dtype == dtype and output.stride() == promised.stride()
    return output if same else promised.copy_(output)


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
) -> Tensor:
    """``pqcad::conv2d`` on any device."""
    check_conv2d(input, input_scale, segments, groups)
    sums = conv2d_accumulators(input, weight, weight_bits, segments, kernel_size, stride, padding, dilation, groups)
    return channels_last(_rescale(sums, weight_scale, input_scale, bias, addend, 1, dtype), dtype)


def linear(input, weight, weight_scale, input_scale, bias, weight_bits, segments, dtype, addend=None) -> Tensor:
    """``pqcad::linear`` on any device."""
    check_linear(input, input_scale, segments)
    sums = linear_accumulators(input, weight, weight_bits, segments)
    return _rescale(sums, weight_scale, input_scale, bias, addend, -1, dtype)


def weight_only_linear(
    input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, weight_bits: int
) -> Tensor:
    """``pqcad::weight_only_linear`` on any device; of plain operators, with their gradient."""
    rows = unpack(weight, weight_bits, input.shape[-1]).float() * weight_scale[:, None]
    return torch.nn.functional.linear(input, rows.to(input.dtype), None if bias is None else bias.to(input.dtype))


def per_channel(values: Tensor, segments: Sequence[int]) -> Tensor:
    """(B, segments) to (B, channels): each segment's value for each of its channels."""
    # of plain views: a tensor of the counts would have to travel to a GPU at every call
    parts = values.unbind(1)
    return torch.cat([part[:, None].expand(-1, count) for part, count in zip(parts, segments, strict=True)], 1)


def quantize(input: Tensor, scale: Tensor, low: Tensor, segments: list[int], bits: int, channel_dim: int) -> Tensor:
    """``pqcad::quantize`` on any device."""
    for name, values in (("scale", scale), ("low", low)):
        _check_grid(name, values, segments, input.shape[0], input.shape[channel_dim])
    shape = [1] * input.dim()
    shape[0], shape[channel_dim] = input.shape[0], sum(segments)
    _check_finite(input)
    scale, low = (per_channel(values.float(), segments).view(shape) for values in (scale, low))
    # nothing in place: on a GPU Inductor is given this function for the operator
    integers = (input.float() * scale.reciprocal()).round().clamp(low, low + (2**bits - 1))
    layout = torch.channels_last if input.dim() == 4 and channel_dim == 1 else torch.contiguous_format
    return integers.to(torch.int8, memory_format=layout, copy=True)


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
    """``pqcad::norm_silu_quantize`` on any device."""
    x = torch.cat(inputs, 1).float()
    if norm_groups > 0:
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
        x = torch.nn.functional.group_norm(x, norm_groups, weight, bias, eps)
    if silu:
        x = torch.nn.functional.silu(x)
    x = quantize(x, scale, low, segments, bits, 1)
    if upsample == 1:
        return x
    return x.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3).contiguous(memory_format=torch.channels_last)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``pqcad::attention`` on any device."""
    batch, heads, length, channels = query.shape
    output = query.new_empty(batch, length, heads, channels).transpose(1, 2)
    return output.copy_(torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale))


def _check_finite(values: Tensor) -> None:
    # on a GPU nobody waits for what a look at the values would say
    if values.device.type != "cpu" or values.sum(dtype=torch.float32).isfinite():  # one pass where all is well
        return
    if not values.isfinite().all():
        raise ValueError(f"{NOT_FINITE}: integers would hide it")


def _check_grid(name: str, values: Tensor, segments: list[int], batch: int, channels: int) -> None:
    """Scales and lows are (batch, segments), and the segments make up the channels."""
    if sum(segments) != channels:
        raise ValueError(f"segments {list(segments)} sum to {sum(segments)}, the input has {channels} channels")
    expected = (batch, len(segments))
    if values.shape != expected:
        raise ValueError(f"{name} has shape {tuple(values.shape)}: expected (batch, segments) = {expected}")
