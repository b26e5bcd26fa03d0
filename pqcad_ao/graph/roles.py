"""What a layer is in its network, read off the graph: its role, and what was concatenated into its input."""

import torch
from torch.fx import Node

from pqcad_ao.graph.capture import Capture
from pqcad_ao.graph.operators import BATCHED_PRODUCTS, GEMMS, OTHER_GEMMS

aten = torch.ops.aten
# Operators that keep channels apart and in place, through which a skip concatenation reaches its consumers.
CHANNELWISE = {aten.group_norm.default, aten.silu.default, aten.dropout.default, aten.relu.default, aten.gelu.default}
CHANNELWISE |= {aten.mish.default, aten.contiguous.default, aten.clone.default, aten.to.dtype, aten.silu_.default}
RESAMPLING = {aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_nearest2d.default}
RESHAPING = {aten.view.default, aten.transpose.int, aten.reshape.default, aten.permute.default, aten.unsqueeze.default}
RESHAPING |= {aten.contiguous.default, aten.clone.default, aten.to.dtype, aten.dropout.default}


def ancestors(capture: Capture) -> dict[Node, set[Node]]:
    """For each node the placeholders and multiplying layers that it depends on."""
    marks = set(GEMMS) | set(OTHER_GEMMS)
    found: dict[Node, set[Node]] = {}
    for node in capture.graph.graph.nodes:
        above = set().union(*(found[source] for source in node.all_input_nodes)) if node.all_input_nodes else set()
        # a symbolic size hangs on the placeholder's shape, not on its values
        if node.target is aten.sym_size.int:
            above = set()
        found[node] = above | {node} if node.op == "placeholder" or node.target in marks else above
    return found


def _reaches(node: Node, through: set, wanted: tuple, *, forward: bool) -> bool:
    """Whether an operator in ``wanted`` is next to ``node``, passing only operators in ``through``."""
    waiting = list(node.users if forward else node.all_input_nodes)
    while waiting:
        other = waiting.pop()
        if other.target in wanted:
            return True
        if other.target in through:
            waiting += other.users if forward else other.all_input_nodes
    return False


def segments_of(node: Node) -> list[int]:
    """Channels of each tensor that was concatenated into a layer's input, or the one count of channels."""
    source = node.args[0]
    dim = -1 if node.target is aten.linear.default else 1
    channels = source.meta["val"].shape[dim]
    while source.target in CHANNELWISE:
        source = source.args[0]
    if source.target is aten.cat.default and len(source.args) > 1:
        rank = source.meta["val"].dim()
        parts = [part.meta["val"].shape[dim] for part in source.args[0]]
        if source.args[1] % rank == dim % rank and len(parts) > 1 and sum(parts) == channels:
            return [int(part) for part in parts]
    return [int(channels)]


def role_of(node: Node, capture: Capture, above: dict[Node, set[Node]], followed: set[Node]) -> str:
    source = node.args[0]
    gemms = set(GEMMS) | set(OTHER_GEMMS)
    of_input = above[source]
    if capture.x_t not in of_input:
        if len(node.meta["val"].shape) > 2:
            return "attention"  # keys and values of a text: on a sequence, and not on the image
        leads_to_time = any(
            node in above[other] and capture.x_t not in above[other] for other in followed if other is not node
        )
        return "time_embedding" if leads_to_time else "time_projection"
    if not any(other.target in gemms and capture.x_t in above[other] for other in of_input):
        return "stem"
    if not any(node in above[other] and other is not node for other in followed):
        return "head"
    if node.target is aten.linear.default and (
        _reaches(node, RESHAPING, BATCHED_PRODUCTS, forward=True)
        or _reaches(node, RESHAPING, BATCHED_PRODUCTS, forward=False)
    ):
        return "attention"
    shape = capture.graph.get_parameter(node.args[1].target).shape if node.args[1].op == "get_attr" else (0,)
    if node.target in GEMMS and len(shape) == 4:
        stride = node.args[3] if len(node.args) > 3 else [1, 1]
        if max(stride) > 1 or _reaches(node, set(), tuple(RESAMPLING), forward=False):
            return "resample"
        if (
            tuple(shape[2:]) == (1, 1)
            and len(source.users) > 1
            and any(u.target is aten.add.Tensor for u in node.users)
        ):
            return "shortcut"
    return "skip_concat" if len(segments_of(node)) > 1 else "body"
