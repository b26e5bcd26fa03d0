"""A network as an exported graph, called as f(x_t, timesteps, conditioning)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from pqcad_ao.config import MAX_BATCH
from pqcad_ao.denoiser import Denoiser, conditioning_rows, evaluation_mode, placement, take_rows, unguided, with_rows
from pqcad_ao.utils.tracing import one_at_a_time


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


@one_at_a_time
def capture(
    model: nn.Module, shape: tuple[int, ...], conditioning: dict[str, Any], *, continuous: bool = False
) -> Capture:
    """Export ``model`` in evaluation mode with a dynamic batch (1 to 63) and one timestep for each sample.

    The model's own training flags are left as they were.

    Args:
        continuous: timesteps are float32, and not int64.

    Raises:
        RuntimeError: torch.export cannot capture it; the cause is chained.
    """
    device, dtype = placement(model)
    x_t = torch.zeros(3, *shape, device=device, dtype=dtype)
    timesteps = torch.tensor([1, 2, 3], dtype=torch.float32 if continuous else torch.int64, device=device)
    conditioning = unguided(conditioning)  # a network's own call; guidance combines two
    example = take_rows(conditioning, torch.arange(3) % conditioning_rows(conditioning))
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    rows = tree_map(lambda value: {0: batch} if isinstance(value, Tensor) else None, with_rows(example))
    dynamic = ({0: batch}, {0: batch}, ({name: rows.get(name) for name in example},))
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
