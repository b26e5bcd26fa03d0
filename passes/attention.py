"""Write scaled dot-product attention as two batched products and a softmax."""

import math

import torch
from torch.fx import GraphModule

from pqcad_ao.passes.inline import finish, inline

aten = torch.ops.aten


def decompose_attention(graph: GraphModule) -> GraphModule:
    """Replace every ``aten.scaled_dot_product_attention`` without a mask, in place; one with a mask stays.

    torch's own decomposition guards against rows that are masked altogether, by comparisons that XNNPACK does not have.

    Returns:
        the same GraphModule.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        query, key, value, mask, dropout, is_causal = (*node.args, *(None, 0.0, False)[len(node.args) - 3 :])[:6]
        shapes = [source.meta["val"].shape for source in (query, key, value)]
        batches = {tuple(shape[:-2]) for shape in shapes}
        if mask is not None or is_causal or dropout or len(batches) > 1:
            continue
        scale = node.kwargs.get("scale") or 1 / math.sqrt(shapes[0][-1])
        inline(graph, node, _attention, query, key, value, shapes, scale)
    return finish(graph)


def _attention(query, key, value, shapes, scale):
    query, key, value = (
        x.reshape(math.prod(shape[:-2]), *shape[-2:])
        for x, shape in zip((query * scale, key, value), shapes, strict=True)
    )
    weights = torch.bmm(query, key.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, value).view(*shapes[0][:-1], shapes[2][-1])
