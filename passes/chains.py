"""Gather ``pqcad::`` operators that wait for nothing between them into chains, each of which is one call."""

import operator
from collections import defaultdict

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import py_sym_types
from torch.fx.node import map_arg

import pqcad_ao.ops  # noqa: F401  (registers the operators)
from pqcad_ao.graph.arguments import bind
from pqcad_ao.ops import chain
from pqcad_ao.passes.inline import finish, traced, writes

NAMES = {
    target: name
    for name in chain.OPERATORS
    for target in (getattr(torch.ops.pqcad, name), getattr(torch.ops.pqcad, name).default)
}


def gather_chains(graph: GraphModule) -> int:
    """Let ``pqcad::chain`` make the calls of ``pqcad::`` operators that stand next to each other, in place.

    Nodes are put in stages. In each the other operators come first; its ``pqcad::`` operators then wait for nothing but
    each other and earlier stages. A graph that changes a tensor in place, or that turns something on and off, stays in
    its order and as it is.

    Returns:
        how many calls are gone.
    """
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    if any(writes(node) or (node.op != "placeholder" and node.is_impure(impure_random=False)) for node in nodes):
        return 0
    stages: dict[Node, int] = {}
    for node in nodes:
        own = _is_own(node)
        stages[node] = max((stages[n] + (_is_own(n) and not own) for n in node.all_input_nodes), default=0)
    end = next(iter(reversed(graph.graph.nodes)))
    chains: dict[int, list[Node]] = defaultdict(list)
    for node in sorted(nodes, key=lambda node: (stages[node], _is_own(node))):
        end.prepend(node)
        if _is_own(node):
            chains[stages[node]].append(node)
    gone = 0
    for calls in chains.values():
        if len(calls) > 1:
            _gather(graph, calls)
            gone += len(calls) - 1
    finish(graph)
    return gone


def _is_own(node: Node) -> bool:
    """Whether a node calls an operator that a chain may call, with numbers that are known."""
    return node.target in NAMES and not any(isinstance(traced(n), py_sym_types) for n in node.all_input_nodes)


def _gather(graph: GraphModule, calls: list[Node]) -> None:
    members = set(calls)
    inputs = list(dict.fromkeys(source for node in calls for source in node.all_input_nodes if source not in members))
    numbers = {node: index for index, node in enumerate((*inputs, *calls))}
    read = [node for node in calls if any(user not in members for user in node.users)]
    results = [numbers[node] for node in read]
    arguments = [map_arg(tuple(bind(node).values()), numbers.__getitem__) for node in calls]
    named = [(NAMES[node.target], given) for node, given in zip(calls, arguments, strict=True)]
    program = chain.write(named, len(inputs), results)
    with graph.graph.inserting_before(calls[0]):
        joint = graph.graph.call_function(torch.ops.pqcad.chain.default, (inputs, program, results))
        for index, node in enumerate(read):
            result = graph.graph.call_function(operator.getitem, (joint, index))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result, lambda user: user not in members)
    for node in reversed(calls):
        graph.graph.erase_node(node)
