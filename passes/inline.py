"""Write a rewrite as a plain function of tensors, and put its operators into a graph."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer


def inline(graph: GraphModule, node: Node, function: Callable[..., Any], *args: Any) -> None:
    """Replace ``node`` by what ``function(*args)`` computes, in place.

    Args:
        function: of tensors; it may loop and branch on anything but their values.
        args: nodes stand for tensors; the rest is passed as it is.
    """
    tracer = GraphAppendingTracer(graph.graph)
    with graph.graph.inserting_before(node):
        output = function(*map_arg(args, lambda source: Proxy(source, tracer)))
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
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph


def traced(node: Node) -> Any:
    """What a node stood for while torch.compile or torch.export traced it."""
    return node.meta.get("example_value", node.meta.get("val"))


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument of a call, wherever it was written."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
