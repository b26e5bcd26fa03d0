"""The torchao PT2E quantizer that writes a plan onto an exported graph as annotations."""

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from pqcad_ao.capture import GEMMS, weight_fqn
from pqcad_ao.fake_quant import ActivationFakeQuantize, WeightFakeQuantize
from pqcad_ao.plan import Plan, PlanRow

ANNOTATION = "quantization_annotation"


class PQCADQuantizer(Quantizer):
    """Annotates the weight and the input of every layer that the plan quantizes.

    Args:
        plan: the resolved plan.
        groups: timestep groups of the activations.
        seed: of the activations' observers.
    """

    def __init__(self, plan: Plan, *, groups: int = 20, seed: int = 0) -> None:
        self.rows = {row.fqn: row for row in plan.quantized}
        self.groups, self.seed = groups, seed

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target not in GEMMS:
                continue
            fqn = (weight_fqn(node) or "").rpartition(".")[0]
            row = self.rows.get(fqn)
            if row is None:
                continue
            specs = {node.args[1]: _weight_spec(row)}
            if row.activation_bits is not None:
                specs[node.args[0]] = self._activation_spec(row)
            # Two layers that read one tensor (a shortcut and its branch) keep a scale each.
            node.meta[ANNOTATION] = QuantizationAnnotation(
                input_qspec_map=specs, _annotated=True, allow_implicit_sharing=False
            )
        return model

    def _activation_spec(self, row: PlanRow) -> QuantizationSpec:
        fake_quant = ActivationFakeQuantize.with_args(
            bits=row.activation_bits,
            segments=row.segments,
            groups=self.groups,
            channel_dim=-1 if row.kind == "linear" else 1,
            seed=self.seed,
        )
        return QuantizationSpec(torch.int8, fake_quant, -128, 127, torch.per_tensor_affine)

    def validate(self, model: GraphModule) -> None:
        """Every layer of the plan must have been found in the graph."""
        found = {
            (weight_fqn(node) or "").rpartition(".")[0]
            for node in model.graph.nodes
            if node.meta.get(ANNOTATION) is not None
        }
        missing = self.rows.keys() - found
        if missing:
            raise ValueError(f"the plan quantizes layers that the graph does not have: {', '.join(sorted(missing))}")


def _weight_spec(row: PlanRow) -> QuantizationSpec:
    fake_quant = WeightFakeQuantize.with_args(bits=row.weight_bits, channels=row.shape[0])
    low, high = -(2 ** (row.weight_bits - 1)), 2 ** (row.weight_bits - 1) - 1
    return QuantizationSpec(torch.int8, fake_quant, low, high, torch.per_channel_symmetric)
