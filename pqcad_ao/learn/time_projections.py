"""Time projections in closed form: what they are given follows from the timestep, so that no picture is needed."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from pqcad_ao.diffusion.calibration import CalibrationSet
from pqcad_ao.passes.expose import inputs_alone
from pqcad_ao.prepare.fake_quant import quantize
from pqcad_ao.prepare.observe import weight_quantizers, weights_in_full_precision

DAMPING = 0.01  # of the mean of H's diagonal, added to it


@torch.no_grad()
def fit_time_projections(graph: GraphModule, names: Sequence[str], points: CalibrationSet, batch_size: int) -> None:
    """Round the weights of time projections for the timesteps that are walked, and let their biases take the mean.

    With s the input of a projection, Δ = W − Q(W) and H = mean (s − mean s)(s − mean s)ᵀ, rows are rounded column by
    column with the inverse of H (the recursion of GPTQ, Frantar et al. 2023), which lowers Δ H Δᵀ greedily, and kept
    where they beat rounding to the nearest. The bias becomes b + Δ · mean s: the mean error over timesteps is zero.

    Args:
        graph: with the weights' quantizers fitted to their final bits; its parameters are changed in place, to values
            of the grid.
        points: C_QC, whose distinct timesteps count alike; all points where conditioning reaches a projection.
    """
    inputs = _inputs(graph, names, points, batch_size)
    quantizers = weight_quantizers(graph)
    for name, s in zip(names, inputs, strict=True):
        module, weight = quantizers[name]
        mean, W = s.mean(0), module.whole(weight).to(torch.float64, copy=True)
        scale = module.scale.double()[:, None]
        integers = rounded(W, scale, (s - mean).T @ (s - mean) / len(s), module.quant_min, module.quant_max)
        weight.copy_(module.kept(integers * scale))
        try:
            bias = graph.get_parameter(f"unet.{name}.bias")
        except AttributeError:  # a layer without one keeps its mean error
            continue
        bias.add_(((W - module(weight).double()) @ mean).to(bias.dtype))


def rounded(W: Tensor, scale: Tensor, H: Tensor, low: int, high: int) -> Tensor:
    """The integers of W (O, K) on its rows' grids, scale (O, 1), such that Δ H Δᵀ is no more than the nearest ones'."""
    nearest = quantize(W, scale, low, high)
    damped = H + DAMPING * H.diagonal().mean().clamp_min(torch.finfo(H.dtype).tiny) * torch.eye(len(H)).to(H)
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, found = W.clone(), torch.empty_like(W)
    for k in range(W.shape[1]):
        found[:, k] = quantize(left[:, k], scale[:, 0], low, high)
        error = (left[:, k] - found[:, k] * scale[:, 0]) / U[k, k]
        left[:, k:] -= error[:, None] * U[k, k:]

    def lost(integers: Tensor) -> Tensor:
        delta = W - integers * scale
        return ((delta @ H) * delta).sum(1, keepdim=True)

    return torch.where(lost(found) < lost(nearest), found, nearest)


def _inputs(graph: GraphModule, names: Sequence[str], points: CalibrationSet, batch_size: int) -> list[Tensor]:
    """What each projection is given, (n, K) in float64."""
    alone = inputs_alone(graph, names)
    if not _conditioned(alone):
        _, number = points.timesteps.unique(return_inverse=True)
        first = torch.full((int(number.max()) + 1,), len(number), device=number.device)
        first.scatter_reduce_(0, number, torch.arange(len(number), device=number.device), "amin")
        points = points[first]
    with weights_in_full_precision(graph):
        batches = [alone(*batch) for batch in points.batches(batch_size)]
    return [torch.cat(parts).double() for parts in zip(*batches, strict=True)]


def _conditioned(graph: GraphModule) -> bool:
    """Whether anything but the images' number and their timesteps reaches a graph's output."""
    _, _, *others = (node for node in graph.graph.nodes if node.op == "placeholder")
    return any(node.users for node in others)
