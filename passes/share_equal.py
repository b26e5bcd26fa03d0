"""Compute once what a graph computes several times."""

import torch
from torch.fx import GraphModule, Node

from pqcad_ao.passes.inline import finish, writes


def share_equal(graph: GraphModule) -> GraphModule:
    """Let the readers of nodes of one operator with equal arguments read the first of them, in place.

    Attention's queries, keys and values, for example, are linears of one input: where their grids are equal, it is
    rounded once. A graph that changes tensors in place stays as it is.

    Returns:
        the same GraphModule.
    """
    nodes = list(graph.graph.nodes)
    if any(writes(node) for node in nodes):
        return graph
    first: dict[str, Node] = {}
    for node in nodes:
        if node.op in ("placeholder", "output") or _is_random(node):
            continue
        # as text: slices among the arguments have no hash, and a node's name is its own in its graph
        same = first.setdefault(f"{node.op} {node.target!r} {node.args} {node.kwargs}", node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
    return finish(graph)


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
