"""What a layer is in its network, read off the graph: its role, and what was concatenated into its input."""

import torch
from torch.fx import Node

from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.capture import Capture
from pqcad_ao.graph.operators import BATCHED_PRODUCTS, Operator, operator_of

aten = torch.ops.aten
# Operators that keep channels apart and in place, through which a skip concatenation reaches its consumers.
CHANNELWISE = {aten.group_norm.default, aten.silu.default, aten.dropout.default, aten.relu.default, aten.gelu.default}
CHANNELWISE |= {aten.mish.default, aten.contiguous.default, aten.clone.default, aten.to.dtype, aten.silu_.default}
RESAMPLING = {aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_nearest2d.default}


def ancestors(capture: Capture) -> dict[Node, set[Node]]:
    """For each node the placeholders and multiplying layers that it depends on."""
    found: dict[Node, set[Node]] = {}
    for node in capture.graph.graph.nodes:
        above = set().union(*(found[source] for source in node.all_input_nodes)) if node.all_input_nodes else set()
        # a symbolic size hangs on the placeholder's shape, not on its values
        if node.target is aten.sym_size.int:
            above = set()
        found[node] = above | {node} if node.op == "placeholder" or operator_of(node) is not None else above
    return found


def _multiplies_two_activations(node: Node, *, forward: bool) -> bool:
    """Whether what a layer computes, or is given, is a factor, or the result, of a product of two activations.

    Between them is whatever attention does to its heads (norms, rotary embeddings, joining the text's), and no layer.
    """
    waiting, seen = [node], {node}
    while waiting:
        following = waiting.pop()
        for other in following.users if forward else following.all_input_nodes:
            if other.target in BATCHED_PRODUCTS:
                return True
            if other not in seen and operator_of(other) is None:
                seen.add(other)
                waiting.append(other)
    return False


def segments_of(node: Node, row: Operator) -> list[int]:
    """Channels of each tensor that was concatenated into the input of a layer, or the one count of channels."""
    source, dim = bind(node)["input"], row.channel_dim
    channels = source.meta["val"].shape[dim]
    while source.target in CHANNELWISE:
        source = bind(source)["input"]
    if source.target is aten.cat.default:
        arguments, rank = bind(source), source.meta["val"].dim()
        parts = [part.meta["val"].shape[dim] for part in arguments["tensors"]]
        if arguments["dim"] % rank == dim % rank and len(parts) > 1 and sum(parts) == channels:
            return [int(part) for part in parts]
    return [int(channels)]


def role_of(node: Node, row: Operator, capture: Capture, above: dict[Node, set[Node]], followed: set[Node]) -> str:
    """What a layer is to its network, one of ``config.ROLES``."""
    arguments = bind(node)
    source, weight = arguments["input"], arguments["weight"]
    of_input = above[source]
    if capture.x_t not in of_input:
        if len(node.meta["val"].shape) > 2:
            return "attention"  # keys and values of a text: on a sequence, and not on the image
        leads_to_time = any(
            node in above[other] and capture.x_t not in above[other] and other.meta["val"].dim() == 2
            for other in followed
            if other is not node
        )
        return "time_embedding" if leads_to_time else "time_projection"
    if not any(other.op != "placeholder" and capture.x_t in above[other] for other in of_input):
        return "stem"
    if not any(node in above[other] and other is not node for other in followed):
        return "head"
    concatenated = len(segments_of(node, row)) > 1
    if row.quantized is None:
        return "skip_concat" if concatenated else "body"
    if row.spatial < 2 and any(_multiplies_two_activations(node, forward=way) for way in (True, False)):
        return "attention"  # of a sequence; an image's layers have other roles
    if row.spatial > 0 and weight.op == "get_attr":
        if max(arguments["stride"]) > 1 or source.target in RESAMPLING:
            return "resample"
        kernel_size = capture.graph.get_parameter(weight.target).shape[2:]
        added = any(user.target is aten.add.Tensor for user in node.users)
        if max(kernel_size) == 1 and len(source.users) > 1 and added:
            return "shortcut"
    return "skip_concat" if concatenated else "body"
