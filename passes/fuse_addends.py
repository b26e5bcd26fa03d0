"""Let a quantized convolution add what is added to its result: a residual, or the time embedding's channels."""

import operator

import torch
from torch.fx import GraphModule, Node

from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import packed_operator
from pqcad_ao.passes.inline import Order, finish, traced

ADD = {operator.add, torch.add, torch.ops.aten.add.Tensor}


def fuse_addends(graph: GraphModule) -> int:
    """Turn ``conv2d(...) + y`` into ``conv2d(..., addend=y)``, in place, where nothing else reads the convolution.

    Of the sum of two convolutions the later one takes the earlier one's result. y has the result's shape, or one value
    for each sample and channel, and its type; one row for all samples, as a table of the timesteps holds it, is spread
    over them.

    Returns:
        how many sums are gone.
    """
    fused, nodes = 0, Order(graph)
    for node in list(graph.graph.nodes):
        if node.target not in ADD:
            continue
        arguments = bind(node)
        left, right = arguments["input"], arguments["other"]
        pairs = [pair for pair in ((left, right), (right, left)) if _takes(*pair) and nodes.calm(pair[0], node)]
        if not pairs or arguments["alpha"] != 1:
            continue
        conv, addend = max(pairs, key=lambda pair: nodes.position[pair[0]])
        batch = traced(conv).shape[0]
        with graph.graph.inserting_before(node):  # here, where the addend is known
            if traced(addend).shape[0] != batch:
                addend = graph.graph.call_method("expand", (addend, batch, -1, -1, -1))
            kwargs = {**conv.kwargs, "addend": addend}
            replacement = graph.graph.call_function(conv.target, conv.args, kwargs)
        replacement.meta = dict(node.meta)
        nodes.position[replacement] = nodes.position[node]
        node.replace_all_uses_with(replacement)
        graph.graph.erase_node(node)
        graph.graph.erase_node(conv)
        fused += 1
    finish(graph)
    return fused


def _takes(conv: object, addend: object) -> bool:
    if not (isinstance(conv, Node) and isinstance(addend, Node) and len(conv.users) == 1):
        return False
    operator = packed_operator(conv)
    if operator is None or operator.spatial == 0:
        return False
    if addend is conv or bind(conv)["addend"] is not None:
        return False
    result, other = traced(conv), traced(addend)
    if not isinstance(other, torch.Tensor) or other.dtype != result.dtype or other.dim() != 4:
        return False
    if other.shape == result.shape:
        return True
    # a batch that is known: a row is spread over no other
    one_row = other.shape[0] == 1 and isinstance(result.shape[0], int)
    per_sample = one_row or other.shape[0] == result.shape[0]
    return per_sample and other.shape[1] == result.shape[1] and other.shape[2:] == (1, 1)
