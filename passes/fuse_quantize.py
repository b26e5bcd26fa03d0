"""Fuse what stands in front of a quantizer into it: concatenation, GroupNorm, SiLU, nearest upsampling."""

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional

import pqcad_ao.ops  # noqa: F401  (registers the operators)
from pqcad_ao.graph.arguments import bind
from pqcad_ao.passes.inline import Order, finish, traced

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
    where it is for that reader. Quantizers of one input to one grid, such as attention's three projections have where
    nothing was learned, become one. Identities are to be dropped first.

    Returns:
        how many quantizers there are.
    """
    found, nodes = 0, Order(graph)
    _share(graph, nodes)
    for node in list(graph.graph.nodes):
        if node.target not in QUANTIZE:
            continue
        found += 1
        arguments = bind(node)
        channel_dim, rank = arguments["channel_dim"], traced(arguments["input"]).dim()
        if rank == 4 and channel_dim == 1:
            _fuse_image(graph, node, nodes)
        elif rank == 3 and channel_dim in (-1, 2):
            _fuse_tokens(graph, node, nodes)
    finish(graph)
    return found


def _share(graph: GraphModule, nodes: Order) -> None:
    """Let whoever reads a repetition of a quantizer, or of a SiLU such as the time projections', read the first."""
    known: dict[Any, Node] = {}
    for node in list(graph.graph.nodes):
        if node.target not in QUANTIZE | SILU:
            continue
        arguments = tuple(tuple(value) if isinstance(value, list) else value for value in bind(node).values())
        first = known.setdefault((node.target, arguments), node)
        if first is not node and nodes.calm(first, node):
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)


def _fuse_image(graph: GraphModule, node: Node, nodes: Order) -> None:
    """quantize(upsample(silu(norm(cat(...))))), or as much of it as there is."""
    x = _input(node)

    def is_one(x: Node, targets: set) -> bool:
        return x.target in targets and nodes.calm(x, node)

    upsample = _upsampling(x) if is_one(x, UPSAMPLE) else 1
    x = _input(x) if upsample > 1 else x
    silu = is_one(x, SILU)
    x = _input(x) if silu else x
    norm = x if is_one(x, GROUP_NORM) else None
    x = x if norm is None else _input(x)
    inputs = list(bind(x)["tensors"]) if is_one(x, CAT) and _along_channels(x) else [x]
    with graph.graph.inserting_before(node):
        options = (*_norm(norm), silu, *_grid(node), upsample)
        fused = graph.graph.call_function(pqcad.norm_silu_quantize, (inputs, *options))
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    graph.graph.erase_node(node)


def _fuse_tokens(graph: GraphModule, node: Node, nodes: Order) -> None:
    """quantize(norm(...).transpose(1, 2)), the input of attention's projections; (B, C, L) is an image (B, C, L, 1)."""
    turned = _input(node)
    norm = _input(turned) if turned.target in TRANSPOSE and _swaps(turned) else None
    if norm is None or norm.target not in GROUP_NORM or not nodes.calm(norm, node):
        return
    with graph.graph.inserting_before(node):
        image = graph.graph.call_method("unsqueeze", (_input(norm), -1))
        options = (*_norm(norm), False, *_grid(node), 1)
        fused = graph.graph.call_function(pqcad.norm_silu_quantize, ([image], *options))
        fused = graph.graph.call_method("squeeze", (fused, -1))
        fused = graph.graph.call_method("transpose", (fused, 1, 2))
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    graph.graph.erase_node(node)


def _input(node: Node) -> Node:
    return bind(node)["input"]


def _grid(node: Node) -> tuple[Any, ...]:
    """Scale, lowest integers, segments and bits of a quantizer."""
    arguments = bind(node)
    return tuple(arguments[name] for name in ("scale", "low", "segments", "bits"))


def _upsampling(node: Node) -> int:
    """By what whole factor a node upsamples to the nearest; 1 where it does something else."""
    if bind(node).get("mode", "nearest") != "nearest":
        return 1
    (small, large) = (traced(n).shape[2:] for n in (_input(node), node))
    factor = int(large[0]) // int(small[0]) if all(isinstance(n, int) for n in (*small, *large)) else 0
    return factor if factor > 1 and tuple(large) == tuple(factor * n for n in small) else 1


def _norm(node: Node | None) -> tuple[Any, Any, int, float]:
    """Weight, bias, groups and eps of a GroupNorm; no groups where there is none."""
    if node is None:
        return None, None, 0, 0.0
    arguments = bind(node)
    return tuple(arguments[name] for name in ("weight", "bias", "num_groups", "eps"))


def _along_channels(node: Node) -> bool:
    rank = traced(node).dim()
    return rank == 4 and bind(node)["dim"] in (1, 1 - rank)


def _swaps(node: Node) -> bool:
    """Whether a transposition of three dimensions swaps the last two."""
    arguments = bind(node)
    return {arguments["dim0"] % 3, arguments["dim1"] % 3} == {1, 2}
