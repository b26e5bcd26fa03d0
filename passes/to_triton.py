"""Write the quantized layers of a graph on a GPU as their Triton kernels, so that Inductor sees into them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from pqcad_ao.graph.arguments import bind
from pqcad_ao.ops.dispatch import gpu_kernels
from pqcad_ao.passes.inline import finish, inline, traced

pqcad = torch.ops.pqcad
CONV = {pqcad.conv2d, pqcad.conv2d.default}
LINEAR = {pqcad.linear, pqcad.linear.default}
QUANTIZE = {pqcad.norm_silu_quantize, pqcad.norm_silu_quantize.default}


def to_triton(graph: GraphModule, choose: Callable[[list[Sequence[Any]]], list[str]] | None = None) -> int:
    """Replace ``pqcad::`` operators, in place.

    Args:
        choose: which form each call of ``kernels.conv2d`` with these arguments takes, as ``ops.triton.forms.choose``
            does; tensors are what the graph was traced with. None: the default one.

    Returns:
        how many convolutions and linears are Triton kernels now; 0 where Triton is missing.
    """
    kernels = gpu_kernels()
    if kernels is None:
        return 0
    from pqcad_ao.ops.triton import norm, tma

    layers: list[Node] = []
    for node in list(graph.graph.nodes):
        if node.target in QUANTIZE:
            given = bind(node)
            values = [traced(x) for x in given["inputs"]]  # of one alone, from a pass, any type will do
            types = [None if value is None else value.dtype for value in values]
            if norm.fits(types, given["segments"], given["norm_groups"]):
                _replace(graph, node, pqcad.triton_norm_silu_quantize.default, tuple(given.values()))
        elif node.target in CONV | LINEAR:
            layers.append(node)
    measured = [node for node in layers if choose and _is_image(node)]
    chosen = dict(zip(measured, choose([_call(node) for node in measured]) if choose else (), strict=True))
    for node in layers:
        form = chosen.get(node, kernels.DEFAULT)
        arguments, copied = (*bind(node).values(), form), form in tma.BLOCKS  # the kernels take them in the same order
        if node.target in CONV:
            target = pqcad.tma_conv2d.default if copied else pqcad.triton_conv2d.default
            _replace(graph, node, target, arguments)
        elif copied:
            inline(graph, node, _tma_linear, *arguments)
        else:
            _replace(graph, node, pqcad.triton_linear.default, arguments)
    finish(graph)
    return len(layers)


def _is_image(node: Node) -> bool:
    """Whether a layer is a convolution, or a linear on (B, L, C), which is an image of L pixels."""
    return node.target in CONV or traced(node).dim() == 3


def _call(node: Node) -> tuple[Any, ...]:
    """What a layer's arguments stood for, as those of a convolution."""
    values = map_arg(tuple(bind(node).values()), traced)
    return values if node.target in CONV else as_convolution(values)


def _tma_linear(*arguments: Any) -> Any:
    """A linear layer in a form that takes images alone."""
    *layer, form = arguments
    image = pqcad.tma_conv2d.default(*as_convolution(layer), form)
    return image.squeeze(-1).transpose(1, 2)


def as_convolution(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of ``pqcad::linear`` on (B, L, C) as those of ``pqcad::conv2d``: an image whose pixels are rows."""
    input, *weights, bits, segments, dtype, addend = arguments
    ones, zeros = [1, 1], [0, 0]
    geometry = (ones, ones, zeros, ones, 1, dtype, 8)
    return (_image(input), *weights, bits, segments, *geometry, None if addend is None else _image(addend))


def _image(tokens: Any) -> Any:
    """(B, L, C) as (B, C, L, 1)."""
    return tokens.transpose(1, 2).unsqueeze(-1)


def _replace(graph: GraphModule, node: Node, target: Any, arguments: tuple[Any, ...]) -> None:
    with graph.graph.inserting_before(node):
        replacement = graph.graph.call_function(target, arguments)
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
    graph.graph.erase_node(node)
