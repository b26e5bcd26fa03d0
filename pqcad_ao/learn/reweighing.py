"""Points that are held out of C_QC, and weights of the others that follow how both's gradients agree."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pqcad_ao.config import MAX_BATCH, PQCADConfig
from pqcad_ao.denoiser import Span, timestep_group
from pqcad_ao.diffusion.calibration import CalibrationSet
from pqcad_ao.learn.weights import SampleWeights
from pqcad_ao.passes.probes import take_gradients
from pqcad_ao.utils.processes import rank_and_world, rows_by_rank

DECAY = 0.5  # of a task's gradient, from one look at the held-out points to the next


def held_out(count: int, share: float, seed: int) -> Tensor:
    """Which points are kept aside, (count,) bool: at least one, and never all."""
    kept = min(max(round(share * count), 1), count - 1)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    return mask


class Reweighing:
    """What a run with ``sample_weights="aligned"`` or ``"groups"`` knows beside its graph.

    Attributes:
        points, targets: what is left to learn from. omega: its weights, (N,).
        held: points and targets that are held out for each task, as many as one call takes.
    """

    def __init__(self, points: CalibrationSet, targets: Tensor, config: PQCADConfig, span: Span) -> None:
        tasks = config.weight_tasks
        task = timestep_group(points.timesteps, tasks, span)
        aside = held_out(len(task), config.weight_validation, config.seed).to(task.device)
        rows = [((task == k) & aside).nonzero().flatten()[:MAX_BATCH] for k in range(tasks)]
        self.held = [(points[here], targets[here]) for here in rows]
        self.points, self.targets, task = points[~aside], targets[~aside], task[~aside]
        slot = torch.arange(len(task), device=task.device) if config.sample_weights == "aligned" else task
        settings = config.weight_rate, config.weight_temperature, config.weight_pairs
        self.weights, self.every = SampleWeights(slot, tasks, *settings), config.weight_every
        self.omega = self.weights.omega

    def due(self, update: int) -> bool:
        """Whether to look at the held-out points before an update."""
        return update % self.every == 0 or not self.weights.known.any()

    def look(self, graph: nn.Module, loss_of: Callable[[CalibrationSet, Tensor], Tensor]) -> float | None:
        """Measure each task's gradient on what is held out of it; the mean cosine between two of them.

        Args:
            graph: with the probes. loss_of: the loss of points and targets by it.
        """
        found: dict[int, list[Tensor]] = {}
        for task, (batch, targets) in enumerate(self.held):
            if len(batch):
                loss_of(batch, targets).backward()
                found[task] = take_gradients(graph)
        self.weights.begin(list(found.values()))
        for task, gradients in found.items():
            P = self.weights.joined(gradients, follow=False)
            self.weights.remember(task, _finite(P, self.held[task][0]), DECAY)
        for parameter in graph.parameters():
            parameter.grad = None
        return self.weights.agreement

    def follow(self, graph: nn.Module, rows: Tensor) -> None:
        """Let the weights follow a batch of these rows, whose gradients the probes kept.

        Of several processes each has an equal part of the batch, whose loss is a mean over fewer samples.
        """
        _, world = rank_and_world()
        per_sample = self.omega[rows][:, None] * world  # which the gradients are multiplied with
        found = [rows_by_rank(gradient / per_sample) for gradient in take_gradients(graph)]
        P, rows = self.weights.joined(found, follow=True), rows_by_rank(rows)
        self.weights.move(rows, _finite(P, self.points[rows]))
        self.omega = self.weights.omega

    def load(self, state: dict[str, Tensor]) -> None:
        self.weights.load(state)
        self.omega = self.weights.omega


def shown(omega: Tensor) -> list[float]:
    """The least of the weights, their mean square, and the largest."""
    return [omega.min().item(), omega.square().mean().item(), omega.max().item()]


def _finite(P: Tensor, batch: CalibrationSet) -> Tensor:
    """Raises FloatingPointError: a sample's gradient is NaN or infinite; says at which timestep."""
    wrong = ~P.isfinite().all(1)
    if wrong.any():
        raise FloatingPointError(
            f"NaN or infinity in the gradient of a sample at timestep {batch.timesteps[wrong][0]:g}: "
            "lower learning_rate"
        )
    return P
