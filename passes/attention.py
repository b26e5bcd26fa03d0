"""Write scaled dot-product attention as two batched products and a softmax."""

import math

import torch
from torch.fx import GraphModule

from pqcad_ao.graph.arguments import bind
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
        arguments = bind(node)
        tensors = [arguments[name] for name in ("query", "key", "value")]
        shapes = [source.meta["val"].shape for source in tensors]
        batches = {tuple(shape[:-2]) for shape in shapes}
        masked = arguments["attn_mask"] is not None or arguments["is_causal"]
        if masked or arguments["dropout_p"] or len(batches) > 1:
            continue
        scale = arguments["scale"] or 1 / math.sqrt(shapes[0][-1])
        inline(graph, node, _attention, *tensors, shapes, scale)
    return finish(graph)


def _attention(query, key, value, shapes, scale):
    query, key, value = (
        x.reshape(math.prod(shape[:-2]), *shape[-2:])
        for x, shape in zip((query * scale, key, value), shapes, strict=True)
    )
    weights = torch.bmm(query, key.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, value).view(*shapes[0][:-1], shapes[2][-1])
