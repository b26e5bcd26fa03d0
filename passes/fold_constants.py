"""Compute once what depends on no input, and keep the values as buffers."""

import torch
from torch.fx import GraphModule, Node

from pqcad_ao.passes.fold_timesteps import evaluate


@torch.no_grad()
def fold_constants(graph: GraphModule) -> GraphModule:
    """Replace every value that is computed from parameters alone, such as a dequantized weight, by a buffer, in place.

    Returns:
        the same GraphModule.
    """
    variable: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output") or variable.intersection(node.all_input_nodes):
            variable.add(node)
    constant = [
        node
        for node in graph.graph.nodes
        if node not in variable and node.op != "get_attr" and any(user in variable for user in node.users)
    ]
    for index, (node, value) in enumerate(zip(constant, evaluate(graph, constant, {}), strict=True)):
        name = f"constant_{index}"
        graph.register_buffer(name, value.contiguous())
        with graph.graph.inserting_before(node):
            buffer = graph.graph.get_attr(name)
        buffer.meta = dict(node.meta)
        node.replace_all_uses_with(buffer)
    for node in reversed([node for node in graph.graph.nodes if node not in variable]):
        if not node.users:
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return graph
