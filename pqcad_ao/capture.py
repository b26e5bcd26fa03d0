"""A network as an exported graph, with every convolution and linear in it traced back to its module."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from pqcad_ao.sampling import evaluation_mode, in_type, predict, take_rows

GEMMS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding, torch.ops.aten.linear.default)
# Convolutions that have no quantized form here; they are found so that the plan can name them.
OTHER_GEMMS = (
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv3d.default,
    torch.ops.aten.conv_transpose1d.default,
    torch.ops.aten.conv_transpose2d.input,
    torch.ops.aten.conv_transpose3d.input,
)
BATCHED_PRODUCTS = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.matmul.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
)
# diffusers 0.42 branches at a batch of 64 in Upsample2D; one graph holds one branch.
MAX_BATCH = 63


class Denoiser(nn.Module):
    """``f(x_t, timesteps, conditioning) -> prediction`` around a network that may wrap its output."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Any]) -> Tensor:
        return predict(self.unet, x_t, timesteps, conditioning)


@dataclass
class Capture:
    """An exported network.

    Attributes:
        graph: a GraphModule called like :class:`Denoiser`; it shares its parameters with the network.
        x_t, timesteps: the graph's placeholders of the noisy images and of the (B,) timesteps.
    """

    graph: GraphModule
    x_t: Node
    timesteps: Node

    def gemms(self) -> list[Node]:
        return [node for node in self.graph.graph.nodes if node.target in GEMMS]


def weight_fqn(node: Node) -> str | None:
    """The parameter behind a convolution's or linear's weight, by its name in the network; None if it is computed.

    A weight's fake quantizer does not hide it.
    """
    weight = node.args[1]
    if isinstance(weight, Node) and weight.op == "call_module":
        weight = weight.args[0]
    if isinstance(weight, Node) and weight.op == "get_attr":
        return str(weight.target).removeprefix("unet.")
    return None


def layer_fqn(node: Node) -> str | None:
    """The module that holds a convolution's or linear's weight, by its name in the network; None if it is computed."""
    parameter = weight_fqn(node)
    return None if parameter is None else parameter.rpartition(".")[0]


def call_site(node: Node) -> str:
    """The module in whose forward a node is computed, by its name in the network."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0].partition("@")[0] if stack else "unet"  # a module's second call is recorded as name@1
    return "" if path == "unet" else path.removeprefix("unet.")


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a network's inputs belong: device and type of its first floating-point parameter."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return parameter.device, parameter.dtype


def in_own_type(network: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Any]) -> Tensor:
    """A network's prediction for float32 inputs, computed in its own type and given back in float32."""
    _, dtype = placement(network)
    return predict(network, x_t.to(dtype), timesteps, in_type(conditioning, dtype)).float()


def sample_shape(model: nn.Module, given: tuple[int, ...] | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the images a network denoises: as given, or from a diffusers config.

    Raises:
        ValueError: neither is there.
    """
    if given is not None:
        if len(given) != 3:
            raise ValueError(f"sample_shape={tuple(given)}: write (channels, height, width)")
        return tuple(given)
    config = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise ValueError(
            f"{type(model).__name__} does not say what it denoises (no config with in_channels and sample_size): "
            "pass sample_shape=(channels, height, width)"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def check_conditioning(model: nn.Module, conditioning: dict[str, Any] | None) -> dict[str, Any]:
    """The conditioning on the network's device; what a network needs and did not get is an error that names it.

    Args:
        conditioning: keyword arguments of ``model.forward``, tensors with rows to draw from.

    Raises:
        ValueError: missing, empty, or of unequal lengths. TypeError: not a dictionary.
    """
    if not isinstance(conditioning, (dict, type(None))):
        raise TypeError(
            f"conditioning is a {type(conditioning).__name__}: write {{'name of forward's argument': tensor}}"
        )
    conditioning = conditioning or {}
    config = getattr(model, "config", None)
    needed = []
    if getattr(config, "cross_attention_dim", None) is not None and type(model).__name__ == "UNet2DConditionModel":
        needed.append("encoder_hidden_states")
    if getattr(config, "class_embed_type", None) is not None or getattr(config, "num_class_embeds", None) is not None:
        needed.append("class_labels")
    if getattr(config, "addition_embed_type", None) is not None:
        needed.append("added_cond_kwargs")
    for name in needed:
        if conditioning.get(name) is None:
            raise ValueError(
                f"{type(model).__name__} is conditional and conditioning has no {name!r}: pass "
                f"conditioning={{{name!r}: tensor with rows to draw from}}"
            )
    lengths = {leaf.shape[0] if leaf.dim() else 0 for leaf in tree_leaves(conditioning) if isinstance(leaf, Tensor)}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            f"conditioning holds tensors of {sorted(lengths)} rows; give each the same number, at least one"
        )
    device, _ = placement(model)
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, conditioning)


def conditioning_rows(conditioning: dict[str, Any]) -> int:
    """How many samples a (nested) conditioning describes; 1 where it holds no tensor."""
    return next((leaf.shape[0] for leaf in tree_leaves(conditioning) if isinstance(leaf, Tensor)), 1)


def capture(model: nn.Module, shape: tuple[int, int, int], conditioning: dict[str, Any]) -> Capture:
    """Export ``model`` in evaluation mode with a dynamic batch (1 to 63) and one timestep for each sample.

    The model's own training flags are left as they were.

    Raises:
        RuntimeError: torch.export cannot capture it; the cause is chained.
    """
    device, dtype = placement(model)
    x_t = torch.zeros(3, *shape, device=device, dtype=dtype)
    timesteps = torch.tensor([1, 2, 3], device=device)
    example = take_rows(conditioning, torch.arange(3) % conditioning_rows(conditioning))
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    dynamic = tree_map(lambda value: {0: batch} if isinstance(value, Tensor) else None, (x_t, timesteps, example))
    try:
        with evaluation_mode(model), torch.no_grad():
            exported = torch.export.export(Denoiser(model), (x_t, timesteps, example), dynamic_shapes=dynamic)
        graph = exported.module()
    except Exception as error:
        raise RuntimeError(
            f"torch.export cannot capture {type(model).__name__} called as f(x_t {tuple(x_t.shape)}, timesteps (3,), "
            f"{', '.join(conditioning) or 'no conditioning'}): {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    _drop_type_checks(graph)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return Capture(graph, placeholders[0], placeholders[1])


def _drop_type_checks(graph: GraphModule) -> None:
    """Export asserts the types that it saw before every conversion; under autocast they are others, rightly."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.graph.erase_node(node)
    graph.recompile()
