"""Quantization without learning: every grid of a prepared graph fitted by least squares."""

from collections.abc import Callable

from torch.fx import GraphModule

from pqcad_ao.config import PQCADConfig
from pqcad_ao.denoiser import Span
from pqcad_ao.diffusion.calibration import CalibrationSet
from pqcad_ao.graph.capture import Capture
from pqcad_ao.graph.plan import Plan
from pqcad_ao.passes.insert_activations import insert_activations
from pqcad_ao.prepare.annotate import PQCADQuantizer, insert_fake_quantizers
from pqcad_ao.prepare.observe import fit_activations, fit_weights, observe, weights_in_full_precision


def prepare(captured: Capture, resolved: Plan, config: PQCADConfig, span: Span) -> GraphModule:
    """Put the plan's fake quantizers into the captured graph, with the timestep wired to the activations'."""
    graph = insert_fake_quantizers(captured.graph, PQCADQuantizer(resolved, "weights"))
    quantizer = PQCADQuantizer(resolved, "activations", groups=config.timestep_groups)
    return insert_activations(graph, quantizer, span)


def calibrate(
    prepared: GraphModule,
    resolved: Plan,
    points: CalibrationSet,
    config: PQCADConfig,
    *,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = True,
) -> None:
    """Call a prepared graph at each of the points, in full precision, and fit every grid as :func:`fit_grids`."""
    with weights_in_full_precision(prepared):
        observe(prepared, points, config.calibration_batch_size, callback=callback, progress=progress)
    fit_grids(prepared, resolved, callback=callback, progress=progress)


def fit_grids(
    prepared: GraphModule,
    resolved: Plan,
    *,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = True,
) -> None:
    """Fit every grid of a prepared graph by least squares: weights to themselves, activations to what was observed.

    Raises:
        FloatingPointError: NaN or infinite activations; names the layer.
    """
    fit_weights(prepared, {row.fqn: row.weight_bits or 0 for row in resolved.quantized})
    bits = {row.fqn: row.activation_bits for row in resolved.quantized if row.activation_bits is not None}
    fit_activations(prepared, bits, callback=callback, progress=progress)
