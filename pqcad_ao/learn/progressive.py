"""Progressive quantization: weights step down a ladder of bits, then activations, each step moved by momentum.

Everything is learned against the full-precision network's own predictions on C_QC, the points of its own trajectories.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pqcad_ao.config import PQCADConfig
from pqcad_ao.denoiser import Span
from pqcad_ao.diffusion.calibration import CalibrationSet, to_observe
from pqcad_ao.graph.plan import Plan
from pqcad_ao.learn.reweighing import Reweighing, shown
from pqcad_ao.learn.selective import choose, learner_of, local_loss, time_projections
from pqcad_ao.learn.sensitivity import perturbation_loss
from pqcad_ao.learn.shards import shard
from pqcad_ao.learn.stages import policies
from pqcad_ao.learn.time_projections import fit_time_projections
from pqcad_ao.learn.training import data_parallel, more_of, read_checkpoint, train_loop
from pqcad_ao.learn.transition import MomentumTransition
from pqcad_ao.passes.expose import expose
from pqcad_ao.passes.insert_activations import insert_activations
from pqcad_ao.passes.probes import insert_probes
from pqcad_ao.prepare.annotate import PQCADQuantizer
from pqcad_ao.prepare.observe import (
    activation_quantizers,
    fit_activations,
    fit_weights,
    observe,
    weight_quantizers,
    weights_in_full_precision,
)
from pqcad_ao.utils.fields import entries, later
from pqcad_ao.utils.files import digest
from pqcad_ao.utils.processes import mean_of_all, rank_and_world, rows_of_all

DIVERGED = 10.0  # perturbation loss: ten times the power of what the network predicts


@dataclass(frozen=True)
class Update:
    """One training update: a line of the log.

    Attributes:
        update: its number, from 0. stage: weights or activations. bits, alpha: where the policy is after it.
        loss: perturbation loss of its batch. momentum: of the loss at this width; None while a width blends in.
        local: the local loss, where the network learns by one.
        weights: least, mean square and largest of the samples' weights, where they differ.
        cosine: between two tasks' gradients, the mean over pairs, in updates before which it was measured; after the
            last one once more.
    """

    update: int
    stage: str
    bits: int
    alpha: float
    loss: float
    momentum: float | None
    local: float | None = later(None)
    weights: list[float] | None = later(None)
    cosine: float | None = later(None)


@dataclass
class Learned:
    """What learning leaves behind.

    Attributes:
        graph: with both sides' fake quantizers in it, at the final bits.
        log: every update. transitions: as ``summary.json`` shows them.
        trained: the layers that learned, with the words that chose them; None: all.
        facts: ``trained_parameters`` of the network, and ``adam_bytes``, the optimizer's for them and all scales;
            ``task_cosine``, where samples' weights are learned: between tasks' gradients, at the start and at the end.
    """

    graph: GraphModule
    log: list[Update] = field(default_factory=list)
    transitions: list[dict[str, Any]] = field(default_factory=list)
    trained: dict[str, str] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def learn(
    graph: GraphModule,
    resolved: Plan,
    points: CalibrationSet,
    config: PQCADConfig,
    span: Span,
    *,
    reach: Tensor | None = None,
    folder: str | Path | None = None,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = False,
) -> Learned:
    """Train a prepared graph's weights, biases, norms and scales while its bits step down.

    Args:
        graph: with the weights' fake quantizers in it; trained in place, so its parameters must be its own.
        points: C_QC.
        span: of the noise process's timesteps.
        reach: (N,) how far an error at each point's step carries, for ``sample_weights="reach"``.
        folder, callback, progress: as for :func:`~pqcad_ao.learn.training.train_loop`.

    Raises:
        FloatingPointError: the loss left the finite numbers or exploded; says at which stage and width. The last
            checkpoint that an update succeeded with stays.
        ValueError: too few iterations for the ladders, or ``folder`` holds another run's checkpoint.
    """
    rank, _ = rank_and_world()
    run = _Run(graph, resolved, points, config, span, reach)

    def describe(update: Update) -> dict[str, Any]:
        shown = "–" if update.momentum is None else f"{update.momentum:.4f}"
        return {"stage": update.stage, "bits": update.bits, "loss": f"{update.loss:.4f}", "momentum": shown}

    train_loop(
        run,
        config.iterations,
        folder=folder,
        describe=describe,
        title=config.mode,
        callback=callback,
        progress=progress and rank == 0,
        write=rank == 0,
    )
    cosines = [update.cosine for update in run.log if update.cosine is not None]
    facts = {**run.learner.facts, **({"task_cosine": [cosines[0], cosines[-1]]} if cosines else {})}
    return Learned(run.graph, run.log, run.transitions, run.trained, facts)


class _Run:
    """A training run: everything that changes with an update, and how to keep it."""

    def __init__(
        self,
        graph: GraphModule,
        resolved: Plan,
        points: CalibrationSet,
        config: PQCADConfig,
        span: Span,
        reach: Tensor | None = None,
    ) -> None:
        self.graph, self.points, self.config = graph, points, config
        self.span, (self.rank, self.world) = span, rank_and_world()
        self.plan = resolved
        self.bits = {
            "weights": {row.fqn: row.weight_bits or 0 for row in resolved.quantized},
            "activations": {row.fqn: row.activation_bits for row in resolved.quantized if row.activation_bits},
        }
        self.policies = policies(config, resolved)
        self.log: list[Update] = []
        self.transitions: list[dict[str, Any]] = []
        # the graph holds the full-precision network now and never again; the last bits of a sensitivity depend on the
        # number of threads, which may change while a run is interrupted
        rows = [replace(row, sensitivity=None) for row in resolved.rows]
        self.key = digest(graph.state_dict(), points.x_t, points.timesteps, points.conditioning, config, rows)
        self.targets = self._predictions()
        if not self.targets.any():
            raise ValueError(
                "the network's output is zero on the whole calibration set: there is nothing to learn from"
            )
        if config.shard:
            shard(graph)
        self.reach = None if reach is None else reach.square() / reach.square().mean()
        self.reweighing: Reweighing | None = None
        if config.sample_weights in ("groups", "aligned"):
            self.reweighing = Reweighing(points, self.targets, config, span)
            self.points, self.targets = self.reweighing.points, self.reweighing.targets
        self.observed = to_observe(self.points, config, span)
        self.reference = self._frozen() if config.local_weight else None
        weights = self.policies.get("weights")
        fit_weights(graph, self._widths("weights", weights.bits if weights else 0))
        left_alone = {row.fqn for row in resolved.rows if not row.quantized}
        self.learns = {
            name: parameter.requires_grad
            for name, parameter in graph.named_parameters()
            if name.startswith("unet.") and name.removeprefix("unet.").rpartition(".")[0] not in left_alone
        }
        self.quantizers: list[Any] = [module for module, _ in weight_quantizers(graph).values()]  # of the stage
        selected = None
        if config.trainable is not None:
            selected = choose(config.trainable, resolved.quantized, config.sensitive_share)
        self._select(selected)
        if config.time_rounding:
            fit_time_projections(graph, time_projections(resolved, selected), self.points, config.batch_size)
        self.stage = next(iter(self.policies))
        if self.stage == "activations":
            self._insert_activations(fit=True)

    @torch.no_grad()
    def _predictions(self) -> Tensor:
        """What full precision predicts on all points (N, C, H, W); of several processes each works some batches out."""
        batches = islice(self.points.batches(self.config.batch_size), self.rank, None, self.world)
        with weights_in_full_precision(self.graph):
            return rows_of_all([self.graph(*batch) for batch in batches], self.points.x_t.device)

    def _frozen(self) -> GraphModule:
        """A copy that stays full precision's, for the local loss."""
        frozen = copy.deepcopy(self.graph).requires_grad_(False)
        for module, _ in weight_quantizers(frozen).values():
            module.disable_fake_quant()
        return frozen

    def _select(self, trained: dict[str, str] | None) -> None:
        """Let these layers learn, by name, or all."""
        self.trained = trained
        self.learner = learner_of(self.graph, self.learns, trained, self.config)
        self._show()

    def _show(self) -> None:
        """Make the graphs that an update calls, of the graph that learns and of full precision's."""
        called = self.graph if self.reweighing is None else insert_probes(self.graph)
        self.expected = None
        if self.reference is not None:
            layers = list(self.bits["weights"] if self.trained is None else self.trained)
            called, self.expected = expose(called, layers), expose(self.reference, layers)
        self.forward: Any = data_parallel(called)

    @property
    def omega(self) -> Tensor | None:
        """The weight of each point, or None where all count alike."""
        return self.reach if self.reweighing is None else self.reweighing.omega

    def _loss_of(self, batch: CalibrationSet, targets: Tensor) -> Tensor:
        return self._losses(batch, targets)[0]

    @property
    def policy(self) -> MomentumTransition:
        return self.policies[self.stage]

    def update(self) -> Update:
        """One training update, and what the policy makes of it."""
        if self.policy.done:
            self.stage = "activations"
            self._insert_activations(fit=True)
        number, config = len(self.log), self.config
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + number) % 2**63)
        rows = torch.randint(len(self.points), (config.batch_size,), generator=generator)
        weights = self.reweighing
        cosine = weights.look(self.forward, self._loss_of) if weights and weights.due(number) else None
        mine = rows[self.rank :: self.world]
        overall, weighted, local = self._losses(self.points[mine], self.targets[mine], mine, self.targets[rows])
        loss = weighted
        if local is not None:
            loss = config.global_weight * weighted + config.local_weight * local
        value, learned, local_value = mean_of_all(
            torch.stack([overall, loss, overall if local is None else local]).detach()
        ).tolist()
        if not (value < DIVERGED and math.isfinite(learned)):
            raise FloatingPointError(
                f"learning diverged in stage {self.stage!r}, update {number}, at {self.policy.bits} bits: the "
                f"perturbation loss is {value:.3g}. Lower learning_rate ({config.learning_rate:g}) or "
                f"scale_learning_rate ({config.scale_learning_rate:g}), with another folder if you gave one"
            )
        bits = self.policy.bits
        progress = value if local is None else config.global_weight * value + config.local_weight * local_value
        started = self.policy.update(progress)
        # what there is to move by shrinks with the grid's step: at the final rate a wide grid only gathers Adam's noise
        self.learner.step(loss, number, 2.0 ** (self.policy.ladder[-1] - bits))
        if started is not None:
            self.transitions.append({"stage": self.stage, **asdict(started), "step": number})
            self._begin(started.to_bits)
        self._blend()
        if weights is not None:
            weights.follow(self.forward, mine)
            if number == config.iterations - 1:
                cosine = weights.look(self.forward, self._loss_of)
        momentum = self.policy.momentum
        entry = Update(
            number,
            self.stage,
            self.policy.bits,
            self.policy.alpha,
            value,
            None if momentum != momentum else momentum,
            local=None if local is None else local_value,
            weights=None if self.omega is None else shown(self.omega),
            cosine=cosine,
        )
        self.log.append(entry)
        return entry

    def _losses(
        self, batch: CalibrationSet, targets: Tensor, rows: Tensor | None = None, whole: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The perturbation loss of a batch, the same with the weights of ``rows``, and its local loss, if any.

        Args:
            whole: the targets of all processes' batches, where this is one of them.
        """
        inputs, device = (batch.x_t, batch.timesteps, batch.conditioning), batch.x_t.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            prediction, local = self.forward(*inputs), None
            if self.expected is not None:
                prediction, outputs = prediction
                with torch.no_grad():
                    _, references = self.expected(*inputs)
                local = local_loss(outputs, references)
        overall = weighted = perturbation_loss(prediction, targets, whole=whole)
        if self.omega is not None and rows is not None:
            weighted = perturbation_loss(prediction, targets, self.omega[rows], whole)
        return overall, weighted, local

    def _widths(self, stage: str, bits: int) -> dict[str, int]:
        """Each layer's bits while its stage is at ``bits``: never fewer than the plan's."""
        return {fqn: max(target, bits) for fqn, target in self.bits[stage].items()}

    def _insert_activations(self, *, fit: bool) -> None:
        config = self.config
        quantizer = PQCADQuantizer(self.plan, "activations", groups=config.timestep_groups)
        self.graph = insert_activations(self.graph, quantizer, self.span)
        self.quantizers = list(activation_quantizers(self.graph).values())
        self.learner.graph = self.graph
        self.learner.add_scales(self.quantizers)
        self._show()
        if self.reweighing is not None:
            self.reweighing.weights.forget()  # more layers may have gradients from now on
        if fit:
            self._observe()
            fit_activations(self.graph, self._widths("activations", self.policy.bits))

    def _observe(self) -> None:
        observe(self.graph, self.observed, self.config.calibration_batch_size)

    def _begin(self, bits: int) -> None:
        """Let a width begin to blend in; the next grids' moments are those of a width long gone."""
        widths = self._widths(self.stage, bits)
        if self.stage == "weights":
            fit_weights(self.graph, widths, blend=True)
        else:
            self._observe()
            fit_activations(self.graph, widths, blend=True)
        for module in self.quantizers:
            self.learner.forget(module.next_scale)

    def _blend(self) -> None:
        for module in self.quantizers:
            if module.blending:
                module.alpha = self.policy.alpha
                if module.alpha == 1.0:
                    module.finish()

    # ------------------------------------------------------------------------------------------- checkpoints

    def _modules(self) -> dict[str, Any]:
        """Every fake quantizer by its name in the graph."""
        return {name: module for name, module in self.graph.named_modules() if hasattr(module, "blending")}

    def save(self, path: Path) -> None:
        """Write the run's whole state, first beside ``path`` and then in its place."""
        header = {
            "key": self.key,
            "stage": self.stage,
            "policies": {stage: policy.state_dict() for stage, policy in self.policies.items()},
            "log": [entries(update) for update in self.log],
            "transitions": self.transitions,
            "positions": {name: module.position() for name, module in self._modules().items()},
        }
        if self.trained is not None:
            header["trained"] = self.trained
        self.learner.save(path, header, None if self.reweighing is None else self.reweighing.weights.state())

    def load(self, path: Path) -> None:
        """Go on from where :meth:`save` was called.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
        header, tensors = read_checkpoint(path, self.key)
        if header["stage"] not in self.policies or header["policies"].keys() != self.policies.keys():
            raise ValueError(f"{path} is damaged: it is in stage {header['stage']!r}. Delete it to begin anew")
        if header.get("trained") != self.trained:  # a sensitivity's last bits were others
            self._select(header["trained"])
            if self.stage == "activations":
                self.learner.add_scales(self.quantizers)
                self._show()
        if header["stage"] != self.stage:
            self.stage = header["stage"]
            self._insert_activations(fit=False)
        for name, module in self._modules().items():
            module.move(**header["positions"][name])
        self.learner.load(tensors)
        if self.reweighing is not None:
            self.reweighing.load(more_of(tensors))
        self.policies = {
            stage: MomentumTransition.from_state_dict(state) for stage, state in header["policies"].items()
        }
        self.log = [Update(**update) for update in header["log"]]
        self.transitions = header["transitions"]
