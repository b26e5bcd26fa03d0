"""Compute linear layers that read the same integers as one, such as attention's queries, keys and values."""

from collections import defaultdict
from typing import Any

import torch
from torch.fx import GraphModule, Node

from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import packed_operator
from pqcad_ao.passes.inline import Order, finish, value_of

STORED = ("weight", "weight_scale", "bias")


def join_linears(graph: GraphModule) -> int:
    """Put the rows of ``pqcad::linear`` layers with the same input and scale under each other, in place.

    What a layer's readers get is its columns of the joint result, a view. Weights are copied into new buffers: whoever
    reads the old ones no longer is to drop them, so a graph that shares them with a network is not to be joined.

    Returns:
        how many layers are gone.
    """
    alike: dict[Any, list[Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        row = packed_operator(node)
        if row is None or row.spatial:
            continue
        given = bind(node)
        stored = [given.pop(name) for name in STORED]
        if given["addend"] is None and all(value is None or value.op == "get_attr" for value in stored):
            key = [tuple(value) if isinstance(value, list) else value for value in given.values()]
            alike[tuple([*key, stored[-1] is None])].append(node)
    nodes = Order(graph)
    groups = [group for group in alike.values() if len(group) > 1 and nodes.calm(group[0], group[-1])]
    for index, group in enumerate(groups):
        _join(graph, group, f"joint_{index}")
    finish(graph)
    return sum(len(group) - 1 for group in groups)


def _join(graph: GraphModule, group: list[Node], name: str) -> None:
    target: Any = group[0].target
    given = bind(group[0])
    sizes = [value_of(graph, bind(node)["weight"]).shape[0] for node in group]
    with graph.graph.inserting_before(group[0]):
        for part in STORED:
            if given[part] is not None:
                rows = torch.cat([value_of(graph, bind(node)[part]) for node in group])
                graph.register_buffer(f"{name}_{part}", rows)
                given[part] = graph.graph.get_attr(f"{name}_{part}")
        joint = graph.graph.call_function(target, tuple(given.values()))
        start = 0
        for node, size in zip(group, sizes, strict=True):
            columns = graph.graph.call_function(torch.ops.aten.slice.Tensor, (joint, -1, start, start + size))
            columns.meta = dict(node.meta)
            node.replace_all_uses_with(columns)
            start += size
    for node in group:
        graph.graph.erase_node(node)
