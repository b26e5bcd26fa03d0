"""Write what cuts a tensor or gives it another shape as slices and views, which XNNPACK has."""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from pqcad_ao.graph.arguments import bind
from pqcad_ao.passes.inline import finish

aten = torch.ops.aten
SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


def decompose_pieces(graph: GraphModule) -> GraphModule:
    """Replace chunks and splits by a slice for each piece, and new dimensions of one by views, in place.

    Returns:
        the same GraphModule.
    """
    for node in list(graph.graph.nodes):
        if node.target in SPLITS:
            _slice(graph, node)
        elif node.target is aten.unsqueeze.default:
            node.target = aten.view.default
            node.args, node.kwargs = (bind(node)["input"], list(node.meta["val"].shape)), {}
    return finish(graph)


def _slice(graph: GraphModule, node: Node) -> None:
    arguments = bind(node)
    x, dim = arguments["input"], arguments["dim"] % arguments["input"].meta["val"].dim()
    sizes = [piece.shape[dim] for piece in node.meta["val"]]
    for user in list(node.users):
        if user.target is operator.getitem:
            index: Any = user.args[1]
            number = index % len(sizes)
            start = sum(sizes[:number])
            with graph.graph.inserting_before(user):
                piece = graph.graph.call_function(aten.slice.Tensor, (x, dim, start, start + sizes[number]))
            piece.meta = dict(user.meta)
            user.replace_all_uses_with(piece)
            graph.graph.erase_node(user)
