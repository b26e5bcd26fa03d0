"""Turn quantized convolutions and linears into what XNNPACK multiplies in int8 and returns in float32, exactly.

XNNPACK has no int8 product with constant scales and a float32 result, and requantizing every result to 8 bits would
move values across the thresholds of the 4-bit grid that reads them. It does have one whose input scale is measured at
run time, (max - min) / 255. So each layer's input is clamped to the ends of its grid, and given two more channels for
which the weights are zero, one full of -128 steps of the grid and one of 127: what is measured then is the grid's own
step, and XNNPACK rounds to it as ``pqcad::quantize`` does.

Linears read weights of two a byte; convolutions do where they are written as linears (:mod:`.shifted_conv`).
"""

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

import pqcad_ao.ops  # noqa: F401  (registers the operators)
from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import layer_fqn, packed_operator, packed_weight
from pqcad_ao.ops.packing import unpack
from pqcad_ao.passes.inline import buffer, finish, inline, value_of
from pqcad_ao.passes.shifted_conv import ShiftedConv, to_image, to_tokens

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed
# What a convolution has beside its operands, in the order in which torch's functions take it; a linear has none of it.
GEOMETRY = ("stride", "padding", "dilation", "groups")
# Added to a float32 below 2^22 it leaves the nearest integer, of two the even one, in the last bits.
ROUNDER = 1.5 * 2**23
LAYER = "pqcad_layer"  # meta of the node that holds a layer's result


def to_xnnpack(graph: GraphModule, packed: Collection[str] = ()) -> dict[str, str]:
    """Rewrite every ``quantize → pqcad.conv2d / linear`` of an exported network, in place.

    All samples of a batch are taken to share the timestep: the first one's grid serves all.

    Args:
        graph: as ``ExportedProgram.module()`` returns it, with static shapes.
        packed: the convolutions, by name, whose weights are to be stored two a byte; see :func:`can_pack`. Linears of
            at most four bits always are.

    Returns:
        for each layer, by name, in which arithmetic XNNPACK runs it.

    Raises:
        NotImplementedError: the input of an operator is not quantized the way ``pqcad_ao.nn`` does it.
        ValueError: a layer of ``packed`` has no such form.
    """
    arithmetic, missing = {}, set(packed)
    for node in list(graph.graph.nodes):
        if packed_operator(node) is not None:
            fqn = layer_fqn(node) or ""
            missing.discard(fqn)
            if fqn in packed and not can_pack(node):
                raise ValueError(f"{fqn} has no form with weights of two a byte: it is grouped, or wider than 4 bits")
            node.meta[LAYER] = fqn  # the node that takes its place gets its meta
            arithmetic[fqn] = _rewrite(graph, node, fqn, fqn in packed)
        elif node.target is aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
    if missing:
        raise ValueError(f"the network has no quantized layers {', '.join(sorted(missing))}")
    finish(graph)
    return arithmetic


def can_pack(node: Node) -> bool:
    """Whether XNNPACK can multiply this layer's weights stored two a byte."""
    arguments = bind(node)
    return arguments["weight_bits"] <= 4 and arguments.get("groups", 1) == 1


def _rewrite(graph: GraphModule, node: Node, fqn: str, pack: bool) -> str:
    """Write one layer in XNNPACK's operators, in place; the arithmetic it runs in then."""
    arguments, operator, name = bind(node), packed_operator(node), fqn.replace(".", "_")
    x, scales, low, bits = _quantized_input(arguments["input"], fqn)
    shape = list(x.meta["val"].shape)
    channel_dim = operator.channel_dim % len(shape)
    grid = (scales, low, bits, arguments["segments"], channel_dim, len(shape))
    geometry = [arguments[name] for name in GEOMETRY if name in arguments]
    weight = _integers(graph, arguments, shape[channel_dim])
    product, bias, weight_bits = operator.functionals[0], arguments["bias"], arguments["weight_bits"]
    if arguments.get("groups", 1) > 1:
        weight = weight * value_of(graph, arguments["weight_scale"]).view(-1, *[1] * (weight.dim() - 1))
        weight = buffer(graph, node, f"{name}_weight", weight)
        inline(graph, node, _float_product, x, *grid, product, weight, bias, geometry)
        return f"W{weight_bits}A{bits}: float32 products (no int8 grouped convolution returns float32)"
    if pack and geometry:
        _write_shifted(graph, node, name, x, grid, weight, arguments)
    else:
        pack = not geometry and weight_bits <= 4  # the product is a linear: it reads two weights a byte
        parts = list(weight.split(arguments["segments"], 1))
        quantized = _int8_weights(graph, node, name, parts, arguments["weight_scale"], pack)
        ones = _ones(graph, node, shape, channel_dim)
        inline(graph, node, _int8_product, x, *grid, ones, product, quantized, bias, geometry)
    return f"W{weight_bits}A{bits}: int8 × {'int4' if pack else 'int8'} products, float32 result, exact"


def _write_shifted(
    graph: GraphModule, node: Node, name: str, x: Node, grid: tuple[Any, ...], weight: Tensor, arguments: dict[str, Any]
) -> None:
    """Write a convolution as linears with weights of two a byte, in place."""
    shape, segments = list(x.meta["val"].shape), arguments["segments"]
    sizes = (arguments[name] for name in ("kernel_size", "stride", "padding", "dilation"))
    shifted = ShiftedConv(*map(tuple, (*sizes, shape[2:])))
    parts = [shifted.weights(part) for part in weight.split(segments, 1)]
    columns = [
        _int8_weights(graph, node, f"{name}_{column}", list(of_column), arguments["weight_scale"], True)
        for column, of_column in enumerate(zip(*parts, strict=True))
    ]
    ones = _ones(graph, node, [*shape[:2], *shifted.places], 1)
    late, bias = None, arguments["bias"]
    if bias is not None and shifted.unshifted() is None:
        late, bias = buffer(graph, node, f"{name}_bias", value_of(graph, bias).detach().view(1, -1, 1, 1)), None
    inline(graph, node, _shifted_product, x, *grid, ones, shifted, columns, bias, late, len(weight))


def _integers(graph: GraphModule, arguments: dict[str, Any], channels: int) -> Tensor:
    """A packed operator's weight as int8, (O, I / groups, *kernel)."""
    kernel_size = arguments.get("kernel_size", [])
    reduction = math.prod(kernel_size) * channels // arguments.get("groups", 1)
    rows = unpack(value_of(graph, arguments["weight"]), arguments["weight_bits"], reduction)
    return packed_weight(rows, kernel_size)


def _int8_weights(
    graph: GraphModule, node: Node, name: str, parts: list[Tensor], weight_scale: Node, pack: bool
) -> tuple[Any, ...]:
    """For each segment its weights with room for the pinned ends, and what turns them into numbers."""
    # [-8, 7] makes the delegate store two weights per byte, which its convolutions cannot read
    limits = (-8, 7) if pack else (-128, 127)
    # a row of packed weights must have an even length, of which the pinned ends are two
    ends = [2 + (pack and part.shape[1] % 2) for part in parts]
    weights = [
        buffer(graph, node, f"{name}_weight_{index}", _with_zeros(part, count))
        for index, (part, count) in enumerate(zip(parts, ends, strict=True))
    ]
    zero_point = buffer(graph, node, f"zeros_{len(parts[0])}", torch.zeros(len(parts[0]), dtype=torch.int64))
    return weights, weight_scale, zero_point, limits, ends


def _ones(graph: GraphModule, node: Node, shape: list[int], channel_dim: int) -> Node:
    """One channel of ones, of an activation of ``shape``."""
    shape = [1 if dim == channel_dim else size for dim, size in enumerate(shape)]
    return buffer(graph, node, "ones_" + "x".join(map(str, shape)), torch.ones(shape))


def _quantized_input(source: Node, fqn: str) -> tuple[Node, Node, Node, int]:
    """The activation before it was quantized, its grid's (B, segments) scales and lowest integers, and its bits."""
    if source.target is not torch.ops.pqcad.quantize.default:
        raise NotImplementedError(f"{fqn}: its input comes from {source.target}, not from pqcad.quantize")
    arguments = bind(source)
    return arguments["input"], arguments["scale"], arguments["low"], arguments["bits"]


def _with_zeros(weight: Tensor, count: int) -> Tensor:
    """(O, I, ...) with input channels of zeros appended, for the pinned ends."""
    return torch.cat([weight, weight.new_zeros(len(weight), count, *weight.shape[2:])], 1)


def _segments(x, scales, low, bits, segments, channel_dim, rank):
    """For each segment of the channels: its values clamped to its grid, and that grid's scale (1×...×1)."""
    start = 0
    for index, channels in enumerate(segments):
        scale = scales[:1, index : index + 1].view([1] * rank)
        first = low[:1, index : index + 1].view([1] * rank).to(torch.float32)
        part = x if len(segments) == 1 else aten.slice.Tensor(x, channel_dim, start, start + channels)
        yield torch.minimum(torch.maximum(part, first * scale), (first + (2**bits - 1)) * scale), scale
        start += channels


def _with_ends(parts, ones, scale, channel_dim, count):
    """``parts`` beside each other, with ``count`` further channels between whose ends 255 steps of a grid lie."""
    lowest = -128 * scale
    # of float32: no rounding but that of 255 · scale, so that what is measured is the scale again
    ends = [lowest, 255 * scale + lowest]
    ends = torch.cat([*ends, *ends[: count - 2]], channel_dim)
    return torch.cat([*parts, ends * ones], channel_dim)


def _measured(values):
    """``values`` rounded on the grid that XNNPACK measures."""
    choice = decomposed.choose_qparams.tensor(values, -128, 127, torch.finfo(torch.float32).tiny, torch.int8)
    measured = (choice[0], choice[1], -128, 127, torch.int8)
    values = decomposed.quantize_per_tensor.tensor(values, *measured)
    return decomposed.dequantize_per_tensor.tensor(values, *measured)


def _dequantized(weight, weight_scale, zero_point, limits):
    return decomposed.dequantize_per_channel.default(weight, weight_scale, zero_point, 0, *limits, torch.int8)


def _int8_product(x, scales, low, bits, segments, channel_dim, rank, ones, product, quantized, bias, options):
    weights, weight_scale, zero_point, limits, ends = quantized
    total = None
    grid = _segments(x, scales, low, bits, segments, channel_dim, rank)
    for weight, count, (values, scale) in zip(weights, ends, grid, strict=True):
        values = _measured(_with_ends([values], ones, scale, channel_dim, count))
        weight = _dequantized(weight, weight_scale, zero_point, limits)
        part = product(values, weight, bias if total is None else None, *options)
        total = part if total is None else total + part
    return total


def _shifted_product(x, scales, low, bits, segments, channel_dim, rank, ones, shifted, columns, bias, late, outputs):
    """One linear for each column of the kernel, all of which read the same values; the bias is the unshifted one's."""
    totals = [None] * len(columns)
    grid = _segments(x, scales, low, bits, segments, channel_dim, rank)
    for index, (values, scale) in enumerate(grid):
        count, channels = columns[0][-1][index], segments[index]
        values = _with_ends(shifted.gather(values, channels), ones, scale, channel_dim, count)
        tokens = _measured(to_tokens(values, shifted.inputs(channels) + count, shifted.places))
        for column, (weights, weight_scale, zero_point, limits, _) in enumerate(columns):
            weight = _dequantized(weights[index], weight_scale, zero_point, limits)
            own = bias if column == shifted.unshifted() and index == 0 else None
            part, total = functional.linear(tokens, weight, own), totals[column]
            totals[column] = part if total is None else total + part
    result = shifted.scatter([to_image(total, outputs, shifted.places) for total in totals])
    return result if late is None else result + late


def _float_product(x, scales, low, bits, segments, channel_dim, rank, product, weight, bias, options):
    ((values, scale),) = _segments(x, scales, low, bits, segments, channel_dim, rank)
    return product(_rounded(values, scale), weight, bias, *options)


def _rounded(values, scale):
    """The nearest multiples of a grid's scale."""
    return (values * scale.reciprocal() + ROUNDER - ROUNDER) * scale
