"""Write LayerNorm in operators that XNNPACK has."""

import torch
from torch.fx import GraphModule
from torch.nn import functional

from pqcad_ao.graph.arguments import bind
from pqcad_ao.passes.inline import buffer, finish, inline

aten = torch.ops.aten


def decompose_layer_norm(graph: GraphModule) -> GraphModule:
    """Replace every ``aten.layer_norm`` over the last dimension, in place; others stay.

    XNNPACK takes means of images alone. Of tokens (..., C) a product with a row of 1/C is their mean. The variance is
    the mean square of the centred values, never a difference of large numbers.

    Returns:
        the same GraphModule.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten.layer_norm.default:
            continue
        arguments = bind(node)
        size = arguments["normalized_shape"]
        if len(size) == 1:
            row = buffer(graph, node, f"mean_of_{size[0]}", torch.full((1, size[0]), 1 / size[0]))
            x, weight, bias, eps = (arguments[name] for name in ("input", "weight", "bias", "eps"))
            inline(graph, node, _layer_norm, x, row, weight, bias, eps)
    return finish(graph)


def _layer_norm(x, row, weight, bias, eps):
    centred = x - functional.linear(x, row)
    normalized = centred * (functional.linear(centred * centred, row) + eps).rsqrt()
    if weight is not None:
        normalized = normalized * weight
    return normalized if bias is None else normalized + bias
