"""C_QC: noisy images x_t from the full-precision sampler's own trajectories, at timesteps drawn by a law."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from torch import Tensor, nn

from pqcad_ao.capture import conditioning_rows, placement
from pqcad_ao.config import PQCADConfig
from pqcad_ao.sampling import evaluation_mode, sample, take_rows

# Schedulers that walk the variance-preserving process of Ho et al. 2020 on integer timesteps.
FAMILY = (DDIMScheduler, DDPMScheduler, PNDMScheduler)


@dataclass
class CalibrationSet:
    """Inputs of the network along its own sampling trajectories.

    Attributes:
        x_t: (N, C, H, W). timesteps: (N,) int64. conditioning: keyword arguments with N rows each.
    """

    x_t: Tensor
    timesteps: Tensor
    conditioning: dict[str, Any]

    def __len__(self) -> int:
        return len(self.timesteps)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        for first in range(0, len(self), size):
            rows = slice(first, first + size)
            yield self.x_t[rows], self.timesteps[rows], take_rows(self.conditioning, rows)


def as_ddim(scheduler) -> DDIMScheduler:
    """The deterministic DDIM sampler of a scheduler's noise process.

    Raises:
        ValueError: the scheduler is not of the DDPM/DDIM family.
    """
    if not isinstance(scheduler, FAMILY):
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__}: allowed are {', '.join(kind.__name__ for kind in FAMILY)}. "
            "If the network was trained on a DDPM noise process, pass DDIMScheduler.from_config(scheduler.config)"
        )
    return DDIMScheduler.from_config(scheduler.config)


def find_scheduler(model: nn.Module) -> DDIMScheduler | None:
    """The scheduler saved beside a network that was loaded from a diffusers folder, if there is one.

    Raises:
        ValueError: the one that is there is not of the DDPM/DDIM family.
    """
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not path:
        return None
    for folder in (Path(path) / "scheduler", Path(path), Path(path).parent / "scheduler"):
        file = folder / "scheduler_config.json"
        if file.is_file():
            scheduler_class = json.loads(file.read_text()).get("_class_name")
            known = {kind.__name__: kind for kind in FAMILY}
            if scheduler_class not in known:
                raise ValueError(
                    f"the scheduler saved in {folder} is a {scheduler_class}: allowed are {', '.join(known)}. If the "
                    f"network was trained on a DDPM noise process, pass DDIMScheduler.from_pretrained({str(folder)!r})"
                )
            return as_ddim(known[scheduler_class].from_pretrained(folder))
    return None


def draw_timesteps(
    count: int, num_train_timesteps: int, law: str, *, mean: float, std: float, generator: torch.Generator
) -> Tensor:
    """``count`` timesteps in [0, T): uniform, or N(mean·T, (std·T)²) truncated to the interval by redrawing.

    The normal law is PTQ4DM's (Shang et al. 2023, §4.3). Returns (count,) int64.
    """
    if law == "uniform":
        return torch.randint(num_train_timesteps, (count,), generator=generator)
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        t = torch.randn(4 * count, generator=generator) * std * num_train_timesteps + mean * num_train_timesteps
        t = t.floor().to(torch.int64)
        drawn = torch.cat([drawn, t[(t >= 0) & (t < num_train_timesteps)]])
    return drawn[:count]


def calibration_set(
    model: nn.Module,
    scheduler,
    shape: tuple[int, int, int],
    config: PQCADConfig,
    conditioning: dict[str, Any] | None = None,
    *,
    progress: bool = False,
) -> CalibrationSet:
    """Walk the full-precision sampler and keep ``config.calibration_points`` of its inputs.

    A point is a timestep drawn by the law, moved to the nearest one that the sampler visits, and the x_t that one of
    the trajectories has there; as many trajectories are walked as give each point an x_t of its own.

    Args:
        shape: (C, H, W). conditioning: rows are used in turn, one for each trajectory.

    Raises:
        FloatingPointError: a trajectory leaves the finite numbers.
    """
    generator = torch.Generator().manual_seed(config.seed)
    scheduler = as_ddim(scheduler)
    scheduler.set_timesteps(config.calibration_steps)
    visited = scheduler.timesteps
    drawn = draw_timesteps(
        config.calibration_points,
        scheduler.config.num_train_timesteps,
        config.calibration_timesteps,
        mean=config.calibration_mean,
        std=config.calibration_std,
        generator=generator,
    )
    step_of_point = (drawn[:, None] - visited[None]).abs().argmin(1)
    trajectories = int(torch.bincount(step_of_point).max())
    device, dtype = placement(model)
    noise = torch.randn(trajectories, *shape, generator=generator).to(device, dtype)
    conditioning = conditioning or {}
    chosen = take_rows(conditioning, torch.arange(trajectories) % conditioning_rows(conditioning))
    # the k-th point at a step takes the k-th trajectory
    rank = torch.zeros(len(drawn), dtype=torch.int64)
    for step in step_of_point.unique():
        here = step_of_point == step
        rank[here] = torch.randperm(trajectories, generator=generator)[: int(here.sum())]
    x_t = torch.empty(len(drawn), *shape, dtype=dtype, device=device)

    def keep(first: int, step: int, timestep: Tensor, state: Tensor) -> None:
        here = (step_of_point == step) & (rank >= first) & (rank < first + len(state))
        x_t[here.to(x_t.device)] = state[(rank[here] - first).to(state.device)]

    with evaluation_mode(model):
        final = sample(
            model,
            scheduler,
            noise,
            config.calibration_steps,
            conditioning=chosen,
            batch_size=config.calibration_batch_size,
            callback=keep,
            progress=progress,
        )
    if not final.isfinite().all() or not x_t.isfinite().all():
        raise FloatingPointError(
            "the full-precision sampler left the finite numbers while calibrating: check the network's weights and "
            f"that the scheduler is the one it was trained with ({scheduler.config.prediction_type}, "
            f"{scheduler.config.beta_schedule})"
        )
    return CalibrationSet(x_t, visited[step_of_point].to(x_t.device), take_rows(chosen, rank))
