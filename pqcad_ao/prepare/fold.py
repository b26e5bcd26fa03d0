"""From a prepared graph back into the network: modules that compute what its fake-quantized layers compute."""

import torch
from torch import nn
from torch.fx import GraphModule

from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import layer_fqn, quantizable, weight_fqn
from pqcad_ao.graph.plan import Plan
from pqcad_ao.nn.layers import QuantizedLayer, quantized_class
from pqcad_ao.nn.timestep import Timestep
from pqcad_ao.prepare.fake_quant import quantize


@torch.no_grad()
def fold(prepared: GraphModule, model: nn.Module, resolved: Plan, timestep: Timestep) -> dict[str, QuantizedLayer]:
    """Make the modules that compute what the prepared graph's fake-quantized layers compute, by layer name."""
    modules = dict(prepared.named_modules())
    layers: dict[str, QuantizedLayer] = {}
    for node in prepared.graph.nodes:
        operator = quantizable(node)
        arguments = bind(node) if operator is not None else {}
        if operator is None or arguments["weight"].op != "call_module":
            continue
        fqn = layer_fqn(node) or ""
        row, original = resolved[fqn], model.get_submodule(fqn)
        weights = modules[str(arguments["weight"].target)]
        form = quantized_class(operator)
        layer = form.like(original, row.weight_bits, row.activation_bits, row.segments, timestep)
        layer.to(original.weight.device)
        weight = weights.whole(prepared.get_parameter(f"unet.{weight_fqn(node)}")).detach().float()
        rows = operator.layout.rows(weight, arguments.get("groups", 1))
        integers = quantize(rows, weights.scale[:, None], weights.quant_min, weights.quant_max)
        bias = None if original.bias is None else prepared.get_parameter(f"unet.{fqn}.bias")
        layer.set_weight(integers, weights.scale, bias)
        if row.activation_bits is not None:
            activations = modules[str(arguments["input"].target)]
            layer.set_grid(activations.scale, activations.low)
        layers[fqn] = layer.train(original.training)
    missing = {row.fqn for row in resolved.quantized} - layers.keys()
    if missing:
        raise RuntimeError(f"the prepared graph lost layers of the plan: {', '.join(sorted(missing))}")
    return layers


@torch.no_grad()
def adopt(model: nn.Module, learned: GraphModule | None, layers: dict[str, QuantizedLayer]) -> None:
    """Put the quantized layers into the network, and what else a graph learned into its parameters."""
    for fqn, layer in layers.items():
        model.set_submodule(fqn, layer)
    values = {} if learned is None else dict(learned.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():  # norms; what the forward never reads is not in the graph
        if f"unet.{name}" in values:
            parameter.copy_(values[f"unet.{name}"])
