"""A linear layer on packed integer weights."""

import torch
from torch import Tensor, nn

from pqcad_ao.nn.layers import QuantizedLayer, records_gradient
from pqcad_ao.nn.timestep import Timestep
from pqcad_ao.ops import reference


class QuantizedLinear(QuantizedLayer):
    """A linear layer (B, ..., K) to (B, ..., O) on packed integer weights."""

    kind = "linear"

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
        cls, original: nn.Linear, weight_bits: int, activation_bits: int | None, segments: list[int], timestep: Timestep
    ) -> "QuantizedLinear":
        """The same linear layer with its weights still to be set."""
        shape = (original.in_features, original.out_features, original.bias is not None)
        return cls(*shape, weight_bits, activation_bits, segments, timestep)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_bits is None:
            # a timestep's embedding: of a text's many rows a product with the weights in memory is faster
            few = x.dim() == 2 and not records_gradient(x) and not torch.compiler._is_exporting_flag
            return torch.ops.pqcad.weight_only_linear(x, *self._stored()) if few else self.in_float(x)
        integers, scale = self.quantize_input(x, -1)
        output = torch.ops.pqcad.linear(
            integers, self.weight, self.weight_scale, scale, self.bias, self.weight_bits, self.segments, x.dtype
        )
        return self.with_gradient(output, x, scale, -1)

    def in_float(self, x: Tensor) -> Tensor:
        return reference.weight_only_linear(x, *self._stored())

    def _stored(self) -> tuple[Tensor, Tensor, Tensor | None, int]:
        return self.weight, self.weight_scale, self.bias, self.weight_bits

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._bits()}"
