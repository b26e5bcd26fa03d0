"""From a quantized network back to the fake-quantized graph that computes what it does, to learn on."""

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from pqcad_ao.denoiser import cast_floats
from pqcad_ao.graph.capture import capture
from pqcad_ao.learn.ptq import prepare
from pqcad_ao.learn.training import to_learn
from pqcad_ao.nn.state import check_layers, required_state
from pqcad_ao.prepare.observe import activation_quantizers, weight_quantizers


@torch.no_grad()
def unfold(
    model: nn.Module, reference: nn.Module, shape: tuple[int, ...], conditioning: dict[str, Any]
) -> tuple[GraphModule, nn.Module]:
    """Invert :func:`fold`: the fake-quantized graph that computes what a quantized network does, to learn on.

    Args:
        reference: the full-precision network of the same structure. shape: (C, H, W).

    Returns:
        the graph, whose parameters are its own, and the full-precision network that it was captured from.

    Raises:
        ValueError: the network is not quantized, or the reference is of another structure.
    """
    state = required_state(model)
    layers: dict[str, Any] = {row.fqn: model.get_submodule(row.fqn) for row in state.plan.quantized}
    skeleton = to_learn(reference)
    skeleton.load_state_dict(dequantized_state(model, reference))
    captured = capture(skeleton, shape, cast_floats(conditioning))
    graph = prepare(captured, state.plan, state.config, state.timestep.span)
    for fqn, (weights, _) in weight_quantizers(graph).items():
        bits = state.plan[fqn].weight_bits or 0
        weights.move(bits, bits, 1.0)
        weights.scale.copy_(layers[fqn].weight_scale)
    for fqn, activations in activation_quantizers(graph).items():
        bits = state.plan[fqn].activation_bits or 0
        activations.move(bits, bits, 1.0)
        activations.scale.copy_(layers[fqn].input_scale)
        activations.low.copy_(layers[fqn].input_low)
    return graph, skeleton


@torch.no_grad()
def dequantized_state(model: nn.Module, reference: nn.Module) -> dict[str, torch.Tensor]:
    """A quantized network's state as the full-precision network has it, weights dequantized.

    Raises:
        ValueError: the reference's state has other names or shapes, or a quantized layer was replaced.
    """
    state = required_state(model)
    check_layers(model, state)
    layers: dict[str, Any] = {row.fqn: model.get_submodule(row.fqn) for row in state.plan.quantized}
    values = {name: v for name, v in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    for fqn, layer in layers.items():
        values[f"{fqn}.weight"] = layer.dequantized_weight()
        if layer.bias is not None:
            values[f"{fqn}.bias"] = layer.bias
    check_structure(values, reference)
    return values


def check_structure(values: dict[str, torch.Tensor], reference: nn.Module) -> None:
    """Compare a network's full-precision state with another network's, by names and shapes.

    Raises:
        ValueError: they differ; names the first tensor that does.
    """
    own = reference.state_dict()
    wrong = [name for name in sorted(own.keys() | values.keys()) if _shape_of(own, name) != _shape_of(values, name)]
    if wrong:
        raise ValueError(
            f"the reference {type(reference).__name__} is of another structure than the network: {wrong[0]} is "
            f"{_shape_of(own, wrong[0])} there and {_shape_of(values, wrong[0])} here"
        )


def _shape_of(values: dict[str, torch.Tensor], name: str) -> list[int] | None:
    return list(values[name].shape) if name in values else None
