"""Show values inside a graph: what chosen layers compute, beside the prediction, or what they are given, alone."""

import copy
from collections.abc import Sequence

from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_structure

from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import layer_fqn, quantizable


def expose(graph: GraphModule, names: Sequence[str]) -> GraphModule:
    """The graph with output ``(prediction, (y_1, ...))``, y being what the layers of these names compute themselves.

    A layer's value is taken before anything that follows it is added. Modules and parameters are shared with ``graph``,
    which stays as it is.

    Raises:
        ValueError: the graph has no layer of a name.
    """
    shown, layers = _copy(graph, names)
    (prediction,) = shown.graph.output_node().all_input_nodes
    return _giving(shown, [prediction, *layers], (0, (0,) * len(layers)))


def inputs_alone(graph: GraphModule, names: Sequence[str]) -> GraphModule:
    """The graph that computes what the layers of these names are given, a tuple, and nothing besides.

    It is called as ``graph`` is, and shares its modules and parameters. Raises as :func:`expose`.
    """
    shown, layers = _copy(graph, names)
    return _giving(shown, [bind(node)["input"] for node in layers], (0,) * len(layers))


def _copy(graph: GraphModule, names: Sequence[str]) -> tuple[GraphModule, list[Node]]:
    """A graph of the same modules, and its nodes of these layers."""
    copied = GraphModule(graph, copy.deepcopy(graph.graph))
    nodes = {layer_fqn(node): node for node in copied.graph.nodes if quantizable(node) is not None}
    missing = [name for name in names if name not in nodes]
    if missing:
        raise ValueError(f"the graph has no layer {', '.join(missing)}")
    return copied, [nodes[name] for name in names]


def _giving(graph: GraphModule, values: list[Node], form: object) -> GraphModule:
    """Let a graph give back ``values`` in a nesting like ``form``'s, and compute nothing that they do not need."""
    graph.graph.output_node().args = (tuple(values),)
    codegen = graph.graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=tree_structure(form))  # type: ignore[attr-defined]
    # torch counts dropout and attention among what must not be dropped
    graph.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.recompile()
    return graph
