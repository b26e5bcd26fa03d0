"""CAD, calibration-assisted distillation: a quantized network learns to take two sampling steps, or more, in one."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.denoiser import (
    GUIDANCE_SCALE,
    evaluation_mode,
    guided,
    placement,
    predict_float32,
    take_rows,
    time_scale,
    unguided,
)
from pqcad_ao.diffusion.cache_plan import drop_cache_plan
from pqcad_ao.diffusion.correction import drop_correction
from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.noise import Sampler
from pqcad_ao.diffusion.process import settings_of
from pqcad_ao.diffusion.sampling import overflow
from pqcad_ao.diffusion.schedule import substeps_from_anew, timesteps_of
from pqcad_ao.diffusion.solvers import SOLVERS, ddim
from pqcad_ao.diffusion.trajectories import Trajectories
from pqcad_ao.graph.capture import capture
from pqcad_ao.graph.plan import PlanRow, resolve
from pqcad_ao.learn.reweighing import shown
from pqcad_ao.learn.selective import choose, learner_of
from pqcad_ao.learn.shards import shard
from pqcad_ao.learn.training import data_parallel, more_of, read_checkpoint, to_learn, train_loop
from pqcad_ao.learn.unfold import unfold
from pqcad_ao.learn.weights import SampleWeights
from pqcad_ao.nn.diffusers_plugin import attach
from pqcad_ao.nn.state import quantized_state, required_state
from pqcad_ao.passes.probes import insert_probes, take_gradients
from pqcad_ao.prepare.fold import adopt, fold
from pqcad_ao.prepare.observe import activation_quantizers
from pqcad_ao.utils.fields import entries, later
from pqcad_ao.utils.files import digest
from pqcad_ao.utils.processes import mean_of_all, rank_and_world, rows_by_rank

DECAY = 0.9  # of a step's gradient, from batch to batch: a batch holds a handful of each
LOOK_EVERY = 20  # updates between two cosines in the log
DIVERGED = 10.0  # times the loss of the first update


@dataclass(frozen=True)
class DistillUpdate:
    """One training update: a line of the log.

    Attributes:
        update: its number, from 0. stage: "halving 1" and so on, or "2 halvings at once".
        loss: weighted sum of both parts.
        reference, teacher: mean squared error against each target; None where it is not used.
        weights: least, mean square and largest of the steps' weights, where they differ. cosine: between two steps'
            gradients, the mean over pairs; of some updates, the last among them.
    """

    update: int
    stage: str
    loss: float
    reference: float | None
    teacher: float | None
    weights: list[float] | None = later(None)
    cosine: float | None = later(None)


def teach(
    student: nn.Module,
    reference: nn.Module,
    ddim: Sampler,
    shape: tuple[int, ...],
    config: CADConfig,
    pictures: Trajectories,
    *,
    folder: str | Path | None,
    callback: Callable[[str, int, int], None] | None,
    progress: bool,
) -> Sampler:
    """Every run of updates in turn; returns the last one's sampler."""
    rank, _ = rank_and_world()
    # the network that is taught once more, while the caller's is as it was
    taught = student if len(config.runs) == 1 else copy.deepcopy(student)

    def describe(update: DistillUpdate) -> dict[str, Any]:
        return {"stage": update.stage, "loss": f"{update.loss:.5f}"}

    for number, (_, learned) in enumerate(config.runs):
        run = _Halving(taught, reference, ddim, pictures, config, number, shape)
        with evaluation_mode(reference):
            train_loop(
                run,
                config.iterations,
                folder=None if folder is None else Path(folder) / f"halving-{number + 1}",
                describe=describe,
                title="distill",
                callback=callback,
                progress=progress and rank == 0,
                write=rank == 0,
            )
        run.give_back(student if number == len(config.runs) - 1 else taught, timesteps_of(ddim, learned))
    return ddim


class _Halving:
    """One of ``config.runs``: everything that changes with an update, and how to keep it.

    ``schedule`` is that of the student before it; ``jump`` of its steps become one. ``flow`` is that in which the
    reference walks from fresh noise.
    """

    def __init__(
        self,
        student: nn.Module,
        reference: nn.Module,
        scheduler: Sampler,
        images: Trajectories,
        config: CADConfig,
        number: int,
        shape: tuple[int, ...],
    ) -> None:
        self.student, self.reference, self.images, self.config = student, reference, images, config
        self.number, self.scheduler = number, scheduler
        self.steps, learned = config.runs[number]
        self.jump = self.steps // learned
        self.stage = f"halving {number + 1}" if self.jump == 2 else f"{config.halvings} halvings at once"
        self.device, _ = placement(reference)
        self.schedule = DDIMSchedule.of(scheduler, self.steps, self.device)
        substeps = config.substeps
        if config.reference_solver != "ddim":
            substeps = substeps_from_anew(scheduler, config.steps, substeps)
        self.flow = DDIMSchedule.of(scheduler, config.steps, self.device, substeps=substeps)
        starts = torch.arange(0, self.steps, self.jump, device=self.device)
        self.error_gain = self.schedule.error_gain(starts, self.jump)
        self.log: list[DistillUpdate] = []
        self.first: float | None = None
        conditioning, state = images.conditioning, quantized_state(student)
        self.baked = state is not None and state.timestep.guidance is not None
        if state is None:
            self.skeleton = to_learn(student)
            captured = capture(self.skeleton, shape, conditioning)
            self.graph, rows = captured.graph, resolve(captured, self.skeleton, PQCADConfig()).quantized
        else:
            self.graph, self.skeleton = unfold(student, reference, shape, conditioning)
            rows = required_state(student).plan.quantized
        self.key = digest(
            self.graph.state_dict(),
            reference.state_dict(),
            time_scale(reference),
            settings_of(scheduler),
            shape,
            images.extra,
            images.conditioning,
            config,
            self.schedule.timesteps,
            number,
        )
        if config.shard:
            shard(self.graph)
        self.teacher = copy.deepcopy(self.graph) if config.teacher_weight else None
        self.weights: SampleWeights | None = None
        if config.sample_weights == "groups":
            slot = torch.arange(learned, device=self.device)
            settings = config.weight_rate, config.weight_temperature, config.weight_pairs
            self.weights = SampleWeights(slot, learned, *settings)
        self.learns = {n: p.requires_grad for n, p in self.graph.named_parameters() if n.startswith("unet.")}
        self.rank, self.world = rank_and_world()
        self._select(self._selected(rows))

    def _selected(self, rows: list[PlanRow]) -> dict[str, str] | None:
        """Those of these layers that learn, by name, with the words that chose them; None: all.

        Raises ValueError: as :func:`choose`, or sensitivities that were never measured.
        """
        if self.config.trainable is None:
            return None
        if "sensitive" in self.config.trainable and any(row.sensitivity is None for row in rows):
            raise ValueError(
                f"trainable={self.config.trainable}: no sensitivity was measured for this network; quantize_ measures "
                "it where it learns or target_bits is given, so name roles or layers in place of 'sensitive'"
            )
        return choose(self.config.trainable, rows, self.config.sensitive_share)

    def _select(self, trained: dict[str, str] | None) -> None:
        """Let these layers learn, by name, or all."""
        self.trained = trained
        self.learner = learner_of(self.graph, self.learns, trained, self.config)
        self.learner.add_scales(activation_quantizers(self.graph).values())
        self.probed = self.graph if self.weights is None else insert_probes(self.graph)
        self.forward = data_parallel(self.probed)

    def _batch(self, number: int) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
        """This process's share of an update's x_t, the step of each in ``schedule``, where the reference's flow leads
        from there in one step of the student's (None if nobody asks), and conditioning."""
        config, size = self.config, self.config.batch_size
        seed = (config.seed * 1_000_003 + self.number * 500_009 + number) % 2**63
        generator = torch.Generator().manual_seed(seed)
        # every step of the student's equally often: the updates count through them, each in an order of its own
        taken = (number * size + torch.arange(size)) % (self.steps // self.jump)
        taken = taken[torch.randperm(size, generator=generator)]
        index = torch.randint(len(self.images), (size,), generator=generator)
        noise = torch.randn(size, *self.images.shape, generator=generator)
        extra = torch.randn(noise.shape, generator=generator) if config.noise_injection else None
        mine = slice(self.rank, None, self.world)
        taken, index = taken[mine], index[mine]
        x_0, conditioning = self.images.rows(index)
        step = (self.jump * taken).to(self.device)
        x_t = self.schedule.add_noise(x_0.to(self.device), noise[mine].to(self.device), step)
        end = torch.empty_like(x_t) if config.reference_weight else None
        known = self.images.on_trajectories(index)
        if known.any():
            every = self.images.steps * self.jump // self.steps  # of C_DC's steps are one of the student's
            begin = every * taken[known]
            x_t[known], arrived = (x.to(x_t) for x in self.images.stretches(index[known], begin, begin + every))
            if end is not None:
                end[known] = arrived
        if end is not None and not known.all():
            chosen = take_rows(conditioning, (~known).nonzero().flatten())
            end[~known] = self._flow(x_t[~known], step[~known], chosen)
        if extra is not None:
            x_t = x_t + config.noise_injection * extra[mine].to(self.device)
        return x_t, step, end, conditioning

    @torch.no_grad()
    def _flow(self, x_t: Tensor, step: Tensor, conditioning: Any) -> Tensor:
        """Where the reference's flow is after one step of the student's."""
        finer = (len(self.flow.timesteps) - 1) // self.steps  # of the flow's steps are one of the schedule's

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return predict_float32(self.reference, x, t, conditioning)

        solve = SOLVERS[self.config.reference_solver]
        return solve(predict, self.flow, x_t, finer * step, finer * self.jump)

    def _target(self, end: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """The v with which one step of the student's from x_t ends there."""
        return self.schedule.velocity(self.schedule.target_x_0(end, x_t, step, self.jump), x_t, step)

    @torch.no_grad()
    def _walked(self, teacher: nn.Module, x_t: Tensor, step: Tensor, conditioning: Any) -> Tensor:
        """Where a network, the student as it was, goes in as many of its steps as become one."""
        return ddim(lambda x, t: guided(teacher, x, t, conditioning), self.schedule, x_t, step, self.jump)

    def update(self) -> DistillUpdate:
        """One training update."""
        number, config = len(self.log), self.config
        x_t, step, end, conditioning = self._batch(number)
        own = unguided(conditioning) if config.guidance == "baked" else conditioning
        targets: dict[str, Tensor] = {}
        if end is not None:
            targets["reference"] = self._target(end, x_t, step)
        if self.teacher is not None:
            # as it was before this run: one that was not taught to do without is guided
            taught = own if self.number or self.baked else conditioning
            targets["teacher"] = self._target(self._walked(self.teacher, x_t, step, taught), x_t, step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            prediction = guided(self.forward, x_t, self.schedule.timesteps[step], own)
        x_0, _ = self.schedule.x_0_and_noise(prediction.float(), x_t, step)
        v = self.schedule.velocity(x_0, x_t, step)
        weight = torch.ones(len(v), *[1] * (v.dim() - 1), device=v.device)
        if config.space == "x":  # max(SNR, 1)·σ² of v's error, which is x_0's over σ
            alpha_t, sigma_t = self.schedule.alpha_sigma(step, v)
            weight = torch.maximum(alpha_t.square(), sigma_t.square())
        elif self.schedule.prediction_type == "epsilon":
            # as v, an error of epsilon counts 1/alpha² times: the first timestep would be all that is learned
            weight = self.error_gain[step // self.jump].square().view_as(weight) / self.error_gain.square().mean()
        errors = {name: weight * (v - target).square() for name, target in targets.items()}
        parts = {name: error.mean() for name, error in errors.items()}
        weights = {"reference": config.reference_weight, "teacher": config.teacher_weight}
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        value, *part_values = mean_of_all(torch.stack([loss, *parts.values()]).detach()).tolist()
        self.first = value if self.first is None else self.first
        if not math.isfinite(value) or value > DIVERGED * max(self.first, 1e-6):
            if "reference" in targets and not targets["reference"].isfinite().all():
                raise overflow("walking its flow", placement(self.reference)[1], self.scheduler)
            raise FloatingPointError(
                f"distillation diverged in {self.stage}, update {number}: the loss is {value:.3g}, at the "
                f"start it was {self.first:.3g}. Lower learning_rate ({config.learning_rate:g}), with another folder "
                "if you gave one"
            )
        if self.weights is not None:
            omega = self.weights.omega[step // self.jump].view_as(weight)
            loss = torch.stack([weights[name] * (omega * error).mean() for name, error in errors.items()]).sum()
        self.learner.step(loss, number)
        named = dict(zip(parts, part_values, strict=True))
        moved = {} if self.weights is None else self._reweigh(self.weights, step // self.jump)
        entry = DistillUpdate(number, self.stage, value, named.get("reference"), named.get("teacher"), **moved)
        self.log.append(entry)
        return entry

    def _reweigh(self, weights: SampleWeights, taken: Tensor) -> dict[str, Any]:
        """Let the steps' weights follow a batch at steps ``taken``, whose gradients the probes kept; the log's fields.

        Every x_t is a fresh one: what the batches before said of a step is as good as held out.
        """
        per_sample = weights.omega[taken][:, None]  # which the gradients are multiplied with
        found = [gradient / per_sample for gradient in take_gradients(self.probed)]
        if self.world > 1:
            sizes, taken = [gradient.shape[1] for gradient in found], rows_by_rank(taken)
            found = list(rows_by_rank(torch.cat(found, 1)).split(sizes, 1))
        P = weights.joined(found, follow=True)
        weights.move(taken, P)
        for step in taken.unique().tolist():
            weights.remember(step, P[taken == step], DECAY)
        number = len(self.log)
        measured = number % LOOK_EVERY == 0 or number == self.config.iterations - 1
        return {"weights": shown(weights.omega), "cosine": weights.agreement if measured else None}

    def give_back(self, network: nn.Module, schedule: list[int]) -> None:
        """Put what was learned into a network, the student or one alike, and let it remember its new timesteps."""
        state, before = quantized_state(network), quantized_state(self.student)
        drop_cache_plan(network, "distill_")
        drop_correction(network, "distill_")
        if state is None or before is None:
            adopt(network, self.graph, {})
            return
        layers = fold(self.graph, self.skeleton, state.plan, state.timestep)
        for fqn, layer in layers.items():
            layer.train(network.get_submodule(fqn).training)
        adopt(network, self.graph, layers)
        state.timestep.schedule, state.timestep.call.visited = schedule, None
        if self.config.guidance == "baked":
            state.timestep.guidance = float(self.images.conditioning[GUIDANCE_SCALE])
        state.distilled = [*before.distilled, *self.log]
        attach(network, state)

    def save(self, path: Path) -> None:
        header: dict[str, Any] = {"key": self.key, "log": [entries(update) for update in self.log], "first": self.first}
        if self.trained is not None:
            header["trained"] = self.trained
        self.learner.save(path, header, None if self.weights is None else self.weights.state())

    def load(self, path: Path) -> None:
        """Go on from where :meth:`save` was called. Raises ValueError: the file is damaged, or of another run."""
        header, tensors = read_checkpoint(path, self.key)
        if header.get("trained") != self.trained:  # a sensitivity's last bits were others
            self._select(header["trained"])
        self.learner.load(tensors)
        if self.weights is not None:
            self.weights.load(more_of(tensors))
        self.log, self.first = [DistillUpdate(**update) for update in header["log"]], header["first"]
