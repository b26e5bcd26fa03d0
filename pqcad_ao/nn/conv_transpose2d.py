"""A transposed convolution on packed integer weights: the convolution of its input with zeros between the places."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pqcad_ao.nn.conv2d import QuantizedConv2d, numeric_padding
from pqcad_ao.nn.timestep import Timestep


class QuantizedConvTranspose2d(QuantizedConv2d):
    """A transposed convolution (B, C, H, W) to (B, O, H', W') on packed integer weights.

    It is the convolution, by one, of the spread input with the kernel turned round (Dumoulin & Visin 2016, "A guide to
    convolution arithmetic", relationship 14). Zeros are on every grid, so that sums stay exact integers; of the
    products, one in ``stride[0] * stride[1]`` is of a value and the others are of zeros.

    Attributes:
        spacing: the transposed convolution's stride, by which its input is spread.
        border: zeros around the spread input, (left, right, top, bottom) as ``torch.nn.functional.pad`` takes them;
            fewer than none take places away.
    """

    kind = "conv_transpose2d"

    def __init__(self, *arguments: Any, spacing: list[int], border: list[int]) -> None:
        super().__init__(*arguments)  # of the convolution by one
        self.spacing, self.border = tuple(spacing), tuple(border)

    @classmethod
    def like(
        cls,
        original: nn.ConvTranspose2d,
        weight_bits: int,
        activation_bits: int | None,
        segments: list[int],
        timestep: Timestep,
    ) -> "QuantizedConvTranspose2d":
        """The same transposed convolution with its weights still to be set."""
        padding, border = numeric_padding(original), []
        for dim in (1, 0):  # the last dimension first, as functional.pad wants it
            before = original.dilation[dim] * (original.kernel_size[dim] - 1) - padding[dim]
            border += [before, before + original.output_padding[dim] - (original.stride[dim] - 1)]
        return cls(
            original.in_channels,
            original.out_channels,
            original.kernel_size,
            [1, 1],
            [0, 0],
            original.dilation,
            original.groups,
            original.bias is not None,
            weight_bits,
            activation_bits,
            segments,
            timestep,
            spacing=list(original.stride),
            border=border,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(functional.pad(self.spread(x), self.border))

    def spread(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H * stride[0], W * stride[1]), zeros behind every place."""
        down, across = self.spacing
        if down == across == 1:
            return x
        height, width = x.shape[2:]
        # written as reshapes: XNNPACK has them, and has neither unsqueeze nor strided assignment
        places = functional.pad(x.reshape(-1, x.shape[1], height, 1, width, 1), (0, across - 1, 0, 0, 0, down - 1))
        return places.reshape(-1, x.shape[1], height * down, width * across)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, spacing={self.spacing}"
