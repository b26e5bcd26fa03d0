"""Put a sampler's step behind a network's prediction, and let its steps be named by index or by timestep."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from pqcad_ao.diffusion.correction import CorrectionTable
from pqcad_ao.diffusion.noise import Sampler, process_of
from pqcad_ao.diffusion.schedule import signal_and_noise
from pqcad_ao.passes.inline import buffer, finish, inline

aten = torch.ops.aten
# Columns of the table: x_0 and ε as sums of x_t and the prediction, and x_{t-1} as a sum of x_0 and ε.
COLUMNS = 6


def step_table(scheduler: Sampler, steps: int) -> Tensor:
    """(S, 6) float32 factors of a deterministic DDIM step (Song et al. 2021, eq. 12 with σ = 0), or of a flow's.

    x_0 = f0·x_t + f1·p, ε = f2·x_t + f3·p and x_{t-1} = f4·x_0 + f5·ε, p the network's prediction.

    Raises:
        ValueError: the scheduler thresholds x_0 by its own quantile, which is no sum of this kind.
    """
    if scheduler.config.get("thresholding"):
        raise ValueError("the scheduler thresholds x_0 dynamically: set thresholding=False, or clip_sample=True")
    (alpha, next_alpha), (sigma, next_sigma) = signal_and_noise(scheduler, steps)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    factors = {
        "epsilon": [1 / alpha, -sigma / alpha, zero, one],
        "v_prediction": [alpha, -sigma, sigma, alpha],
        "sample": [zero, one, 1 / sigma, -alpha / sigma],
        "flow": [one, -sigma, one, alpha],
    }[process_of(scheduler).prediction_type]
    return torch.stack([*factors, next_alpha, next_sigma], 1).float()


def add_sampling_step(
    graph: GraphModule, timesteps: Tensor, table: Tensor, clip: float | None, correction: CorrectionTable | None = None
) -> GraphModule:
    """Let a folded network return ``(x_{t-1}, prediction)``, in place, and behind these what else it returned.

    Args:
        graph: as :func:`fold_timesteps` leaves it, ``f(x_t, step, ...) -> prediction``. It gets one more input after
            ``step``: ``timestep``, a (1,) value of ``timesteps``; the step taken is ``step`` plus that timestep's
            index, which is len(timesteps), and thus refused by the look-up, where it is none of them. All inputs, and
            all outputs, are passed as they come, not in containers.
        table: as :func:`step_table` writes it. clip: x_0 is clamped to ±clip; None: it is not.
        correction: of the prediction that the step takes, or of x_{t-1}; the prediction that is returned is as it was.

    Returns:
        the same GraphModule.
    """
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    x_t, step = nodes[:2]
    with graph.graph.inserting_after(step):
        timestep = graph.graph.placeholder("timestep")
    timestep.meta["val"] = torch.empty(1, dtype=timesteps.dtype, device="meta")
    first = [node for node in graph.graph.nodes if node.op == "placeholder"][-1].next
    known = buffer(graph, first, "timesteps", timesteps)
    places = buffer(graph, first, "places", torch.arange(len(timesteps)) - len(timesteps))
    with graph.graph.inserting_before(first):
        is_it = graph.graph.call_function(aten._to_copy.default, (_call(graph, aten.eq.Tensor, known, timestep),))
        is_it.kwargs = {"dtype": torch.int64}
        index = _call(graph, aten.sum.dim_IntList, _call(graph, aten.mul.Tensor, is_it, places), [0], True)
        index = _call(graph, aten.add.Scalar, index, len(timesteps))
        chosen = _call(graph, aten.add.Tensor, step, index)
    step.replace_all_uses_with(chosen, lambda user: user is not chosen)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    values = output.args[0]
    prediction, *more = values if isinstance(values, (tuple, list)) else [values]
    factors = buffer(graph, output, "sampler", table.view(len(timesteps), COLUMNS, 1, 1))
    with graph.graph.inserting_before(output):
        stand_in = _call(graph, aten.add.Tensor, x_t, prediction)
        output.args = ((stand_in, prediction, *more),)
    if correction is None:
        inline(graph, stand_in, _take_step, x_t, prediction, factors, chosen, clip)
    else:
        filters = buffer(graph, stand_in, "filters", correction.filters.contiguous())
        bias = buffer(graph, stand_in, "filters_bias", correction.bias[:, :, None, None].contiguous())
        size, after = correction.filters.shape[1:], correction.where == "sample"
        inline(graph, stand_in, _corrected_step, x_t, prediction, factors, chosen, clip, filters, bias, size, after)
    graph.graph.set_codegen(CodeGen())  # export's own knows the inputs and outputs that there were
    return finish(graph)


def _call(graph: GraphModule, target, *args) -> Node:
    return graph.graph.call_function(target, args)


def _corrected_step(x_t, prediction, table, index, clip, filters, bias, size, after):
    if after:
        return _filtered(_take_step(x_t, prediction, table, index, clip), filters, bias, index, size)
    return _take_step(x_t, _filtered(prediction, filters, bias, index, size), table, index, clip)


def _filtered(value, filters, bias, index, size):
    channels, width, _ = size
    kernel = aten.view.default(aten.index_select.default(filters, 0, index), [channels, 1, width, width])
    padded = aten.replication_pad2d.default(value, [width // 2] * 4) if width > 1 else value
    return aten.conv2d.default(padded, kernel, None, [1, 1], [0, 0], [1, 1], channels) + aten.index_select.default(
        bias, 0, index
    )


def _take_step(x_t, prediction, table, index, clip):
    row = aten.index_select.default(table, 0, index)
    f = [aten.slice.Tensor(row, 1, column, column + 1) for column in range(COLUMNS)]
    x_0 = f[0] * x_t + f[1] * prediction
    if clip is not None:
        x_0 = torch.nn.functional.hardtanh(x_0, -clip, clip)
    return f[4] * x_0 + f[5] * (f[2] * x_t + f[3] * prediction)
