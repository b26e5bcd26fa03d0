"""How much each layer's quantization alone moves the network, and more bits for the layers that move it most."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from pqcad_ao.config import PQCADConfig
from pqcad_ao.denoiser import Span
from pqcad_ao.diffusion.calibration import CalibrationSet, to_observe
from pqcad_ao.graph.capture import Capture
from pqcad_ao.graph.plan import Plan, PlanRow
from pqcad_ao.learn.ptq import prepare
from pqcad_ao.prepare.observe import activation_quantizers, observe, weight_quantizers, weights_in_full_precision
from pqcad_ao.utils.processes import of_all, rank_and_world
from pqcad_ao.utils.progress import tqdm

RUNGS = (6, 8)  # widths that a layer may be raised to
POINTS = 16  # of the calibration set, behind each sensitivity


def perturbation_loss(
    prediction: Tensor, reference: Tensor, omega: Tensor | None = None, whole: Tensor | None = None
) -> Tensor:
    """Mean squared difference over the reference's power; 0 for a perfect copy, 1 for a network that is silent.

    Args:
        omega: (B,) weights of the samples' differences; the power is never weighted.
        whole: the reference of a whole batch, of whose equal parts one is given: the mean of their losses is its loss.
    """
    errors = (prediction.float() - reference.float()).square()
    if omega is not None:
        errors = errors * omega.view(-1, *[1] * (errors.dim() - 1))
    return errors.mean() / (reference if whole is None else whole).float().square().mean()


def raised(row: PlanRow, bits: int) -> PlanRow:
    """The row with ``bits``-bit weights, and activations that are no narrower."""
    activation_bits = None if row.activation_bits is None else max(row.activation_bits, bits)
    return replace(row, weight_bits=bits, activation_bits=activation_bits)


@torch.no_grad()
def layer_sensitivity(
    graph: GraphModule,
    resolved: Plan,
    points: CalibrationSet,
    *,
    rungs: bool,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = False,
) -> dict[str, dict[int, float]]:
    """The perturbation loss when one layer alone is quantized, weights and input: for each layer, by weight bits.

    Of several processes each measures some of the layers, and all get all.

    Args:
        graph: prepared on both sides, whose activation quantizers have observed the calibration set.
        rungs: measure the widths that the layer may be raised to as well, not only the plan's own.
        callback: called as ``callback("sensitivity", done, total)``, total being this process's layers.
        progress: show a bar.
    """
    count = min(POINTS, len(points))
    batch = next(points.batches(count))
    weights, activations = weight_quantizers(graph), activation_quantizers(graph)
    quantizers = [module for module, _ in weights.values()] + list(activations.values())
    for module in quantizers:
        module.disable_fake_quant()
    reference = graph(*batch)
    losses: dict[str, dict[int, float]] = {}
    rank, world = rank_and_world()
    layers = resolved.quantized[rank::world]
    for done, row in enumerate(tqdm(layers, desc="sensitivity", disable=not progress, leave=False), start=1):
        losses[row.fqn] = {}
        planned = row.weight_bits or 0
        for bits in [planned, *(rung for rung in RUNGS if rungs and rung > planned)]:
            tried = raised(row, bits) if bits != planned else row
            module, weight = weights[row.fqn]
            module.fit(weight, bits)
            module.enable_fake_quant()
            if tried.activation_bits is not None:
                activations[row.fqn].fit(tried.activation_bits)
                activations[row.fqn].enable_fake_quant()
            losses[row.fqn][bits] = perturbation_loss(graph(*batch), reference).item()
            for used in (module, activations.get(row.fqn)):
                if used is not None:
                    used.disable_fake_quant()
        if callback is not None:
            callback("sensitivity", done, len(layers))
    for module in quantizers:
        module.enable_fake_quant()
    measured = {fqn: found for part in of_all(losses) for fqn, found in part.items()}
    return {row.fqn: measured[row.fqn] for row in resolved.quantized}


def spare_bits(resolved: Plan, target_bits: float) -> float:
    """How many bits the quantized layers' weights may grow by, all together.

    Raises:
        ValueError: the plan is above ``target_bits`` already.
    """
    spare = (target_bits - resolved.average_bits) * sum(row.parameters for row in resolved.quantized)
    if spare < 0:
        raise ValueError(
            f"target_bits={target_bits:g}: the plan takes {resolved.average_bits:.3f} bits on average already; "
            "give more, or lower weight_bits or an override"
        )
    return spare


def spend_bits(resolved: Plan, sensitivity: dict[str, dict[int, float]], target_bits: float | None) -> Plan:
    """Write the sensitivities into the plan; raise layers where a stored bit buys most until the average is reached.

    Layers that the user gave bits to, and those at 8 bits, stay as they are.

    Raises: as :func:`spare_bits`.
    """
    rows = {row.fqn: replace(row, sensitivity=sensitivity[row.fqn][row.weight_bits or 0]) for row in resolved.quantized}
    if target_bits is not None:
        spare = spare_bits(resolved, target_bits)
        while True:
            best, gain = None, 0.0
            for fqn, losses in sensitivity.items():
                row = rows[fqn]
                if row.reason.startswith("overrides["):
                    continue
                width = row.weight_bits or 0
                for bits in (b for b in losses if b > width):
                    cost = (bits - width) * row.parameters
                    worth = (losses[width] - losses[bits]) / cost
                    if cost <= spare and worth > gain:
                        best, gain = (fqn, bits, cost), worth
            if best is None:
                break
            fqn, bits, cost = best
            spare -= cost
            before = resolved[fqn]
            note = f"{before.reason}; raised from W{before.weight_bits}A{before.activation_bits or ' float'}: sensitive"
            rows[fqn] = replace(raised(rows[fqn], bits), reason=note)
    return Plan([rows[row.fqn] if row.quantized else row for row in resolved.rows])


def sensitive(
    captured: Capture,
    resolved: Plan,
    points: CalibrationSet,
    config: PQCADConfig,
    span: Span,
    *,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = True,
) -> Plan:
    """The plan with each layer's sensitivity, and more bits where ``config.target_bits`` allows them."""
    trial = Capture(copy.deepcopy(captured.graph), captured.x_t, captured.timesteps)
    graph = prepare(trial, resolved, config, span)
    head = points[: config.calibration_points]
    with weights_in_full_precision(graph):
        observe(graph, to_observe(points, config, span), config.calibration_batch_size)
    losses = layer_sensitivity(
        graph, resolved, head, rungs=config.target_bits is not None, callback=callback, progress=progress
    )
    return spend_bits(resolved, losses, config.target_bits)
