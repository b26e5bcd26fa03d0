"""Fuse what stands in front of a quantizer into it: concatenation, GroupNorm, SiLU, nearest upsampling."""

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional

import pqcad_ao.ops  # noqa: F401  (registers the operators)
from pqcad_ao.passes.inline import argument, finish, traced

aten, pqcad = torch.ops.aten, torch.ops.pqcad
# Each operator as torch.compile and as torch.export write it; methods by name.
QUANTIZE = {pqcad.quantize, pqcad.quantize.default}
GROUP_NORM = {functional.group_norm, aten.group_norm.default}
SILU = {functional.silu, aten.silu.default}
CAT = {torch.cat, aten.cat.default}
TRANSPOSE = {"transpose", torch.transpose, aten.transpose.int}
UPSAMPLE = {functional.interpolate, aten.upsample_nearest2d.vec}


def fuse_quantize(graph: GraphModule) -> int:
    """Let one kernel read an image, normalise it and write its integers, channels last, in place.

    Works on a graph of torch.compile or of torch.export. An operator whose result something else reads, too, stays
    where it is for that reader. Identities are to be dropped first.

    Returns:
        how many quantizers there are.
    """
    found = 0
    for node in list(graph.graph.nodes):
        if node.target not in QUANTIZE:
            continue
        found += 1
        x, scale, low, segments, bits, channel_dim = node.args
        rank = traced(x).dim()
        transposed = channel_dim in (-1, rank - 1)
        if transposed:
            norm = x.args[0] if x.target in TRANSPOSE and _swaps(x, rank) else None
            if rank != 3 or norm is None or norm.target not in GROUP_NORM:
                continue
            x = norm
        x, upsample = _upsampling(x) if not transposed else (x, 1)
        x, silu = (x.args[0], True) if x.target in SILU else (x, False)
        norm, x = (x, x.args[0]) if x.target in GROUP_NORM else (None, x)
        groups, weight, bias, eps = _norm(norm) if norm is not None else (0, None, None, 0.0)
        inputs = list(x.args[0]) if x.target in CAT and _along_channels(x) and not transposed else [x]
        with graph.graph.inserting_before(node):
            if transposed:
                inputs = [graph.graph.call_method("unsqueeze", (x, -1))]
            grid = (scale, low, segments, bits, upsample)
            fused = graph.graph.call_function(
                pqcad.norm_silu_quantize, (inputs, weight, bias, groups, eps, silu, *grid)
            )
            if transposed:
                fused = graph.graph.call_method("squeeze", (fused, -1))
                fused = graph.graph.call_method("transpose", (fused, 1, 2))
        node.replace_all_uses_with(fused)
        graph.graph.erase_node(node)
    finish(graph)
    return found


def _upsampling(node: Node) -> tuple[Node, int]:
    """What is upsampled, and the factor; 1 where nothing is, or not by a whole factor to the nearest."""
    if node.target not in UPSAMPLE:
        return node, 1
    if node.target is functional.interpolate and argument(node, 3, "mode", "nearest") != "nearest":
        return node, 1
    (small, large) = (traced(n).shape[2:] for n in (node.args[0], node))
    factor = int(large[0]) // int(small[0]) if all(isinstance(n, int) for n in (*small, *large)) else 0
    if factor < 1 or tuple(large) != tuple(factor * n for n in small):
        return node, 1
    return node.args[0], factor


def _norm(node: Node) -> tuple[int, Any, Any, float]:
    return (
        argument(node, 1, "num_groups", 0),
        argument(node, 2, "weight", None),
        argument(node, 3, "bias", None),
        argument(node, 4, "eps", 1e-5),
    )


def _along_channels(node: Node) -> bool:
    rank = traced(node).dim()
    return rank == 4 and argument(node, 1, "dim", 0) in (1, 1 - rank)


def _swaps(node: Node, rank: int) -> bool:
    """Whether a transposition of three dimensions swaps the last two."""
    return rank == 3 and {dim % rank for dim in node.args[1:3]} == {1, 2}
