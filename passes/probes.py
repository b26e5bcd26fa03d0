"""Probes on layers' outputs, which tell each sample's own gradient apart after one backward of a batch."""

import copy

from torch import Tensor, nn
from torch.fx import GraphModule

from pqcad_ao.graph.operators import quantizable

# A bias of attention's keys changes nothing, and rounding alone keeps its gradient from zero: of the root sum of
# squares of what is summed to it up to 6e-7 is left, under bfloat16 autocast 0.005. Other layers of the embedded
# teacher have from 0.9.
CANCELLED = 1 / 32


class Probe(nn.Module):
    """Lets a layer's output pass as it is, and keeps each sample's gradient by the layer's bias, (B, C) in float32.

    A network without operations across the batch, as diffusion UNets are, mixes no samples: the gradient by a sample's
    own output, summed over its pixels, is the gradient by the bias of that sample's share of the loss. Several calls
    before one backward, as under guidance, add up.
    """

    def __init__(self, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.gradient: Tensor | None = None
        self.power: Tensor | float = 0.0  # of all that was summed to it, over the batch

    def forward(self, y: Tensor) -> Tensor:
        if y.requires_grad:
            y.register_hook(self._keep)
        return y

    def _keep(self, gradient: Tensor) -> None:
        others = [dim for dim in range(1, gradient.dim()) if dim != self.channel_dim % gradient.dim()]
        found = gradient.detach().float()
        self.power = self.power + found.square().sum()
        found = found.sum(others) if others else found
        self.gradient = found if self.gradient is None else self.gradient + found

    def take(self) -> Tensor | None:
        """What was kept since this was asked last; zero where a whole batch's sums to no more than rounding leaves."""
        gradient, power = self.gradient, self.power
        self.gradient, self.power = None, 0.0
        if gradient is None:
            return None
        cancelled = gradient.square().sum() <= CANCELLED**2 * power
        return gradient * ~cancelled  # and NaN stays what it is


def insert_probes(graph: GraphModule) -> GraphModule:
    """A graph that computes the same bits, with a :class:`Probe` behind each layer of the table of operators.

    Modules and parameters are shared with ``graph``, which stays as it is.
    """
    probed = GraphModule(graph, copy.deepcopy(graph.graph))
    layers = [(node, row) for node in probed.graph.nodes if (row := quantizable(node)) is not None]
    for number, (node, row) in enumerate(layers):
        probed.add_module(f"probe_{number}", Probe(row.channel_dim))
        with probed.graph.inserting_after(node):
            probe = probed.graph.call_module(f"probe_{number}", (node,))
        node.replace_all_uses_with(probe, lambda user, probe=probe: user is not probe)
        probe.meta = dict(node.meta)
    probed.graph.lint()
    probed.recompile()
    return probed


def take_gradients(graph: nn.Module) -> list[Tensor]:
    """What the probes of a graph kept since they were asked last, layer by layer, of those that had a gradient."""
    found = [module.take() for module in graph.modules() if isinstance(module, Probe)]
    return [gradient for gradient in found if gradient is not None]
