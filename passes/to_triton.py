"""Write the quantized layers of a graph on a GPU as their Triton kernels, so that Inductor sees into them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from pqcad_ao.ops.dispatch import gpu_kernels
from pqcad_ao.passes.inline import argument, finish, traced

pqcad = torch.ops.pqcad
CONV = {pqcad.conv2d, pqcad.conv2d.default}
LINEAR = {pqcad.linear, pqcad.linear.default}


def to_triton(graph: GraphModule, form: Callable[[Sequence[Any]], str] | None = None) -> int:
    """Replace ``pqcad::`` operators, in place.

    Args:
        form: which form a convolution with these arguments takes, of ``pqcad_ao.ops.triton.kernels.FORMS``; tensors are
            what the graph was traced with. None: the direct one.

    Returns:
        how many convolutions and linears are Triton kernels now; 0 where Triton is missing.
    """
    if gpu_kernels() is None:
        return 0
    found = 0
    for node in list(graph.graph.nodes):
        if node.target in CONV:
            # torch.export leaves out what has its default value
            values = (argument(node, 13, "input_bits", 8), argument(node, 14, "addend", None))
            arguments = (*node.args[:13], *values)
            chosen = form(map_arg(arguments, traced)) if form else "direct"
            _replace(graph, node, pqcad.triton_conv2d.default, (*arguments, chosen))
        elif node.target in LINEAR:
            arguments = (*node.args[:8], argument(node, 8, "addend", None))
            _replace(graph, node, pqcad.triton_linear.default, arguments)
        else:
            continue
        found += 1
    finish(graph)
    return found


def _replace(graph: GraphModule, node: Node, target: Any, arguments: tuple[Any, ...]) -> None:
    with graph.graph.inserting_before(node):
        replacement = graph.graph.call_function(target, arguments)
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
    graph.graph.erase_node(node)
