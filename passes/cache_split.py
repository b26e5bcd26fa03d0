"""Cut a network at a skip concatenation: one program computes all, the other takes the deep half from a step before."""

from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import tree_flatten, tree_unflatten

from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import operator_of, packed_operator
from pqcad_ao.graph.work import multiply_adds, sizes
from pqcad_ao.passes.inline import writes

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheSplit:
    """A network in two programs that share its weights.

    Attributes:
        full: the graph's own arguments to ``(prediction, feature)``.
        shallow: the same arguments and the feature behind them, to the prediction.
        feature_shape: (C, H, W) of the feature.
        full_macs, shallow_macs: multiply-adds of a sample.
    """

    full: GraphModule
    shallow: GraphModule
    feature_shape: tuple[int, ...]
    full_macs: int
    shallow_macs: int


def cache_split(graph: GraphModule, branch: int = 1) -> CacheSplit:
    """Cut a captured network at a skip concatenation (Ma et al. 2023, DeepCache), whatever its layers compute in.

    A skip concatenation joins two images along their channels. The deep one, which more layers are behind, is the
    feature. ``shallow(*inputs, feature)`` with the feature of ``full(*inputs)`` is full's prediction, bit for bit.

    Args:
        graph: as :func:`~pqcad_ao.graph.capture.capture` returns it, with fake quantizers in it or quantized layers;
            it stays as it is.
        branch: which concatenation, counted from the output: 1 leaves the outermost block alone in ``shallow``.

    Raises:
        ValueError: the graph has fewer skip concatenations, or changes the feature in place.
    """
    joints = _joints(graph.graph)
    if not 1 <= branch <= len(joints):
        raise ValueError(
            f"branch={branch}: the network has {len(joints)} skip concatenations, where two images are joined along "
            "their channels" + (f": allowed are 1 to {len(joints)}" if joints else ", so that it cannot be cut at one")
        )
    number = len(joints) - branch
    full, shallow = _copied(graph.graph), _copied(graph.graph)
    deep = _joints(full)[number]
    (output,) = full.find_nodes(op="output")
    output.args = ((*_outputs(output), deep),)
    _rewrap(full, outputs=2)
    _drop_unneeded(full)
    if any(writes(node) and _storage(node) is _storage(deep) for node in full.nodes):
        raise ValueError(f"the network changes {deep.name}, which would be kept from step to step, in place")

    deep = _joints(shallow)[number]
    last = [node for node in shallow.nodes if node.op == "placeholder"][-1]
    with shallow.inserting_after(last):
        feature = shallow.placeholder("feature")
    feature.meta["val"] = deep.meta["val"]
    deep.replace_all_uses_with(feature)
    _rewrap(shallow, more_inputs=1)
    _drop_unneeded(shallow)
    programs = GraphModule(graph, full), GraphModule(graph, shallow)
    counts = [multiply_adds(program) for program in programs]
    return CacheSplit(*programs, sizes(feature)[1:], *counts)


def give_feature_by_rows(full: GraphModule) -> None:
    """Let ``full`` give its feature in the layout in which a ``shallow`` that is exported on its own reads it; in
    place."""
    (output,) = full.graph.find_nodes(op="output")
    *others, feature = output.args[0]
    with full.graph.inserting_before(output):
        clone = torch.ops.aten.clone.default
        rows = full.graph.call_function(clone, (feature,), {"memory_format": torch.contiguous_format})
    rows.meta["val"] = feature.meta["val"].contiguous()
    output.args = ((*others, rows),)
    full.recompile()


def _copied(graph: Graph) -> Graph:
    copied, copies = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        copies[node] = copied.node_copy(node, copies.__getitem__)
    copied.set_codegen(graph._codegen)
    return copied


def _joints(graph: Graph) -> list[Node]:
    """The deep image of every skip concatenation, in the graph's order."""
    behind: dict[Node, set[Node]] = {}  # layers
    found = []
    for node in graph.nodes:
        layers = {node} if operator_of(node) or packed_operator(node) else set()
        behind[node] = layers.union(*(behind[source] for source in node.all_input_nodes))
        if node.target is aten.cat.default and node.meta["val"].dim() == 4:
            arguments = bind(node)
            images = arguments["tensors"]
            # a mask beside x_t, which no layer has computed, is no skip
            if arguments["dim"] in (1, -3) and len(images) == 2 and all(behind[image] for image in images):
                found.append(max(images, key=lambda image: len(behind[image])))
    return found


def _outputs(output: Node) -> tuple[Any, ...]:
    (values,) = output.args
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def _rewrap(graph: Graph, *, more_inputs: int = 0, outputs: int = 1) -> None:
    """Say how a graph's changed inputs and outputs are passed; what was there is passed as before."""
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]  # of every graph that torch.export has made
    args, kwargs = tree_unflatten(range(info.in_spec.num_leaves), info.in_spec)
    in_spec = tree_flatten(((*args, *range(more_inputs)), kwargs))[1]
    out_spec = info.out_spec if outputs == 1 else tree_flatten(tuple(range(outputs)))[1]
    names = [*info.orig_args, *("feature" for _ in range(more_inputs))]
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, in_spec, out_spec)))


def _drop_unneeded(graph: Graph) -> None:
    """Erase what the output does not need.

    torch's own elimination keeps what it counts as impure, dropout and attention among it, and with that nearly all of
    the network. Here of operators that change a tensor in place those stay whose tensor is needed.
    """
    changing = [node for node in graph.nodes if writes(node)]
    needed: set[Node] = set()
    waiting = list(graph.find_nodes(op="output"))
    while waiting:
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        storages = {_storage(node) for node in needed}
        waiting = [node for node in changing if node not in needed and _storage(node) in storages]
    for node in reversed(list(graph.nodes)):
        if node not in needed and node.op != "placeholder":
            graph.erase_node(node)
    graph.lint()


def _storage(node: Node) -> Node:
    """The node whose memory a view, or an operator in place, returns."""
    while isinstance(node.target, OpOverload) and node.target._schema.returns:
        returned = node.target._schema.returns[0].alias_info
        source = node.all_input_nodes[:1]
        if returned is None or not source:
            break
        node = source[0]
    return node
