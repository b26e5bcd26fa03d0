"""Weights in parts: each process keeps and learns one, and has the whole while a layer computes, as in ZeRO-3 and FSDP.

PyTorch's ``fully_shard`` gathers before a module's forward, and the graph that learns is one module that owns all
weights; here the fake quantizers gather them, of which one stands before each layer.
"""

import math

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pqcad_ao.prepare.fake_quant import WeightFakeQuantize
from pqcad_ao.prepare.observe import weight_quantizers
from pqcad_ao.utils.processes import part_of, rank_and_world


def shard(graph: GraphModule) -> None:
    """Leave this process's part of each weight that nothing but fake quantizers reads; in place.

    The memory of the whole is given back: the network that the graph was captured from keeps NaN of the same shape.
    """
    if rank_and_world()[1] == 1:
        return
    places = dict(graph.named_parameters(remove_duplicate=False))
    read_elsewhere = {
        places[str(node.target)]
        for node in graph.graph.find_nodes(op="get_attr")
        if str(node.target) in places and not all(_is_quantizer(graph, user) for user in node.users)
    }
    parts: dict[Tensor, nn.Parameter] = {}
    for module, weight in weight_quantizers(graph).values():
        if weight not in read_elsewhere:
            module.form = torch.empty_strided(weight.shape, weight.stride(), device="meta")
            parts.setdefault(weight, nn.Parameter(part_of(weight.detach(), module.form), weight.requires_grad))
    for name, parameter in places.items():
        if parameter in parts:
            owner, _, attribute = name.rpartition(".")
            setattr(graph.get_submodule(owner), attribute, parts[parameter])
    for weight in parts:
        weight.data = weight.new_full((), math.nan).expand(weight.shape)
    for node in list(graph.graph.nodes):  # whole where the layer is, and not from the start
        if _is_quantizer(graph, node):
            next(iter(node.users)).prepend(node)
    graph.recompile()


def _is_quantizer(graph: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), WeightFakeQuantize)
