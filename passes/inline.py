"""Write a rewrite as a plain function of tensors, and put its operators into a graph."""

import operator
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from pqcad_ao.graph.arguments import bind

# a += b and its kin, and a[i] = b
_IN_PLACE = {getattr(operator, name) for name in dir(operator) if name[0] == "i" and hasattr(operator, name[1:])}
_IN_PLACE |= {operator.iand, operator.ior, operator.setitem, operator.delitem}


def inline(graph: GraphModule, node: Node, function: Callable[..., Any], *args: Any) -> None:
    """Replace ``node`` by what ``function(*args)`` computes, in place.

    Args:
        function: of tensors; it may loop and branch on anything but their values.
        args: nodes stand for tensors; the rest is passed as it is.
    """
    tracer = GraphAppendingTracer(graph.graph)

    def proxy(source: Node) -> Any:
        return Proxy(source, tracer)

    with graph.graph.inserting_before(node):
        output = function(*map_arg(args, proxy))
    output.node.meta = dict(node.meta)
    node.replace_all_uses_with(output.node)
    graph.graph.erase_node(node)


def buffer(graph: GraphModule, before: Node, name: str, value: Tensor) -> Node:
    """A node that reads ``value``, registered as a buffer; an equal buffer of that name is used again.

    Raises:
        ValueError: there is another buffer of that name.
    """
    if not hasattr(graph, name):
        graph.register_buffer(name, value)
    elif not getattr(graph, name).equal(value):
        raise ValueError(f"the graph has another buffer {name!r}")
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)


def value_of(graph: GraphModule, node: Node) -> Tensor:
    """The parameter or buffer that a ``get_attr`` node reads."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)


def finish(graph: GraphModule) -> GraphModule:
    """Drop what nothing reads any more, check the graph and make it runnable again."""
    # torch 2.13 counts what Python's operators and torch.nn.functional change in place as dead where nobody reads it
    graph.graph.eliminate_dead_code(lambda node: node.is_impure() or writes(node))
    graph.graph.lint()
    graph.recompile()
    return graph


def traced(node: Node) -> Any:
    """What a node stood for while torch.compile or torch.export traced it."""
    return node.meta.get("example_value", node.meta.get("val"))


def writes(node: Node) -> bool:
    """Whether a node changes a tensor in place."""
    if not node.op.startswith("call_"):  # Dynamo's names of inputs end in an underscore, too
        return False
    target, name = node.target, getattr(node.target, "__name__", str(node.target))
    if isinstance(target, OpOverload):
        return target._schema.is_mutable
    if target in _IN_PLACE or node.kwargs.get("out") is not None:
        return True
    if name.endswith("_") and not name.endswith("__"):  # a name of torch's, not and_ or or_
        return getattr(target, "__module__", "") != operator.and_.__module__
    try:
        given = bind(node)
    except TypeError:  # of a module, or a builtin whose arguments have no names
        given = dict(node.kwargs)
    return bool(given.get("inplace", False))


class Order:
    """Where a graph's nodes stand, and between which of them nothing is changed in place."""

    def __init__(self, graph: GraphModule) -> None:
        self.position = {node: index for index, node in enumerate(graph.graph.nodes)}
        self._writes = [index for node, index in self.position.items() if writes(node)]

    def calm(self, first: Node, last: Node) -> bool:
        """Whether ``last`` may work out again what ``first`` did: no tensor is changed from the one to the other."""
        start, end = (bisect_left(self._writes, self.position[node]) for node in (first, last))
        return start == end
