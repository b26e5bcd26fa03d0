"""A convolution on packed integer weights."""

from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao.nn.layers import QuantizedLayer
from pqcad_ao.nn.timestep import Timestep


class QuantizedConv2d(QuantizedLayer):
    """A convolution (B, C, H, W) to (B, O, H', W') on packed integer weights, rows in (kh, kw, in) order."""

    kind = "conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        bias: bool,
        weight_bits: int,
        activation_bits: int | None,
        segments: list[int],
        timestep: Timestep,
    ) -> None:
        reduction = in_channels // groups * kernel_size[0] * kernel_size[1]
        super().__init__(out_channels, reduction, bias, weight_bits, activation_bits, segments, timestep)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self.padding, self.dilation = tuple(padding), tuple(dilation)

    @classmethod
    def like(
        cls, original: Any, weight_bits: int, activation_bits: int | None, segments: list[int], timestep: Timestep
    ) -> "QuantizedConv2d":
        """The same convolution as an ``nn.Conv2d``, with its weights still to be set."""
        return cls(
            original.in_channels,
            original.out_channels,
            kernel_size=list(original.kernel_size),
            stride=list(original.stride),
            padding=numeric_padding(original),
            dilation=list(original.dilation),
            groups=original.groups,
            bias=original.bias is not None,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            segments=segments,
            timestep=timestep,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x)

    def convolve(self, image: Tensor) -> Tensor:
        """``pqcad::conv2d`` of an image (B, C, H, W); a convolution in floating point where activations are."""
        if self.activation_bits is None:
            return self.in_float(image)
        integers, scale = self.quantize_input(image, 1)
        output = torch.ops.pqcad.conv2d(
            integers,
            self.weight,
            self.weight_scale,
            scale,
            self.bias,
            self.weight_bits,
            self.segments,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            image.dtype,
            self.activation_bits,
        )
        return self.with_gradient(output, image, scale, 1)

    def in_float(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.packed_weight().to(x.dtype)
        return nn.functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{shape}, {self._bits()}"


def numeric_padding(convolution: nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d) -> list[int]:
    """A convolution's padding in numbers, where its module says "same" or "valid", too."""
    padding, dilation, kernel_size = convolution.padding, convolution.dilation, convolution.kernel_size
    if not isinstance(padding, str):
        return list(padding)
    if padding == "valid":
        return [0] * len(kernel_size)
    return [d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True)]
