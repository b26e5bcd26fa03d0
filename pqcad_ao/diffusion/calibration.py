"""C_QC: noisy images x_t from the full-precision sampler's own trajectories, at timesteps drawn by a law."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pqcad_ao.config import PQCADConfig
from pqcad_ao.denoiser import (
    GUIDANCE_SCALE,
    Span,
    evaluation_mode,
    extent,
    in_one_call,
    placement,
    spread_rows,
    take_rows,
    time_scale,
    timestep_group,
)
from pqcad_ao.diffusion.layer_inputs import LayerInputs
from pqcad_ao.diffusion.noise import process_of
from pqcad_ao.diffusion.process import as_sampler, check_signal, settings_of, span_of
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.diffusion.selection import NEAR, one_of_each
from pqcad_ao.utils.checks import is_whole
from pqcad_ao.utils.files import digest
from pqcad_ao.utils.processes import fill_in, wait_for_all
from pqcad_ao.utils.progress import tqdm
from pqcad_ao.utils.runs import only_run_in
from pqcad_ao.utils.tensor_files import read_tensors, write_tensors

SAVE_EVERY_S = 30.0
PARTS = 2**20  # of a span of timesteps that are not whole numbers, for drawing some
SAMPLES = 8  # points of a timestep group, the first ones, to which its grids are fitted


@dataclass
class CalibrationSet:
    """Inputs of the network along its own sampling trajectories.

    Attributes:
        x_t: (N, C, H, W). timesteps: (N,) int64, of a flow or EDM float32. conditioning: keyword arguments with N
            rows each.
    """

    x_t: Tensor
    timesteps: Tensor
    conditioning: dict[str, Any]

    def __len__(self) -> int:
        return len(self.timesteps)

    def __getitem__(self, rows: Any) -> "CalibrationSet":
        return CalibrationSet(self.x_t[rows], self.timesteps[rows], take_rows(self.conditioning, rows))

    def on(self, device: torch.device) -> "CalibrationSet":
        conditioning = tree_map(
            lambda value: value.to(device) if isinstance(value, Tensor) else value, self.conditioning
        )
        return CalibrationSet(self.x_t.to(device), self.timesteps.to(device), conditioning)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        for first in range(0, len(self), size):
            rows = slice(first, first + size)
            yield self.x_t[rows], self.timesteps[rows], take_rows(self.conditioning, rows)


def draw_timesteps(count: int, span: Span, law: str, *, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """``count`` timesteps in [0, T): uniform, or N(mean·T, (std·T)²) truncated to the interval by redrawing.

    The normal law is PTQ4DM's (Shang et al. 2023, §4.3). Returns (count,) int64; float32 where the span is not [0, T),
    mean and std being parts of it.
    """
    if not isinstance(span, int):
        parts = draw_timesteps(count, PARTS, law, mean=mean, std=std, generator=generator)
        return span[0] + parts * (extent(span) / PARTS)
    if law == "uniform":
        return torch.randint(span, (count,), generator=generator)
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        t = torch.randn(4 * count, generator=generator) * std * span + mean * span
        t = t.floor().to(torch.int64)
        drawn = torch.cat([drawn, t[(t >= 0) & (t < span)]])
    return drawn[:count]


def draw_steps(visited: Tensor, span: Span, config: PQCADConfig, generator: torch.Generator) -> tuple[Tensor, int]:
    """The step of a sampler at which each point of C_QC is taken: a timestep drawn by the law, moved to the nearest.

    Args:
        visited: (S,) the sampler's timesteps.

    Returns:
        (N,) int64, and how many trajectories give each point an x_t of its own.
    """
    drawn = draw_timesteps(
        config.learning_points if config.learns or config.clusters else config.calibration_points,
        span,
        config.calibration_timesteps,
        mean=config.calibration_mean,
        std=config.calibration_std,
        generator=generator,
    )
    step = (drawn[:, None] - visited[None]).abs().argmin(1)
    if not config.learns and not config.clusters:  # nobody looks at the others, whose walks take most of the time
        step = step[observed(visited[step], config.timestep_groups, span)]
    return step, int(torch.bincount(step).max())


def observed(timesteps: Tensor, groups: int, span: Span) -> Tensor:
    """Which points (N,) are the first ``SAMPLES`` of their timestep group, to which its grids are fitted: (N,) bool."""
    group = timestep_group(timesteps.cpu(), groups, span)
    order = group.argsort(stable=True)
    count = torch.bincount(group)
    number = torch.arange(len(group)) - (count.cumsum(0) - count)[group[order]]  # within its group
    chosen = torch.empty(len(group), dtype=torch.bool)
    chosen[order] = number < SAMPLES
    return chosen


def to_observe(points: CalibrationSet, config: PQCADConfig, span: Span) -> CalibrationSet:
    """Those of C_QC's points to which activation grids are fitted.

    With ``calibration_selection="clusters"`` as many of each timestep group as otherwise, chosen among all of it.
    """
    head = points[: config.calibration_points]
    chosen = observed(head.timesteps, config.timestep_groups, span)
    if not config.clusters:
        return head[chosen]
    group = timestep_group(points.timesteps.cpu(), config.timestep_groups, span)
    counts = torch.bincount(group[: len(head)][chosen], minlength=config.timestep_groups)
    found = []
    for number in counts.nonzero().flatten().tolist():
        rows = (group == number).nonzero().flatten()
        alike = one_of_each(
            points.x_t[rows.to(points.x_t.device)],
            points.timesteps.cpu()[rows],
            int(counts[number]),
            alpha=config.cluster_alpha,
            bandwidth=NEAR * extent(span) / config.timestep_groups,
            seed=(config.seed * 1_000_003 + number) % 2**63,
        )
        found.append(rows[alike])
    return points[torch.cat(found).sort().values.to(points.x_t.device)]


def assign_trajectories(step: Tensor, trajectories: int, generator: torch.Generator) -> Tensor:
    """A trajectory for each point (N,), its own among those at its step. Returns (N,) int64."""
    trajectory = torch.zeros(len(step), dtype=torch.int64)
    for index in step.unique():
        here = step == index
        trajectory[here] = torch.randperm(trajectories, generator=generator)[: int(here.sum())]
    return trajectory


def points_at(step: Tensor, trajectory: Tensor, at: int, trajectories: range) -> tuple[Tensor, Tensor]:
    """Which of some trajectories have a point at a step, as rows of these, and the points' numbers: (n,) int64 each."""
    here = (step == at) & (trajectory >= trajectories.start) & (trajectory < trajectories.stop)
    points = here.nonzero().flatten()
    return trajectory[points] - trajectories.start, points


def calibration_set(
    model: nn.Module,
    scheduler: Any,
    shape: tuple[int, ...],
    config: PQCADConfig,
    conditioning: dict[str, Any] | None = None,
    *,
    inputs: LayerInputs | None = None,
    folder: str | Path | None = None,
    share: tuple[int, int] = (0, 1),
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = False,
) -> CalibrationSet:
    """Walk the full-precision sampler and keep some of its inputs: ``config.learning_points`` or, without learning and
    without clusters to choose from, of ``config.calibration_points`` those that are looked at.

    A point is a timestep drawn by the law, moved to the nearest one that the sampler visits, and the x_t that one of
    the trajectories has there; as many trajectories are walked as give each point an x_t of its own.

    Args:
        shape: (C, H, W). conditioning: rows are used in turn, one for each trajectory. Under guidance the trajectories
            are guided, and half of the points are of the negative's call.
        inputs: is given what layers are called with at each point, in the walk's own calls.
        folder: keeps the points, and those inputs, in a file named by all that they depend on. What is found there is
            not walked again; a walk that was cut short goes on with its next batch of trajectories.
        share: (rank, world) of this process where several walk a part each, in the same batches as one alone, and call
            this alike; all of them get all points.
        callback: called as ``callback("trajectories", done, total)``; with a share, those done include the others'.

    Raises:
        FloatingPointError: a trajectory leaves the finite numbers. ValueError: as :func:`check_signal`.
    """
    scheduler = as_sampler(scheduler)
    process_of(scheduler).set_timesteps(config.calibration_steps)
    check_signal(scheduler, scheduler.timesteps)
    with only_run_in(folder):
        given = (conditioning or {}, inputs or LayerInputs({}))
        return _points(model, scheduler, shape, config, *given, folder, share, callback, progress)


def _points(
    model: nn.Module,
    scheduler: Any,
    shape: tuple[int, ...],
    config: PQCADConfig,
    conditioning: dict[str, Any],
    inputs: LayerInputs,
    folder: str | Path | None,
    share: tuple[int, int],
    callback: Callable[[str, int, int], None] | None,
    progress: bool,
) -> CalibrationSet:
    """As :func:`calibration_set`, of a sampler that has its timesteps, in a folder that is this run's."""
    device, dtype = placement(model)
    drawn = _draw(scheduler, shape, config, conditioning, device, dtype)
    points = CalibrationSet(
        torch.zeros(len(drawn.step), *shape, dtype=dtype, device=device),
        scheduler.timesteps[drawn.step].to(device),
        in_one_call(take_rows(drawn.conditioning, drawn.trajectory), drawn.negative),
    )
    kept = {"x_t": points.x_t, **inputs.hold(len(points))}
    size, trajectories, (rank, world) = config.calibration_batch_size, len(drawn.noise), share
    whole = part = None
    walked = 0  # trajectories that are in the file already
    if folder is not None:
        whole = part = _file(folder, model, scheduler, config, drawn, inputs)
        walked = _read(whole, kept, trajectories)
        if walked == trajectories:
            return points
        if world > 1:
            part = whole.with_suffix(f".{size}-{world}-{rank}.safetensors")
            for values in kept.values():
                values.zero_()
            walked = _read(part, kept, trajectories)
    starts = [*range(walked, trajectories, size)]
    if world > 1:
        starts = [start for start in range(0, trajectories, size)[rank::world] if start >= walked]
    with inputs.watched(model):
        _walk(model, scheduler, config, drawn, kept, inputs, starts, part, callback=callback, progress=progress)
    if world > 1:
        _gather(kept, whole, rank, trajectories)
    return points


@dataclass(frozen=True)
class _Draw:
    """Where each point of a set is taken.

    Attributes:
        step, trajectory: (N,) int64, of each point: the sampler's step at which, and the trajectory from which.
        negative: (N,) bool, under guidance: whether the point is of the negative's call.
        noise: (trajectories, C, H, W) where they begin. conditioning: with a row for each of them.
    """

    step: Tensor
    trajectory: Tensor
    negative: Tensor
    noise: Tensor
    conditioning: dict[str, Any]

    def calls(self, step: int, trajectories: range) -> list[tuple[Tensor, Tensor]]:
        """Of each call of the network at a step of some trajectories: the rows that are points, and these' numbers."""
        rows, points = points_at(self.step, self.trajectory, step, trajectories)
        if GUIDANCE_SCALE not in self.conditioning:
            return [(rows, points)]
        negative = self.negative[points]
        return [(rows[~negative], points[~negative]), (rows[negative], points[negative])]

    def last(self, trajectories: range) -> int:
        """The last step at which some trajectories have a point; -1 where they have none."""
        within = (self.trajectory >= trajectories.start) & (self.trajectory < trajectories.stop)
        return int(self.step[within].max()) if within.any() else -1


def _draw(
    scheduler: Any,
    shape: tuple[int, ...],
    config: PQCADConfig,
    conditioning: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> _Draw:
    """Draw the points' timesteps by the law, and give each a trajectory of its own among those at its step."""
    generator = torch.Generator().manual_seed(config.seed)
    step, trajectories = draw_steps(scheduler.timesteps, span_of(scheduler), config, generator)
    noise = torch.randn(trajectories, *shape, generator=generator).to(device, dtype)
    trajectory = assign_trajectories(step, trajectories, generator)
    negative = torch.rand(len(step), generator=generator) < 0.5
    return _Draw(step, trajectory, negative, noise, spread_rows(conditioning, torch.arange(trajectories), trajectories))


def _walk(
    model: nn.Module,
    scheduler: Any,
    config: PQCADConfig,
    drawn: _Draw,
    kept: dict[str, Tensor],
    inputs: LayerInputs,
    starts: list[int],
    file: Path | None,
    *,
    callback: Callable[[str, int, int], None] | None,
    progress: bool,
) -> None:
    """Walk the batches of trajectories that begin at ``starts`` and fill in what is kept, of which ``file`` has all.

    A walk ends at its last point, where nobody needs the prediction but for the layers' inputs.
    """
    size, trajectories = config.calibration_batch_size, len(drawn.noise)
    bar = tqdm(total=len(starts) * len(scheduler.timesteps), desc="trajectories", disable=not progress, leave=False)
    saved = time.monotonic()
    with evaluation_mode(model), bar:
        for start in starts:
            batch = range(start, min(start + size, trajectories))
            ends = drawn.last(batch) + bool(inputs.layers)

            def keep(
                first: int, step: int, timestep: Tensor, x_t: Tensor, batch: range = batch, ends: int = ends
            ) -> bool:
                calls = drawn.calls(step, batch)
                for rows, points in calls:
                    kept["x_t"][points] = x_t[rows]
                inputs.expect(calls)
                bar.update()
                return step >= ends

            sample(
                model,
                scheduler,
                drawn.noise[start : batch.stop],
                config.calibration_steps,
                conditioning=take_rows(drawn.conditioning, slice(start, batch.stop)),
                batch_size=size,
                callback=keep,
            )
            if callback is not None:
                callback("trajectories", batch.stop, trajectories)
            if file is not None and (start == starts[-1] or time.monotonic() - saved > SAVE_EVERY_S):
                _write(file, kept, batch.stop)
                saved = time.monotonic()


def _gather(kept: dict[str, Tensor], whole: Path | None, rank: int, trajectories: int) -> None:
    """Give every process all points, and put the whole set in the place of the files of its parts."""
    for values in kept.values():
        fill_in(values)  # each point is one process's, and zero in the others
    if whole is None:
        return
    if rank == 0:
        _write(whole, kept, trajectories)
    wait_for_all()
    if rank == 0:
        for left in whole.parent.glob(f"{whole.stem}.*-*-*.safetensors"):  # of another number of processes, too
            left.unlink()


def _file(
    folder: str | Path, model: nn.Module, scheduler: Any, config: PQCADConfig, drawn: _Draw, inputs: LayerInputs
) -> Path:
    """The file of a calibration set, named by all that its points depend on."""
    law = (config.calibration_timesteps, config.calibration_mean, config.calibration_std)
    key = digest(
        model.state_dict(),
        time_scale(model),
        settings_of(scheduler),
        law,
        config.calibration_steps,
        drawn.noise,
        drawn.trajectory,
        scheduler.timesteps,
        drawn.conditioning,
        *([inputs.layers] if inputs.layers else []),
    )
    return Path(folder) / f"c_qc-{key}.safetensors"


def _read(file: Path, kept: dict[str, Tensor], trajectories: int) -> int:
    """Fill in what is kept from a file, if it is there; returns how many of all trajectories it covers.

    Raises:
        ValueError: the file is damaged.
    """
    if not file.is_file():
        return 0
    try:
        tensors, walked = read_tensors(file, "walked")
        for name, values in kept.items():
            found = tensors.get(name, torch.empty(0))
            if found.shape != values.shape or found.dtype != values.dtype:
                raise ValueError(f"it holds no {name} of {values.dtype} {tuple(values.shape)}")
        if not tensors["x_t"].isfinite().all():
            raise ValueError("its x_t is not finite")
        if not is_whole(walked, 1, trajectories):
            raise ValueError(f"it covers {walked!r} trajectories of {trajectories}")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and it is made again") from error
    for name, values in kept.items():
        values.copy_(tensors[name])
    return walked


def _write(file: Path, kept: dict[str, Tensor], walked: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, {name: values.cpu() for name, values in kept.items()}, {"walked": str(walked)})
