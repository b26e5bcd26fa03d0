"""Write GroupNorm in operators that XNNPACK has, on its channels-last layout."""

import torch
from torch.fx import GraphModule

from pqcad_ao.graph.arguments import bind
from pqcad_ao.passes.inline import buffer, finish, inline, value_of

aten = torch.ops.aten
NAME = str.maketrans(".-", "__")  # what a buffer's name must not hold


def decompose_group_norm(graph: GraphModule) -> GraphModule:
    """Replace every ``aten.group_norm`` on (B, C, H, W) or (B, C, L), in place.

    Over the image only means of whole channels are taken, so nothing large is reshaped; groups are formed on (B, C)
    numbers, as images of one channel, which lie in memory as the channels do. The variance is the mean square of the
    centred values, never a difference of large numbers.

    Returns:
        the same GraphModule.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten.group_norm.default or node.meta["val"].dim() not in (3, 4):
            continue
        arguments, shape = bind(node), node.meta["val"].shape
        x, groups, weight, bias = (arguments[name] for name in ("input", "num_groups", "weight", "bias"))
        size = shape[1] // groups
        ones = buffer(graph, node, f"ones_1x1x{size}x1", torch.ones(1, 1, size, 1))
        # of four dimensions: beside fewer of them XNNPACK's layout cannot be kept
        eps = _buffer(graph, node, f"eps_{arguments['eps']}", torch.tensor(arguments["eps"]))
        weight, bias = (
            given if given is None else _buffer(graph, node, f"{given.target}_beside", value_of(graph, given).detach())
            for given in (weight, bias)
        )
        inline(graph, node, _group_norm, x, ones, weight, bias, eps, shape, groups)
    return finish(graph)


def _buffer(graph, before, name, value):
    """A buffer (1, N, 1, 1) of N numbers."""
    return buffer(graph, before, name.translate(NAME), value.view(1, -1, 1, 1))


def _group_norm(x, ones, weight, bias, eps, shape, groups):
    """ones are (1, 1, C/G, 1), weight and bias (1, C, 1, 1), eps (1, 1, 1, 1)."""
    batch, channels = shape[:2]
    if len(shape) == 3:
        x = x.reshape(*shape, 1)

    def group_mean(values):
        """(B · G, 1, 1, 1)."""
        means = values.mean((2, 3), keepdim=True)
        return means.view(batch * groups, 1, channels // groups, 1).mean((2, 3), keepdim=True)

    def per_channel(values):
        """(B · G, 1, 1, 1) to (B, C, 1, 1)."""
        return (values * ones).view(batch, channels, 1, 1)

    centred = x - per_channel(group_mean(x))
    factor = per_channel((group_mean(centred * centred) + eps).rsqrt())
    normalized = centred * (factor if weight is None else factor * weight)
    if bias is not None:
        normalized = normalized + bias
    return normalized if len(shape) == 4 else normalized.view(shape)
