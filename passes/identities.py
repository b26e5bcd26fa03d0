"""Drop operators that return their input."""

import torch
from torch.fx import GraphModule, Node

from pqcad_ao.passes.inline import finish

aten = torch.ops.aten


def drop_identities(graph: GraphModule) -> GraphModule:
    """Remove dropout out of training, casts to the same dtype, products with and quotients by one, in place.

    Returns:
        the same GraphModule.
    """
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is aten._assert_tensor_metadata.default:  # keeps casts alive and checks what export has fixed
            graph.graph.erase_node(node)
    return finish(graph)


def _is_identity(node: Node) -> bool:
    if node.target is aten.dropout.default:
        return not node.args[2]
    if node.target is aten.to.dtype:
        source = node.args[0].meta.get("val")
        return source is not None and source.dtype == node.args[1]
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        one = node.args[1]
        return isinstance(one, (int, float)) and one == 1 and node.args[0].meta["val"].dtype == node.meta["val"].dtype
    return False
