"""What stays in a quantized network: convolutions and linears on packed integer weights."""

import torch
from torch import Tensor, nn

import pqcad_ao.ops  # noqa: F401  (registers the operators)
from pqcad_ao.nn.timestep import Timestep
from pqcad_ao.ops.packing import pack, packed_size, unpack
from pqcad_ao.ops.reference import unpack_conv_weight


class QuantizedLayer(nn.Module):
    """State shared by quantized convolutions and linears.

    Buffers (scales and bias stay float32 whatever the network's type, so that bfloat16 does not move the grid):
        weight: (O, ceil(K·bits/8)) uint8, packed along the reduction dimension.
        weight_scale: (O,). bias: (O,) or None.
        input_scale: (groups, segments) and input_low: (groups, segments) int16; absent where activations are float.
    """

    float32_buffers = ("weight_scale", "bias", "input_scale")

    def __init__(
        self,
        out_features: int,
        reduction: int,
        bias: bool,
        weight_bits: int,
        activation_bits: int | None,
        segments: list[int],
        timestep: Timestep,
    ) -> None:
        super().__init__()
        self.weight_bits, self.activation_bits, self.segments = weight_bits, activation_bits, list(segments)
        self.reduction, self.timestep = reduction, timestep
        float32 = {"dtype": torch.float32}
        self.register_buffer(
            "weight", torch.zeros(out_features, packed_size(reduction, weight_bits), dtype=torch.uint8)
        )
        self.register_buffer("weight_scale", torch.ones(out_features, **float32))
        self.register_buffer("bias", torch.zeros(out_features, **float32) if bias else None)
        if activation_bits is not None:
            shape = (timestep.groups, len(segments))
            self.register_buffer("input_scale", torch.ones(shape, **float32))
            self.register_buffer("input_low", torch.zeros(shape, dtype=torch.int16))

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name, None) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if value is not None and self._buffers[name].dtype != torch.float32:
                self._buffers[name] = value.to(self._buffers[name].device)
        return self

    def set_weight(self, integers: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Store (O, K) integers, their (O,) scale and the (O,) bias."""
        self.weight = pack(integers, self.weight_bits).to(self.weight.device)
        self.weight_scale = scale.detach().float().clone()
        self.bias = None if bias is None else bias.detach().float().clone()

    def set_grid(self, scale: Tensor, low: Tensor) -> None:
        """Store the activations' (groups, segments) scales and lowest integers."""
        self.input_scale = scale.detach().float().clone().to(self.weight.device)
        self.input_low = low.to(torch.int16).clone().to(self.weight.device)

    def quantize_input(self, x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
        """x as int8 integers of its timestep's grid, and the (B, segments) scale that belongs to them."""
        group = self.timestep.current(x.shape[0])
        scale = self.input_scale[group]
        grid = (scale, self.input_low[group], self.segments, self.activation_bits, channel_dim)
        return torch.ops.pqcad.quantize(x, *grid), scale

    def weight_integers(self) -> Tensor:
        """(O, K) int8, in the order in which they are packed."""
        return unpack(self.weight, self.weight_bits, self.reduction)

    def _bits(self) -> str:
        activation = f"A{self.activation_bits}" if self.activation_bits else "A float"
        split = f", split={self.segments}" if len(self.segments) > 1 else ""
        return f"W{self.weight_bits}{activation[0]}{activation[1:]}{split}"


class QuantizedConv2d(QuantizedLayer):
    """A convolution (B, C, H, W) to (B, O, H', W') on packed integer weights, rows in (kh, kw, in) order."""

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
        self.kernel_size, self.stride = list(kernel_size), list(stride)
        self.padding, self.dilation = list(padding), list(dilation)

    @classmethod
    def like(
        cls, conv: nn.Conv2d, weight_bits: int, activation_bits: int | None, segments: list[int], timestep: Timestep
    ) -> "QuantizedConv2d":
        """The same convolution with its weights still to be set."""
        padding = conv.padding
        if padding == "same":
            padding = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        elif padding == "valid":
            padding = [0, 0]
        shape = (conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups, conv.bias is not None)
        return cls(conv.in_channels, conv.out_channels, *shape, weight_bits, activation_bits, segments, timestep)

    def dequantized_weight(self) -> Tensor:
        """(O, I, kh, kw) float32: the integers times their scale."""
        integers = unpack_conv_weight(self.weight, self.weight_bits, self.in_channels // self.groups, self.kernel_size)
        return integers.float() * self.weight_scale[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_bits is None:
            weight, bias = self.dequantized_weight().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        integers, scale = self.quantize_input(x, 1)
        return torch.ops.pqcad.conv2d(
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
            x.dtype,
            self.activation_bits,
        )

    def extra_repr(self) -> str:
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{shape}, {self._bits()}"


class QuantizedLinear(QuantizedLayer):
    """A linear layer (B, ..., K) to (B, ..., O) on packed integer weights."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        weight_bits: int,
        activation_bits: int | None,
        segments: list[int],
        timestep: Timestep,
    ) -> None:
        super().__init__(out_features, in_features, bias, weight_bits, activation_bits, segments, timestep)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(
        cls, linear: nn.Linear, weight_bits: int, activation_bits: int | None, segments: list[int], timestep: Timestep
    ) -> "QuantizedLinear":
        """The same linear layer with its weights still to be set."""
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        return cls(*shape, weight_bits, activation_bits, segments, timestep)

    def dequantized_weight(self) -> Tensor:
        """(O, K) float32: the integers times their scale."""
        return self.weight_integers().float() * self.weight_scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_bits is None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, self.dequantized_weight().to(x.dtype), bias)
        integers, scale = self.quantize_input(x, -1)
        return torch.ops.pqcad.linear(
            integers, self.weight, self.weight_scale, scale, self.bias, self.weight_bits, self.segments, x.dtype
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._bits()}"
