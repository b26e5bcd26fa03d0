"""Write GroupNorm in operators that XNNPACK has, on its channels-last layout."""

import torch
from torch.fx import GraphModule

from pqcad_ao.graph.arguments import bind
from pqcad_ao.passes.inline import buffer, finish, inline, value_of

aten = torch.ops.aten


def decompose_group_norm(graph: GraphModule) -> GraphModule:
    """Replace every ``aten.group_norm`` on (B, C, H, W) or (B, C, L), in place.

    Over the image only means of whole channels are taken, so nothing large is reshaped; groups are formed on (B, C)
    numbers. The variance is the mean square of the centred values, never a difference of large numbers.

    Returns:
        the same GraphModule.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten.group_norm.default or node.meta["val"].dim() not in (3, 4):
            continue
        arguments, shape = bind(node), node.meta["val"].shape
        x, groups, weight, bias = (arguments[name] for name in ("input", "num_groups", "weight", "bias"))
        size = shape[1] // groups
        ones = buffer(graph, node, f"ones_{groups}_{size}", torch.ones(1, groups, size, 1))
        name = node.name if weight is None else str(weight.target).replace(".", "_")
        if weight is not None:
            weight = buffer(graph, node, f"{name}_groups", value_of(graph, weight).detach().view(1, groups, -1, 1))
        if bias is not None:
            bias = buffer(graph, node, f"{name}_bias", value_of(graph, bias).detach().view(1, -1, 1, 1))
        inline(graph, node, _group_norm, x, ones, weight, bias, arguments["eps"], shape, groups)
    return finish(graph)


def _group_norm(x, ones, weight, bias, eps, shape, groups):
    """ones and weight are (1, G, C/G, 1), bias is (1, C, 1, 1)."""
    batch, channels = shape[:2]
    if len(shape) == 3:
        x = x.reshape(*shape, 1)

    def group_mean(values):
        """(B, G, 1, 1)."""
        means = values.mean((2, 3), keepdim=True)
        return means.view(batch, groups, channels // groups, 1).mean((2, 3), keepdim=True)

    def per_channel(values):
        """(B, G, C/G, 1) to (B, C, 1, 1)."""
        return values.view(batch, channels, 1, 1)

    centred = x - per_channel(group_mean(x) * ones)
    factor = (group_mean(centred * centred) + eps).rsqrt() * (ones if weight is None else weight)
    normalized = centred * per_channel(factor)
    if bias is not None:
        normalized = normalized + bias
    return normalized if len(shape) == 4 else normalized.view(shape)
