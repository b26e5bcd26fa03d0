"""The operators that multiply, and the modules behind a node of them."""

import torch
from torch.fx import Node

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
