"""A network captured for one batch size: the graphs that a .pte's methods are made of."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from pqcad_ao import denoiser
from pqcad_ao.cached_unet import cut_at
from pqcad_ao.denoiser import Denoiser
from pqcad_ao.diffusion.cache_plan import CachePlan
from pqcad_ao.edge.sampler import tensors_of
from pqcad_ao.utils.tracing import one_at_a_time


@dataclass(frozen=True)
class Captured:
    """A network at one batch size.

    Attributes:
        graph: of the whole network. parts: it, or both programs that a cache plan cuts it into, by what their methods'
            names end in: "" and "_cached".
        inputs: that it was captured with, x_t (B, C, H, W), timesteps (B,) and the conditioning's tensors.
        names: of these tensors, as ``keystr`` writes them.
    """

    graph: GraphModule
    parts: dict[str, GraphModule]
    inputs: tuple[Any, ...]
    names: list[str]


def image_shape(unet: nn.Module, given: tuple[int, ...] | None) -> tuple[int, ...]:
    """(C, H, W). Raises ValueError: what the network denoises are no images."""
    shape = denoiser.sample_shape(unet, given)
    if len(shape) != 3:
        raise ValueError(
            f"sample_shape={shape}: a .pte draws images, write (channels, height, width); packed tokens take "
            'torch.compile(network, backend="pqcad")'
        )
    return shape


def as_function(
    unet: nn.Module, shape: tuple[int, ...], batch_size: int, conditioning: dict[str, Any], continuous: bool = False
) -> tuple[Denoiser, tuple[Any, ...], list[str]]:
    """The network as a function of tensors, inputs to export it with, and its conditioning's names."""
    tensors, rebuild = tensors_of(conditioning)
    tensors = {name: value[torch.arange(batch_size) % len(value)] for name, value in tensors.items()}
    timesteps = torch.ones(batch_size, dtype=torch.float32 if continuous else torch.int64)
    inputs = (torch.zeros(batch_size, *shape), timesteps, tuple(tensors.values()))
    return Denoiser(unet, rebuild), inputs, list(tensors)


@one_at_a_time
def capture_at(
    unet: nn.Module,
    shape: tuple[int, ...],
    batch_size: int,
    conditioning: dict[str, Any],
    continuous: bool,
    cached: CachePlan | None,
) -> Captured:
    """The network's graphs for one batch size.

    Raises:
        RuntimeError: torch.export cannot capture it; the cause is chained.
    """
    function, inputs, names = as_function(unet, shape, batch_size, conditioning, continuous)
    try:
        graph = torch.export.export(function, inputs).module(check_guards=False)
    except Exception as error:
        raise RuntimeError(
            f"torch.export cannot capture {type(unet).__name__} called as f(x_t {tuple(inputs[0].shape)}, timesteps "
            f"({batch_size},), {', '.join(names) or 'no conditioning'}): {str(error).splitlines()[0]}"
        ) from error
    if cached is None:
        return Captured(graph, {"": graph}, inputs, names)
    cut = cut_at(graph, cached)
    return Captured(graph, {"": cut.full, "_cached": cut.shallow}, inputs, names)
