"""Layers that keep no weight for the way back: it is gathered and quantized again there."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import quantizable
from pqcad_ao.prepare.fake_quant import WeightFakeQuantize


class Recomputed(nn.Module):
    """A layer with its weight's fake quantizer.

    What autograd would keep of the weight, gathered, quantized and cast, is worked out anew in the backward, up to the
    layer's operator, which is not computed again: torch ends a recomputation where all is there that was kept.
    """

    def __init__(self, quantizer: WeightFakeQuantize, operator: Callable[..., Tensor], position: int) -> None:
        super().__init__()
        self.quantizer, self.operator, self.position = quantizer, operator, position

    def forward(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def layer(weight: Tensor, *args: Any) -> Tensor:
            return self.operator(*args[: self.position], self.quantizer(weight), *args[self.position :], **kwargs)

        return checkpoint(layer, weight, *args, use_reentrant=False, preserve_rng_state=False)


def recompute_weights(graph: GraphModule) -> GraphModule:
    """A graph that computes the same bits, in which the layers are :class:`Recomputed` whose weights are in parts.

    Modules and parameters are shared with ``graph``, which stays as it is.
    """
    recomputed, modules = GraphModule(graph, copy.deepcopy(graph.graph)), dict(graph.named_modules())
    for number, node in enumerate([node for node in recomputed.graph.nodes if quantizable(node) is not None]):
        weight = bind(node)["weight"]
        quantizer = modules.get(str(weight.target)) if weight.op == "call_module" else None
        if not isinstance(quantizer, WeightFakeQuantize) or quantizer.form is None:
            continue
        position = node.args.index(weight)
        recomputed.add_module(f"recomputed_{number}", Recomputed(quantizer, node.target, position))
        others = (*node.args[:position], *node.args[position + 1 :])
        with recomputed.graph.inserting_before(node):
            layer = recomputed.graph.call_module(f"recomputed_{number}", (weight.args[0], *others), node.kwargs)
        layer.meta = dict(node.meta)
        node.replace_all_uses_with(layer)
        recomputed.graph.erase_node(node)
        recomputed.graph.erase_node(weight)
    recomputed.graph.lint()
    recomputed.recompile()
    return recomputed
