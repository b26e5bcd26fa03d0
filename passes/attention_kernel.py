"""Let attention in a network on the CPU multiply in bfloat16, on its own kernel, ``pqcad::attention``."""

import math

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional

import pqcad_ao.ops  # noqa: F401  (registers the operators)
from pqcad_ao.graph.arguments import bind
from pqcad_ao.passes.inline import finish, traced

# As torch.compile and as torch.export write it.
ATTENTION = {functional.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default}


def attention_kernel(graph: GraphModule) -> int:
    """Replace scaled dot-product attention in float32 on the CPU, in place; with a mask or dropout it stays.

    Its results then have bfloat16's 8 bits. Some of them lie near a threshold of the quantizer behind them and go to
    the other side, so that the graph's output departs from what it was as far as a network of few bits carries that.

    Returns:
        how many are replaced.
    """
    replaced = 0
    for node in list(graph.graph.nodes):
        if node.target not in ATTENTION or not _is_plain(node):
            continue
        arguments = bind(node)
        query, key, value, scale = (arguments[name] for name in ("query", "key", "value", "scale"))
        scale = 1 / math.sqrt(traced(query).shape[-1]) if scale is None else scale
        with graph.graph.inserting_before(node):
            kernel = graph.graph.call_function(torch.ops.pqcad.attention, (query, key, value, scale))
        kernel.meta = dict(node.meta)
        node.replace_all_uses_with(kernel)
        graph.graph.erase_node(node)
        replaced += 1
    finish(graph)
    return replaced


def _is_plain(node: Node) -> bool:
    arguments = bind(node)
    query, key, value = (traced(arguments[name]) for name in ("query", "key", "value"))
    if arguments["attn_mask"] is not None or arguments["is_causal"] or arguments["dropout_p"]:
        return False
    if query.dim() != 4 or query.dtype != torch.float32 or query.device.type != "cpu":
        return False
    return key.shape == value.shape and key.shape[:2] == query.shape[:2] and key.shape[3] == query.shape[3]
