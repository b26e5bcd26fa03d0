"""What the layers of a quantized network share: packed integer weights, and a grid for their input."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

import pqcad_ao.ops  # noqa: F401  (registers the operators)
from pqcad_ao.graph.operators import OPERATORS, Operator, packed_weight
from pqcad_ao.nn.timestep import Timestep
from pqcad_ao.ops.packing import pack, packed_size, unpack
from pqcad_ao.ops.reference import per_channel
from pqcad_ao.utils.checks import NOT_FINITE


class QuantizedLayer(nn.Module):
    """State shared by the quantized forms of the table's layers, of which each has a class of its own.

    Such a class makes itself from the module of its row, with the weights still to be set: a class method
    ``like(original, weight_bits, activation_bits, segments, timestep)``.

    Attributes:
        fqn: its name in its network. kind: the layer's row in ``graph.operators.OPERATORS``.
        kernel_size, groups: of the packed operator's weight. Numbers stand in tuples: of one Dynamo guards the whole at
            every call of a compiled network, of a list each number by itself.

    Buffers (scales and bias stay float32 whatever the network's type, so that bfloat16 does not move the grid):
        weight: (O, ceil(K·bits/8)) uint8, packed along the reduction dimension.
        weight_scale: (O,). bias: (O,) or None.
        input_scale: (groups, segments) and input_low: (groups, segments) int16; absent where activations are float.
    """

    kind: str
    fqn = "?"  # until it stands in a network
    kernel_size: tuple[int, ...] = ()
    groups = 1
    float32_buffers = ("weight_scale", "bias", "input_scale")
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_low: Tensor

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
        self.weight_bits, self.activation_bits, self.segments = weight_bits, activation_bits, tuple(segments)
        self.reduction, self.timestep = reduction, timestep
        self.register_buffer(
            "weight", torch.zeros(out_features, packed_size(reduction, weight_bits), dtype=torch.uint8)
        )
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)
        if activation_bits is not None:
            shape = (timestep.groups, len(segments))
            self.register_buffer("input_scale", torch.ones(shape, dtype=torch.float32))
            self.register_buffer("input_low", torch.zeros(shape, dtype=torch.int16))

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name, None) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if value is not None and self._buffers[name].dtype != torch.float32:
                self._buffers[name] = value.to(self._buffers[name].device)
        return self

    def check_buffer(self, name: str, value: Tensor) -> None:
        """Look whether ``value`` can be the buffer ``name``, by type, shape and every number in it.

        Raises:
            ValueError: it cannot; says what it is and what was expected.
        """
        own = self._buffers[name]
        if own is None or value.dtype != own.dtype:
            raise ValueError(f"is {value.dtype}, expected {'nothing' if own is None else own.dtype}")
        if value.shape != own.shape:
            raise ValueError(f"has shape {tuple(value.shape)}, the plan says {tuple(own.shape)}")
        if name in ("weight_scale", "input_scale"):
            sound, expected = (value > 0) & value.isfinite() & value.reciprocal().isfinite(), "positive, finite numbers"
        elif name == "input_low":
            least, most = low_range(self.activation_bits or 0)
            sound, expected = (value >= least) & (value <= most), f"whole numbers from {least} to {most}"
        elif name == "weight":
            used, value = self.reduction * self.weight_bits % 8 or 8, value[:, -1]
            sound, expected = value <= 2**used - 1, f"last bytes of a row with nothing behind their {used} bits"
        else:
            sound, expected = value.isfinite(), "finite numbers"
        if not sound.all():
            raise ValueError(f"holds {value[~sound].flatten()[0].item():g}, expected are {expected}")

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
        try:
            return torch.ops.pqcad.quantize(x, *grid), scale
        except ValueError as error:
            if NOT_FINITE not in str(error):
                raise
            hint = ": float16 ends at 65504, take float32 or bfloat16" if x.dtype == torch.float16 else ""
            raise FloatingPointError(f"NaN or infinity at the input of layer {self.fqn}{hint}") from error

    def in_float(self, x: Tensor) -> Tensor:
        """The layer in floating point, on the weights that its integers stand for."""
        raise NotImplementedError

    def with_gradient(self, output: Tensor, x: Tensor, scale: Tensor, channel_dim: int) -> Tensor:
        """The integer operator's ``output``, to the bit, with the gradient that x has in floating point.

        The straight-through estimator (Bengio et al. 2013), which learning uses, too: rounding passes gradients on,
        and what lies outside of the grid gets none. Guidance by a gradient and adapters need it.

        Args:
            x: what was quantized. scale: (B, segments), of its grid.
        """
        if not records_gradient(x):
            return output
        low = self.input_low[self.timestep.current(x.shape[0])]
        ends = (low * scale, (low + 2 ** (self.activation_bits or 0) - 1) * scale)
        shape = [1] * x.dim()
        shape[0], shape[channel_dim] = x.shape[0], sum(self.segments)
        least, most = (per_channel(end, self.segments).view(shape).to(x.dtype) for end in ends)
        smooth = self.in_float(x.clamp(least, most))
        return output + (smooth - smooth.detach())

    def weight_integers(self) -> Tensor:
        """(O, K) int8, in the order in which they are packed."""
        return unpack(self.weight, self.weight_bits, self.reduction)

    def packed_weight(self) -> Tensor:
        """(O, I / groups, *kernel) float32, as the packed operator has it: the integers times their scale."""
        return packed_weight(self.weight_integers().float() * self.weight_scale[:, None], self.kernel_size)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight of the module that was quantized, in that module's layout."""
        return OPERATORS[self.kind].layout.from_packed(self.packed_weight(), self.groups)

    def _bits(self) -> str:
        activation = f"A{self.activation_bits}" if self.activation_bits else "A float"
        split = f", split={list(self.segments)}" if len(self.segments) > 1 else ""
        return f"W{self.weight_bits}{activation[0]}{activation[1:]}{split}"


def records_gradient(x: Tensor) -> bool:
    """Whether what is computed of x is to have a gradient."""
    # an exported program is for inference: there a network's norms, which require gradients, do not count.
    # What torch.compiler.is_exporting() returns; of that Dynamo of torch 2.11 says True in torch.compile as well
    exporting = torch.compiler._is_exporting_flag
    return not exporting and torch.is_grad_enabled() and x.requires_grad


def check_saved(name: str, value: Tensor, owner: nn.Module) -> None:
    """Look whether a tensor that was read can be what the module ``owner`` holds under the last part of ``name``.

    Raises:
        ValueError: it is of another type, or holds numbers that it cannot; of a quantized layer also its shape.
    """
    attribute = name.rpartition(".")[2]
    try:
        if isinstance(owner, QuantizedLayer):
            owner.check_buffer(attribute, value)
            return
        own = getattr(owner, attribute)
        # networks are cast, and what is saved in bfloat16 loads in float32
        if value.dtype != own.dtype and not (value.is_floating_point() and own.is_floating_point()):
            raise ValueError(f"is {value.dtype}, expected {own.dtype}")
        # as quantize_ has it: a buffer may be a mask that ends in infinity
        if value.isnan().any() or (isinstance(own, nn.Parameter) and not value.isfinite().all()):
            raise ValueError("holds NaN or infinity")
    except ValueError as error:
        raise ValueError(f"the checkpoint is damaged: {name} {error}") from error


def low_range(bits: int) -> tuple[int, int]:
    """Where a grid of ``bits`` bits may begin: it has a zero, and all of its integers are int8."""
    return (-128, -128) if bits == 8 else (1 - 2**bits, 0)


def quantized_class(operator: Operator) -> type[Any]:
    """The quantized module's class of a row of the table."""
    module, _, name = (operator.quantized or "").rpartition(".")
    return getattr(import_module(module), name)
