"""The torchao PT2E quantizer that writes a plan onto an exported graph as annotations."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import OPERATORS, layer_fqn, quantizable
from pqcad_ao.graph.plan import Plan, PlanRow
from pqcad_ao.prepare.fake_quant import ActivationFakeQuantize, WeightFakeQuantize
from pqcad_ao.prepare.grids import weight_range

ANNOTATION = "quantization_annotation"
SIDES = ("weights", "activations")


class PQCADQuantizer(Quantizer):
    """Annotates the weights, or the inputs, of every layer that the plan quantizes.

    One side at a time: progressive quantization learns with the weights' fake quantizers alone first, and the inputs'
    are inserted into the same graph later.

    Args:
        plan: the resolved plan.
        side: ``"weights"`` or ``"activations"``.
        groups: timestep groups of the activations.
    """

    def __init__(self, plan: Plan, side: str, *, groups: int = 20) -> None:
        if side not in SIDES:
            raise ValueError(f"side={side!r}: allowed are {', '.join(map(repr, SIDES))}")
        self.side, self.groups = side, groups
        self.rows = {row.fqn: row for row in plan.quantized if side == "weights" or row.activation_bits is not None}

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            node.meta.pop(ANNOTATION, None)  # what another side's annotation asked for is in the graph already
            row = self.rows.get(layer_fqn(node) or "") if quantizable(node) is not None else None
            if row is not None:
                # Two layers that read one tensor (a shortcut and its branch) keep a grid each.
                node.meta[ANNOTATION] = QuantizationAnnotation(
                    input_qspec_map=self._specs(node, row), _annotated=True, allow_implicit_sharing=False
                )
        return model

    def _specs(self, node: Node, row: PlanRow) -> dict[Node, QuantizationSpec]:
        arguments = bind(node)
        if self.side == "weights":
            layout, groups = OPERATORS[row.kind].layout, arguments.get("groups", 1)
            channels = len(layout.to_packed(torch.empty(row.shape, device="meta"), groups))
            options = {"bits": row.weight_bits, "channels": channels, "layout": layout, "groups": groups}
            spec = (WeightFakeQuantize.with_args(**options), *weight_range(cast(int, row.weight_bits)))
            return {arguments["weight"]: QuantizationSpec(torch.int8, *spec, torch.per_channel_symmetric)}
        fake_quant = ActivationFakeQuantize.with_args(
            bits=row.activation_bits,
            segments=row.segments,
            groups=self.groups,
            channel_dim=OPERATORS[row.kind].channel_dim,
        )
        return {arguments["input"]: QuantizationSpec(torch.int8, fake_quant, -128, 127, torch.per_tensor_affine)}

    def validate(self, model: GraphModule) -> None:
        """Every layer of the plan must have been found in the graph."""
        missing = self.rows.keys() - {layer_fqn(n) for n in model.graph.nodes if n.meta.get(ANNOTATION) is not None}
        if missing:
            raise ValueError(f"the plan quantizes layers that the graph does not have: {', '.join(sorted(missing))}")


def insert_fake_quantizers(graph: GraphModule, quantizer: Quantizer) -> GraphModule:
    """PT2E's ``prepare``: put fake quantizers where ``quantizer`` annotates; returns the GraphModule to use now."""
    # PT2E would merge a batch norm into the convolution before it, which here stays a module of its own
    _retarget(graph, torch.ops.aten.batch_norm.default, _batch_norm)
    with torch.random.fork_rng(devices=[]):  # PT2E draws example inputs from the global generator
        graph = prepare_qat_pt2e(graph, quantizer)
    _retarget(graph, _batch_norm, torch.ops.aten.batch_norm.default)
    return graph


def _batch_norm(*args: Any) -> Tensor:
    return torch.ops.aten.batch_norm.default(*args)


def _retarget(graph: GraphModule, old: Callable, new: Callable) -> None:
    for node in graph.graph.nodes:
        if node.target is old:
            node.target = new
    graph.recompile()
