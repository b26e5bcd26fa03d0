"""The table of operators: one row for each kind of layer that multiplies its input by a weight.

Plan, annotation, folding, serialization, passes and backends read this table; none of them asks which kind a layer is.
To add an operator is to write

1. ``pqcad_ao/graph/operators.py``: its row in :data:`OPERATORS`, and a :class:`WeightLayout` if its module keeps the
   weight another way than the rows here;
2. ``pqcad_ao/nn/<kind>.py``: its quantized module, a :class:`~pqcad_ao.nn.layers.QuantizedLayer` that says in which
   arguments of which ``pqcad::`` operator the layer is written;
3. ``tests/test_operators.py``: a case in ``LAYERS``, which sends it through everything above.

Nothing else changes where an existing ``pqcad::`` operator can compute the layer, as ``pqcad::conv2d`` does for all
convolutions here. A new one takes, besides, its schema and shape rule in ``pqcad_ao/ops/dispatch.py``, its exact kernel
in ``pqcad_ao/ops/reference.py``, an ``opcheck`` in ``tests/test_ops.py``, and kernels in ``pqcad_ao/ops/cpu`` and
``pqcad_ao/ops/triton`` where it should be fast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node
from torch.nn import functional

from pqcad_ao.graph.arguments import bind

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightLayout:
    """How a module keeps its weight, beside how the ``pqcad::`` operator that computes it does.

    Attributes:
        to_packed: ``(weight, groups)`` to the weight of the packed operator, (O, I / groups, *kernel).
        from_packed: back again, ``(packed operator's weight, groups)``.
    """

    to_packed: Callable[[Tensor, int], Tensor]
    from_packed: Callable[[Tensor, int], Tensor]

    def rows(self, weight: Tensor, groups: int) -> Tensor:
        """A module's weight as (O, K) rows in the order in which they are packed: (*kernel, in)."""
        return self.to_packed(weight, groups).movedim(1, -1).flatten(1)

    def weight(self, rows: Tensor, kernel_size: list[int], groups: int) -> Tensor:
        """Invert :meth:`rows`; ``kernel_size`` is the packed operator's, empty for one without a kernel."""
        return self.from_packed(packed_weight(rows, kernel_size), groups)


def packed_weight(rows: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """(O, K) rows in the order in which they are packed to the packed operator's weight, (O, I / groups, *kernel)."""
    return rows.unflatten(1, (*kernel_size, -1)).movedim(-1, 1)


def _turned(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight (I, O / groups, *kernel) to that of the convolution (O, I / groups, *kernel).

    The same turns it back: inputs and outputs change places within each group, and the kernel is turned round.
    """
    turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return turned.flip(tuple(range(2, weight.dim())))


def _same(weight: Tensor, groups: int) -> Tensor:
    return weight


def _of_height_one(weight: Tensor, groups: int) -> Tensor:
    """(O, I / groups, k) to (O, I / groups, 1, k)."""
    return weight.unsqueeze(2)


def _without_height(weight: Tensor, groups: int) -> Tensor:
    """(O, I / groups, 1, k) to (O, I / groups, k)."""
    return weight.squeeze(2)


OUTPUT_FIRST = WeightLayout(_same, _same)
HEIGHT_ONE = WeightLayout(_of_height_one, _without_height)
INPUT_FIRST = WeightLayout(_turned, _turned)


@dataclass(frozen=True)
class Operator:
    """What there is to know of one kind of layer.

    Attributes:
        kind: its name, in plans and checkpoints. module: its class.
        targets: how torch.export writes it. functionals: how torch.compile does.
        spatial: dimensions that its kernel covers; 0 where it has none.
        channels: attribute of the module with the number of its input's channels. channel_dim: where they lie.
        layout: of its weight.
        packed: the ``pqcad::`` operator that computes it quantized; None where there is no quantized form.
        quantized: the quantized module's class, by its full name; the room of modules is behind this one.
    """

    kind: str
    module: type[nn.Module]
    targets: tuple[OpOverload, ...]
    functionals: tuple[Callable[..., Any], ...]
    spatial: int
    channels: str = "in_channels"
    channel_dim: int = 1
    layout: WeightLayout = OUTPUT_FIRST
    packed: str | None = None
    quantized: str | None = None


_ROWS = [
    Operator(
        kind="linear",
        module=nn.Linear,
        targets=(aten.linear.default,),
        functionals=(functional.linear,),
        spatial=0,
        channels="in_features",
        channel_dim=-1,
        packed="pqcad::linear",
        quantized="pqcad_ao.nn.linear.QuantizedLinear",
    ),
    Operator(
        kind="conv2d",
        module=nn.Conv2d,
        targets=(aten.conv2d.default, aten.conv2d.padding),
        functionals=(torch.conv2d,),
        spatial=2,
        packed="pqcad::conv2d",
        quantized="pqcad_ao.nn.conv2d.QuantizedConv2d",
    ),
    Operator(
        kind="conv1d",
        module=nn.Conv1d,
        targets=(aten.conv1d.default, aten.conv1d.padding),
        functionals=(torch.conv1d,),
        spatial=1,
        layout=HEIGHT_ONE,
        packed="pqcad::conv2d",
        quantized="pqcad_ao.nn.conv1d.QuantizedConv1d",
    ),
    Operator(
        kind="conv_transpose2d",
        module=nn.ConvTranspose2d,
        targets=(aten.conv_transpose2d.input,),
        functionals=(torch.conv_transpose2d,),
        spatial=2,
        layout=INPUT_FIRST,
        packed="pqcad::conv2d",
        quantized="pqcad_ao.nn.conv_transpose2d.QuantizedConvTranspose2d",
    ),
    # Without a quantized form; they are in the table so that the plan can name them.
    Operator("conv3d", nn.Conv3d, (aten.conv3d.default, aten.conv3d.padding), (torch.conv3d,), spatial=3),
    Operator(
        "conv_transpose1d", nn.ConvTranspose1d, (aten.conv_transpose1d.default,), (torch.conv_transpose1d,), spatial=1
    ),
    Operator(
        "conv_transpose3d", nn.ConvTranspose3d, (aten.conv_transpose3d.input,), (torch.conv_transpose3d,), spatial=3
    ),
]

OPERATORS = {row.kind: row for row in _ROWS}
_BY_TARGET = {target: row for row in _ROWS for target in row.targets}
_BY_PACKED = {row.packed: row for row in _ROWS if row.packed == f"pqcad::{row.kind}"}

# Products of two activations: they have no weight, and no row.
BATCHED_PRODUCTS = (
    aten.scaled_dot_product_attention.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
)


def operator_of(node: Node) -> Operator | None:
    """The row of a layer as torch.export wrote it; None for what is no layer of the table."""
    return _BY_TARGET.get(node.target) if isinstance(node.target, OpOverload) else None


def quantizable(node: Node) -> Operator | None:
    """The row of a layer that has a quantized form, or None."""
    row = operator_of(node)
    return row if row is not None and row.quantized is not None else None


def packed_operator(node: Node) -> Operator | None:
    """The row of the layer that a ``pqcad::`` operator is named after; None for what is no such operator."""
    packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    return _BY_PACKED.get(packet._qualified_op_name) if isinstance(packet, OpOverloadPacket) else None


def weight_fqn(node: Node) -> str | None:
    """The parameter behind a layer's weight, by its name in the network; None if it is computed.

    A weight's fake quantizer does not hide it.
    """
    weight = bind(node)["weight"]
    if isinstance(weight, Node) and weight.op == "call_module":
        (weight,) = weight.args
    if isinstance(weight, Node) and weight.op == "get_attr":
        return str(weight.target).removeprefix("unet.")
    return None


def layer_fqn(node: Node) -> str | None:
    """The module that holds a layer's weight, by its name in the network; None if it is computed."""
    parameter = weight_fqn(node)
    return None if parameter is None else parameter.rpartition(".")[0]


def call_site(node: Node) -> str:
    """The module in whose forward a node is computed, by its name in the network."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0].partition("@")[0] if stack else "unet"  # a module's second call is recorded as name@1
    return "" if path == "unet" else path.removeprefix("unet.")
