"""A one-dimensional convolution on packed integer weights: the convolution of an image of height one."""

from torch import Tensor, nn

from pqcad_ao.nn.conv2d import QuantizedConv2d, numeric_padding
from pqcad_ao.nn.timestep import Timestep


class QuantizedConv1d(QuantizedConv2d):
    """A convolution (B, C, L) to (B, O, L') on packed integer weights, rows in (k, in) order."""

    kind = "conv1d"

    @classmethod
    def like(
        cls, original: nn.Conv1d, weight_bits: int, activation_bits: int | None, segments: list[int], timestep: Timestep
    ) -> "QuantizedConv1d":
        """The same convolution with its weights still to be set."""
        ones, zeros = [1], [0]
        return cls(
            original.in_channels,
            original.out_channels,
            ones + list(original.kernel_size),
            ones + list(original.stride),
            zeros + numeric_padding(original),
            ones + list(original.dilation),
            original.groups,
            original.bias is not None,
            weight_bits,
            activation_bits,
            segments,
            timestep,
        )

    def forward(self, x: Tensor) -> Tensor:
        # written as reshapes: XNNPACK has them, and has no unsqueeze
        output = self.convolve(x.reshape(-1, self.in_channels, 1, x.shape[2]))
        return output.reshape(-1, self.out_channels, output.shape[3])
