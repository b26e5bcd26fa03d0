"""Turn quantized convolutions and linears into what XNNPACK multiplies in int8 and returns in float32, exactly.

XNNPACK has no int8 product with constant scales and a float32 result, and requantizing every result to 8 bits would
move values across the thresholds of the 4-bit grid that reads them. It does have one whose input scale is measured at
run time, (max - min) / 255. That is exact for values on a grid of 16 levels if both ends of the grid are among them:
level k then is the integer 17·k. So each layer's input is rounded to its grid in float32 and given two more channels,
one full of the lowest level and one of the highest, for which the weights are zero.
"""

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

import pqcad_ao.ops  # noqa: F401  (registers the operators)
from pqcad_ao.ops.reference import unpack_conv_weight
from pqcad_ao.packing import unpack
from pqcad_ao.passes.inline import buffer, finish, inline, value_of

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed
CONV, LINEAR = torch.ops.pqcad.conv2d.default, torch.ops.pqcad.linear.default
# Added to a float32 below 2^22 it leaves the nearest integer, of two the even one, in the last bits.
ROUNDER = 1.5 * 2**23


def to_xnnpack(graph: GraphModule) -> dict[str, str]:
    """Rewrite every ``quantize → pqcad.conv2d / linear`` of an exported network, in place.

    All samples of a batch are taken to share the timestep: the first one's grid serves all.

    Args:
        graph: as ``ExportedProgram.module()`` returns it, with static shapes.

    Returns:
        for each layer, by name, in which arithmetic XNNPACK runs it.

    Raises:
        NotImplementedError: the input of an operator is not quantized the way ``pqcad_ao.nn`` does it.
    """
    arithmetic = {}
    for node in list(graph.graph.nodes):
        if node.target in (CONV, LINEAR):
            fqn = str(node.args[1].target).removeprefix("unet.").rpartition(".")[0]
            arithmetic[fqn] = _rewrite(graph, node, fqn)
        elif node.target is aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
    finish(graph)
    return arithmetic


def span(bits: int) -> int:
    """Steps between the pinned ends of a ``bits``-bit grid: the smallest divisor of 255 that is at least 2^bits - 1."""
    return next(steps for steps in (1, 3, 5, 15, 17, 51, 85, 255) if steps >= 2**bits - 1)


def _rewrite(graph: GraphModule, node: Node, fqn: str) -> str:
    _, packed, weight_scale, _, bias, weight_bits, segments, *conv = node.args
    x, scales, low, bits = _quantized_input(node, fqn)
    shape = list(x.meta["val"].shape)
    channel_dim = 1 if node.target is CONV else len(shape) - 1
    if node.target is CONV:
        kernel_size, stride, padding, dilation, groups = conv[:5]
        weight = unpack_conv_weight(value_of(graph, packed), weight_bits, shape[1] // groups, kernel_size)
        product, options = functional.conv2d, (stride, padding, dilation, groups)
    else:
        weight = unpack(value_of(graph, packed), weight_bits, shape[-1])
        product, options, groups = functional.linear, (), 1
    name = fqn.replace(".", "_")
    grid = (scales, low, bits, segments, channel_dim, len(shape))
    if groups > 1:
        weight = weight * value_of(graph, weight_scale).view(-1, 1, 1, 1)
        weight = buffer(graph, node, f"{name}_weight", weight)
        inline(graph, node, _float_product, x, *grid, product, weight, bias, options)
        return f"W{weight_bits}A{bits}: float32 products (no int8 grouped convolution returns float32)"
    # [-8, 7] makes the delegate store two weights per byte, which its convolutions cannot read
    packs = node.target is LINEAR and weight_bits <= 4
    limits = (-8, 7) if packs else (-128, 127)
    weights = [
        buffer(graph, node, f"{name}_weight_{index}", _with_zeros(part))
        for index, part in enumerate(weight.split(segments, 1))
    ]
    zero_point = buffer(graph, node, f"zeros_{len(weight)}", torch.zeros(len(weight), dtype=torch.int64))
    shape[channel_dim] = 1
    ones = buffer(graph, node, "ones_" + "x".join(map(str, shape)), torch.ones(shape))
    quantized = (weights, weight_scale, zero_point, limits)
    inline(graph, node, _int8_product, x, *grid, ones, product, quantized, bias, options)
    return f"W{weight_bits}A{bits}: int8 × {'int4' if packs else 'int8'} products, float32 result, exact"


def _quantized_input(node: Node, fqn: str) -> tuple[Node, Node, Node, int]:
    """The activation before it was quantized, its grid's (B, segments) scales and lowest integers, and its bits."""
    source = node.args[0]
    if source.target is not torch.ops.pqcad.quantize.default:
        raise NotImplementedError(f"{fqn}: its input comes from {source.target}, not from pqcad.quantize")
    x, scales, low, _, bits, _ = source.args
    return x, scales, low, bits


def _with_zeros(weight: Tensor) -> Tensor:
    """(O, I, ...) with two input channels of zeros appended, for the pinned ends."""
    return torch.cat([weight, weight.new_zeros(len(weight), 2, *weight.shape[2:])], 1)


def _segments(x, scales, low, bits, segments, channel_dim, rank):
    """For each segment of the channels: its values on its grid, the grid's scale and lowest integer (1×...×1)."""
    start = 0
    for index, channels in enumerate(segments):
        scale = scales[:1, index : index + 1].view([1] * rank)
        first = low[:1, index : index + 1].view([1] * rank).to(torch.float32)
        part = x if len(segments) == 1 else aten.slice.Tensor(x, channel_dim, start, start + channels)
        offset = ROUNDER - first
        steps = functional.hardtanh(part * scale.reciprocal() + offset, ROUNDER, ROUNDER + 2**bits - 1)
        yield (steps - offset) * scale, scale, first
        start += channels


def _int8_product(x, scales, low, bits, segments, channel_dim, rank, ones, product, quantized, bias, options):
    weights, weight_scale, zero_point, limits = quantized
    total = None
    grid = _segments(x, scales, low, bits, segments, channel_dim, rank)
    for weight, (values, scale, first) in zip(weights, grid, strict=True):
        ends = torch.cat([first * scale, (first + span(bits)) * scale], channel_dim)
        values = torch.cat([values, ends * ones], channel_dim)
        choice = decomposed.choose_qparams.tensor(values, -128, 127, torch.finfo(torch.float32).tiny, torch.int8)
        measured = (choice[0], choice[1], -128, 127, torch.int8)
        values = decomposed.quantize_per_tensor.tensor(values, *measured)
        values = decomposed.dequantize_per_tensor.tensor(values, *measured)
        weight = decomposed.dequantize_per_channel.default(weight, weight_scale, zero_point, 0, *limits, torch.int8)
        part = product(values, weight, bias if total is None else None, *options)
        total = part if total is None else total + part
    return total


def _float_product(x, scales, low, bits, segments, channel_dim, rank, product, weight, bias, options):
    ((values, _, _),) = _segments(x, scales, low, bits, segments, channel_dim, rank)
    return product(values, weight, bias, *options)
