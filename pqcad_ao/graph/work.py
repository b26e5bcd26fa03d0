"""How much a graph multiplies: its layers, and the products of two activations in its attention."""

from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node

from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import BATCHED_PRODUCTS, operator_of, packed_operator

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def multiply_adds(graph: GraphModule) -> int:
    """Multiply-adds of one sample through a captured graph, quantized or not."""
    x_t = next(node for node in graph.graph.nodes if node.op == "placeholder")
    return sum(_of_node(node) for node in graph.graph.nodes) // sizes(x_t)[0]


def sizes(node: Node) -> tuple[int, ...]:
    """The shape that a node's value had while it was captured; of a dynamic batch, the example's."""
    shape: Any = node.meta["val"].shape
    return tuple(size if isinstance(size, int) else size.node.hint for size in shape)


def _of_node(node: Node) -> int:
    """Multiply-adds of one call."""
    if node.target in BATCHED_PRODUCTS:
        given = bind(node)
        if node.target is ATTENTION:  # queries with keys, and what these say with values
            keys = sizes(given["key"])[-2]
            return prod(sizes(given["query"])) * keys + prod(sizes(node)) * keys
        return prod(sizes(node)) * sizes(given.get("batch1", given["input"]))[-1]
    if packed_operator(node) is not None:
        given = bind(node)
        reduction = sum(given["segments"]) * prod(given.get("kernel_size", [])) // given.get("groups", 1)
        return prod(sizes(node)) * reduction
    row = operator_of(node)
    if row is None:
        return 0
    weight = bind(node)["weight"]
    shape = sizes(weight.args[0] if weight.op == "call_module" else weight)  # what a fake quantizer reads
    if row.kind.startswith("conv_transpose"):  # every number that comes in is multiplied by all kernels of its channel
        return prod(sizes(bind(node)["input"])) * prod(shape[1:])
    return prod(sizes(node)) * prod(shape[1:])
