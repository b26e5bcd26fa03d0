"""``pqcad::conv2d`` and ``pqcad::linear`` on a CPU without kernels: PyTorch's products of what the integers stand for.

A layer's weights are dequantized when it is first called and are kept as long as its packed ones, in four bytes each:
as much memory as full precision takes, and no work at each call that full precision would not have, but for the input's
scale. What comes out is the reference kernel's up to the rounding of float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from pqcad_ao.ops.packing import unpack
from pqcad_ao.ops.reference import channels_last, check_conv2d, check_linear, per_channel, unpack_conv_weight

_kept = WeakTensorKeyDictionary()  # of the packed weights


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
    """``pqcad::conv2d`` on a CPU."""
    check_conv2d(input, input_scale, segments, groups)

    def dequantize() -> Tensor:
        integers = unpack_conv_weight(weight, weight_bits, input.shape[1] // groups, kernel_size)
        return (integers * weight_scale.float()[:, None, None, None]).contiguous(memory_format=torch.channels_last)

    values = input * per_channel(input_scale.float(), segments)[:, :, None, None]
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        output = functional.conv2d(
            values, _keep(weight, weight_scale, dequantize), bias, stride, padding, dilation, groups
        )
    return channels_last(output if addend is None else output.add_(addend), dtype)


def linear(input, weight, weight_scale, input_scale, bias, weight_bits, segments, dtype, addend=None) -> Tensor:
    """``pqcad::linear`` on a CPU."""
    check_linear(input, input_scale, segments)

    def dequantize() -> Tensor:
        return unpack(weight, weight_bits, input.shape[-1]) * weight_scale.float()[:, None]

    scale = per_channel(input_scale.float(), segments)
    values = input * scale.view(input.shape[0], *[1] * (input.dim() - 2), input.shape[-1])
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        output = functional.linear(values, _keep(weight, weight_scale, dequantize), bias)
    return (output if addend is None else output.add_(addend)).to(dtype)


def _keep(weight: Tensor, weight_scale: Tensor, dequantize: Callable[[], Tensor]) -> Tensor:
    """What ``dequantize`` makes of these two, made anew only where one of them is another or was written into."""
    if weight.is_inference() or weight_scale.is_inference():  # of these nobody counts what is written into them
        return dequantize()
    state = (weight._version, weight_scale._version)
    kept = _kept.get(weight)
    if kept is None or kept[0] is not weight_scale or kept[1] != state:
        kept = _kept[weight] = (weight_scale, state, dequantize())
    return kept[2]
