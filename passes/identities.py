"""Drop operators that return their input."""

import operator

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional

from pqcad_ao.graph.arguments import bind
from pqcad_ao.passes.inline import finish, traced, writes

aten = torch.ops.aten
# Each operator as torch.compile and as torch.export write it.
DROPOUT = {functional.dropout, aten.dropout.default}
BY_ONE = {operator.mul, operator.truediv, torch.mul, torch.div, aten.mul.Tensor, aten.div.Tensor}


def drop_identities(graph: GraphModule) -> GraphModule:
    """Remove dropout out of training, casts to the same dtype, products with and quotients by one, in place.

    Works on a graph of torch.compile or of torch.export.

    Returns:
        the same GraphModule.
    """
    in_place = any(writes(node) for node in graph.graph.nodes)  # then a product by one may be there to make a copy
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and (_is_identity(node) or (not in_place and _is_by_one(node))):
            node.replace_all_uses_with(bind(node)["input"])
            graph.graph.erase_node(node)
        elif node.target is aten._assert_tensor_metadata.default:  # keeps casts alive and checks what export has fixed
            graph.graph.erase_node(node)
    return finish(graph)


def _is_identity(node: Node) -> bool:
    if node.target in DROPOUT:
        arguments = bind(node)
        training = arguments["train" if "train" in arguments else "training"]
        return not training or arguments["p"] == 0
    if node.target is aten.to.dtype:
        arguments = bind(node)
        source = arguments["input"].meta.get("val")
        return source is not None and source.dtype == arguments["dtype"]
    return False


def _is_by_one(node: Node) -> bool:
    if node.target not in BY_ONE or len(node.args) != 2 or node.kwargs:  # keywords: a rounding mode, or out
        return False
    arguments = bind(node)
    source, one = arguments["input"], arguments["other"]
    is_one = isinstance(source, Node) and isinstance(one, (int, float)) and one == 1
    return is_one and getattr(traced(source), "dtype", None) == getattr(traced(node), "dtype", False)
