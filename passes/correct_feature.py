"""Correct the feature that a cut network takes from a step before, by the line of the step that takes it."""

import torch
from torch import Tensor
from torch.fx import GraphModule

from pqcad_ao.passes.inline import buffer, finish, inline

aten = torch.ops.aten


def correct_feature(graph: GraphModule, scale: Tensor, shift: Tensor) -> GraphModule:
    """Let a folded shallow program read scale·feature + shift where it reads its feature, in place.

    Args:
        graph: of :func:`~pqcad_ao.passes.cache_split.cache_split` and as
            :func:`~pqcad_ao.passes.fold_timesteps.fold_timesteps` leaves it, ``f(x_t, step, ..., feature)``.
        scale, shift: (S, C) float32 of a :class:`~pqcad_ao.diffusion.cache_plan.CachePlan`, a row for each step.

    Returns:
        the same GraphModule.
    """
    _, step, *_, feature = (node for node in graph.graph.nodes if node.op == "placeholder")
    lines = buffer(graph, feature.next, "feature_lines", torch.cat([scale, shift], 1)[:, :, None, None].contiguous())
    with graph.graph.inserting_after(lines):
        stand_in = graph.graph.call_function(aten.clone.default, (feature,))
    stand_in.meta["val"] = feature.meta["val"]
    feature.replace_all_uses_with(stand_in, lambda user: user is not stand_in)
    inline(graph, stand_in, _corrected, feature, lines, step, scale.shape[1])
    return finish(graph)


def _corrected(feature, lines, step, channels):
    row = aten.index_select.default(lines, 0, step)
    return feature * aten.slice.Tensor(row, 1, 0, channels) + aten.slice.Tensor(row, 1, channels, 2 * channels)
