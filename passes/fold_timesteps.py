"""Fold whatever depends on the timestep alone into a table with a row for each step of a fixed schedule."""

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pqcad_ao.passes.inline import writes

aten = torch.ops.aten
# Operators that spread one row over a batch by themselves.
BROADCASTING: set[Any] = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
BROADCASTING |= {operator.add, operator.sub, operator.mul, operator.truediv}


@torch.no_grad()
def fold_timesteps(graph: GraphModule, timesteps: Node, schedule: Tensor) -> GraphModule:
    """Replace a graph's timesteps by the index of a step, in place.

    Values that depend on the timesteps and on parameters only, and that something else reads (time projections,
    activation scales), are computed once for every step. What computed them disappears; they are read from one table
    for each dtype, (S, n, 1, 1) of all of them side by side, with one ``index_select``; equal ones are one node.
    Operators that merely spread such a value over more elements stay, so that the table holds what they spread.
    Afterwards every sample of a batch is at the same step.

    Args:
        graph: as ``ExportedProgram.module()`` returns it, with static shapes.
        timesteps: its placeholder of the (B,) timesteps.
        schedule: (S,), the timestep of each step, of the type that the graph takes.

    Returns:
        the same GraphModule; in the place of ``timesteps`` it takes ``step``, a (1,) int64 index into ``schedule``.

    Raises:
        ValueError: a value that depends on the timesteps alone is changed in place.
    """
    alone = _depending_on(timesteps)
    for node in alone:
        if writes(node):  # what it changes may be a view of what is folded
            raise ValueError(
                f"the network changes a value of the timestep in place ({node.format_node()}): it cannot be "
                "a table with a row for each step. Write the operation out of place"
            )
    for node in reversed([node for node in alone if not node.users and node.op != "placeholder"]):
        graph.graph.erase_node(node)  # checks of metadata: nothing reads them, and dead code elimination keeps them
        del alone[node]
    batch = timesteps.meta["val"].shape[0]
    feed = [{timesteps: timestep.repeat(batch)} for timestep in schedule]
    _keep_spreading(graph, alone, feed[0])
    frontier = [node for node in alone if any(user not in alone for user in node.users)]
    rows = [evaluate(graph, frontier, values) for values in feed]
    values = [torch.stack(column) for column in zip(*rows, strict=True)]
    with graph.graph.inserting_before(timesteps):
        step = graph.graph.placeholder("step")
    step.meta["val"] = torch.empty(1, dtype=torch.int64, device="meta")
    with graph.graph.inserting_before(_first_reader(graph.graph, frontier, alone)):
        _read_from_tables(graph, step, frontier, values, alone)
    for node in reversed(list(alone)):
        if not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return graph


def _depending_on(placeholder: Node) -> dict[Node, None]:
    """``placeholder`` and the nodes that depend on it and on no other placeholder, in order."""
    others: set[Node] = set()
    alone: dict[Node, None] = {placeholder: None}
    for node in placeholder.graph.nodes:
        if node is placeholder or node.op == "get_attr":
            continue
        if node.op in ("placeholder", "output") or others.intersection(node.all_input_nodes):
            others.add(node)
        elif any(source in alone for source in node.all_input_nodes):
            alone[node] = None
    return alone


def _keep_spreading(graph: GraphModule, alone: dict[Node, None], feed: dict[Node, Tensor]) -> None:
    """Take out of ``alone`` what only broadcasts its timestep-dependent inputs against larger parameters."""
    values = zip(alone, evaluate(graph, list(alone), feed), strict=True)
    sizes = {node: value.numel() for node, value in values if isinstance(value, Tensor)}  # a chunk is a list of pieces
    for node in [node for node in reversed(list(alone)) if node in sizes]:
        inputs = sum(sizes[source] for source in node.all_input_nodes if source in sizes)
        if node.target in BROADCASTING and sizes[node] > inputs and not any(user in alone for user in node.users):
            del alone[node]


def evaluate(graph: GraphModule, nodes: list[Node], feed: dict[Node, Tensor]) -> tuple[Tensor, ...]:
    """The values of ``nodes``, given those of the placeholders that they depend on."""
    needed, waiting = set(), list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    part = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in nodes))
    inputs = [feed[node] for node in graph.graph.nodes if node.op == "placeholder" and node in needed]
    return GraphModule(graph, part)(*inputs)


def _first_reader(graph: Graph, frontier: list[Node], alone: dict[Node, None]) -> Node:
    readers = {user for node in frontier for user in node.users if user not in alone}
    return next((node for node in graph.nodes if node in readers), next(reversed(graph.nodes)))


def _read_from_tables(
    graph: GraphModule, step: Node, frontier: list[Node], values: list[Tensor], alone: dict[Node, None]
) -> None:
    """Insert the tables and let the readers of each frontier node read its columns."""
    columns: dict[torch.dtype, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (node, value) in enumerate(zip(frontier, values, strict=True)):
        if _one_row_will_do(node, value, alone):
            values[index] = value[:, :1]
        content = values[index].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        columns[value.dtype][values[index].shape, content].append(index)
    for dtype, equal in columns.items():
        # four dimensions: XNNPACK turns the whole row into its channels-last form once
        first = [values[index].reshape(len(values[index]), -1) for index, *_ in equal.values()]
        table = torch.cat(first, 1)[:, :, None, None]
        name = f"steps_{str(dtype).removeprefix('torch.')}"
        graph.register_buffer(name, table.contiguous())
        row = graph.graph.call_function(aten.index_select.default, (graph.graph.get_attr(name), 0, step))
        start = 0
        for index, *others in equal.values():
            shape, end = values[index].shape[1:], start + values[index][0].numel()
            node = graph.graph.call_function(aten.slice.Tensor, (row, 1, start, end))
            if shape != (1, end - start, 1, 1):
                node = graph.graph.call_function(aten.view.default, (node, list(shape)))
            node.meta["val"] = values[index][0].to("meta")
            for reader in (index, *others):
                frontier[reader].replace_all_uses_with(node, lambda user: user not in alone)
            start = end


def _one_row_will_do(node: Node, values: Tensor, alone: dict[Node, None]) -> bool:
    """Whether the rows of (S, B, ...) are equal and everything that reads them broadcasts one over the batch."""
    if values.dim() < 2 or values.shape[1] == 1 or not torch.equal(values, values[:, :1].expand_as(values)):
        return False
    for user in node.users:
        if user in alone:
            continue
        others = [source for source in user.all_input_nodes if source is not node]
        if user.target not in BROADCASTING or not all("val" in other.meta for other in (*others, user)):
            return False
        shapes = [other.meta["val"].shape for other in others]
        if torch.broadcast_shapes(values[0, :1].shape, *shapes) != user.meta["val"].shape:
            return False
    return True
