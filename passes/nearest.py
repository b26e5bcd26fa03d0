"""Write nearest-neighbour upsampling by whole factors as copies beside each other, which XNNPACK has."""

import torch
from torch.fx import GraphModule

from pqcad_ao.graph.arguments import bind
from pqcad_ao.passes.inline import buffer, finish, inline

aten = torch.ops.aten
TARGETS = (aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)


def decompose_nearest(graph: GraphModule) -> GraphModule:
    """Replace every nearest upsampling of (B, C, H, W) by whole factors, in place; others stay.

    In channels-last layout the copies of a place lie behind each other, and so do those of a row: a product with ones
    writes them, and nothing else moves, see :func:`pqcad_ao.edge.lower.without_transposes`. (XNNPACK's concatenation of
    one tensor with itself is left out of the delegate by ExecuTorch 1.4, and then computes something else.)

    Returns:
        the same GraphModule.
    """
    for node in list(graph.graph.nodes):
        if node.target in TARGETS:
            x, result = bind(node)["input"], node.meta["val"].shape
            shape = tuple(x.meta["val"].shape)
            factors = [after // before for before, after in zip(shape[2:], result[2:], strict=True)]
            if [f * before for f, before in zip(factors, shape[2:], strict=True)] == list(result[2:]):
                ones = [buffer(graph, node, f"ones_{factor}", torch.ones(1, factor, 1)) for factor in factors]
                inline(graph, node, _repeat, x, shape, factors, ones)
    return finish(graph)


def _repeat(x, shape, factors, ones):
    channels, height, width = shape[1:]
    down, across = factors
    places = aten.reshape.default(aten.permute.default(x, [0, 2, 3, 1]), [-1, 1, channels]) * ones[1]
    rows = aten.reshape.default(places, [-1, 1, across * width * channels]) * ones[0]
    image = aten.reshape.default(rows, [-1, down * height, across * width, channels])
    return aten._to_copy.default(aten.permute.default(image, [0, 3, 1, 2]), memory_format=torch.channels_last)
