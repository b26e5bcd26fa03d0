"""C_DC: full precision's trajectories from noise to picture, and a look whether network and scheduler fit."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pqcad_ao.config import CADConfig
from pqcad_ao.denoiser import (
    GUIDANCE_SCALE,
    cast_floats,
    check_conditioning,
    evaluation_mode,
    placement,
    predict_float32,
    spread_rows,
    time_scale,
)
from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.noise import Sampler
from pqcad_ao.diffusion.process import settings_of
from pqcad_ao.diffusion.sampling import like_images, overflow
from pqcad_ao.diffusion.solvers import SOLVERS
from pqcad_ao.diffusion.store import FileStore, Store
from pqcad_ao.utils.files import digest
from pqcad_ao.utils.processes import rank_and_world, wait_for_all
from pqcad_ao.utils.progress import tqdm
from pqcad_ao.utils.runs import only_run_in

CHECKED = 64  # pictures behind the denoising check
LEAST_NOISE = 0.05  # power of the noise at the timesteps it looks at: of less, little is to be found
FARTHEST = 0.04  # that a network's noise may be off; of the embedded teacher at most 0.011, with other betas from 0.06


class Trajectories:
    """C_DC: what the full-precision network drew, kept on disk where there is a folder, read row by row.

    Args:
        drawn: (N, K + 1, C, H, W): the flow of each picture where the student's K steps begin, and the picture. Of
            pictures that are noised anew, (N, 1, C, H, W).
        extra: (N, C, H, W) further pictures in [-1, 1], such as real ones.
    """

    def __init__(self, drawn: Any, conditioning: dict[str, Any], extra: Tensor | None) -> None:
        self.drawn, self.conditioning, self.extra = drawn, conditioning, extra

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a picture."""
        return self.drawn.shape[2:]

    @property
    def steps(self) -> int:
        """K, into which each trajectory is divided; 0 where the pictures alone were kept."""
        return self.drawn.shape[1] - 1

    def on_trajectories(self, index: Tensor) -> Tensor:
        """Which of these numbers (B,) are pictures with a trajectory; the others are to be noised anew."""
        return (index < len(self.drawn)) & (self.steps > 0)

    def __len__(self) -> int:
        return len(self.drawn) + (0 if self.extra is None else len(self.extra))

    def rows(self, index: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Pictures (B, C, H, W) of these numbers, on the CPU, and their conditioning."""
        own = index % len(self.drawn)
        images = torch.from_numpy(np.array(self.drawn[own.numpy(), -1]))
        if self.extra is not None:
            real = index >= len(self.drawn)
            images[real] = self.extra[index[real] - len(self.drawn)].to(images.dtype)
        return images, spread_rows(self.conditioning, own, len(self.drawn))

    def stretches(self, index: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The flow (B, C, H, W) of drawn pictures where the steps ``begin`` and ``end`` (B,) of the student's begin."""
        first, last = (torch.from_numpy(np.array(self.drawn[index.numpy(), at.numpy()])) for at in (begin, end))
        return first, last


def draw_trajectories(
    reference: nn.Module,
    scheduler: Sampler,
    shape: tuple[int, ...],
    config: CADConfig,
    conditioning: dict[str, Any],
    *,
    images: Tensor | None = None,
    folder: str | Path | None = None,
    check: Callable[[Trajectories], None] | None = None,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = False,
) -> Trajectories:
    """Draw ``config.points`` pictures with the full-precision network, and keep the trajectories that lead to them.

    A trajectory is that of ``config.reference_solver``, in ``config.steps`` with ``config.substeps`` each. Of
    pictures that are noised anew nothing else is kept, and they are drawn in ``config.steps``.

    Args:
        folder: keeps them in a file that is mapped rather than read, so that they may be more than memory holds. A draw
            that was cut short goes on with its next batch. Several processes draw a share each, into one file.
        check: looks at the pictures as soon as the first ``CHECKED`` are there; what it raises ends the draw.

    Raises:
        FloatingPointError: a picture leaves the finite numbers. ValueError: several processes and no folder, or a
            damaged file.
    """
    kept = (config.points, _kept(config), *shape)
    with only_run_in(folder):
        if folder is None:
            if rank_and_world()[1] > 1:
                raise ValueError("several processes share C_DC in a file: give a folder")
            store = Store(np.zeros(kept, np.float32))
        else:
            drawn_by = (
                reference.state_dict(),
                time_scale(reference),
                settings_of(scheduler),
                config.steps,
                config.reference_solver,
                _substeps(config),
                config.seed,
            )
            key = digest(*drawn_by, kept, conditioning)
            store = FileStore(Path(folder), key, kept, config.generation_batch_size)
        pictures = Trajectories(store.images, conditioning, images)
        _draw(store, pictures, reference, scheduler, config, check=check, callback=callback, progress=progress)
    return pictures


def _draw(
    store: Store,
    pictures: Trajectories,
    reference: nn.Module,
    scheduler: Sampler,
    config: CADConfig,
    *,
    check: Callable[[Trajectories], None] | None,
    callback: Callable[[str, int, int], None] | None,
    progress: bool,
) -> None:
    """Draw what is not in the store yet, and let ``check`` look at the first of it."""
    rank, world = rank_and_world()
    count, size = config.points, config.generation_batch_size
    starts = list(range(0, count, size))[rank::world]
    done, shape = store.batches_done(len(starts)), store.images.shape[2:]
    bar = tqdm(total=len(starts), initial=done, desc="pictures", disable=not progress, leave=False)

    def draw(numbers: range) -> None:
        """These of this process's batches."""
        for number in numbers:
            rows = torch.arange(starts[number], min(starts[number] + size, count))
            store.put(rows, _batch(reference, scheduler, shape, config, pictures.conditioning, rows), number)
            bar.update()
            if callback is not None:
                callback("pictures", number + 1, len(starts))
        wait_for_all()

    with evaluation_mode(reference), bar:
        if check is not None:
            first = min(math.ceil(min(CHECKED, count) / (size * world)), len(starts))
            draw(range(done, first))
            check(pictures)
            done = max(done, first)
        draw(range(done, len(starts)))
    if rank == 0:
        store.finish()


@torch.no_grad()
def _batch(
    reference: nn.Module,
    scheduler: Sampler,
    shape: tuple[int, ...],
    config: CADConfig,
    conditioning: dict[str, Any],
    rows: Tensor,
) -> Tensor:
    """The rows of these numbers, (B, K + 1, C, H, W). Raises FloatingPointError: one leaves the finite numbers."""
    device, dtype = placement(reference)
    schedule = DDIMSchedule.of(scheduler, config.steps, device, substeps=_substeps(config))
    steps = len(schedule.timesteps) - 1
    noise = torch.stack([noise_of(shape, config.seed, int(row)) for row in rows])
    x_t = like_images(noise.to(device))
    chosen = spread_rows(conditioning, rows, config.points)
    start = torch.zeros(len(rows), dtype=torch.int64, device=device)
    every, met = steps // config.runs[0][1], [x_t]

    def meet(taken: int, x: Tensor) -> None:
        if taken % every == 0:
            met.append(x)

    SOLVERS[config.reference_solver](
        lambda x, t: predict_float32(reference, x, t, chosen), schedule, x_t, start, steps, meet
    )
    trajectories = torch.stack(met[-_kept(config) :], 1)
    if not trajectories.isfinite().all():
        raise overflow("drawing C_DC", dtype, scheduler)
    return trajectories


def _kept(config: CADConfig) -> int:
    """How many points of each trajectory are kept, the picture among them."""
    return 1 if config.renoised else config.runs[0][1] + 1


def _substeps(config: CADConfig) -> int:
    """Solver's steps for each of the sampler's while C_DC is drawn."""
    return 1 if config.renoised else config.substeps


def noise_of(shape: tuple[int, ...], seed: int, row: int) -> Tensor:
    """The noise of one picture: the same, whichever process draws it."""
    return torch.randn(shape, generator=torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63))


@torch.no_grad()
def check_denoising(reference: nn.Module, schedule: DDIMSchedule, images: Trajectories) -> None:
    """Look whether the network finds the noise that the scheduler says it put into the network's own pictures.

    What a trained denoiser gets wrong is orthogonal to what it says (its estimate is a conditional mean), however hard
    its pictures are: E[predicted²] = E[predicted·noise]. With other betas it is not.

    Raises:
        ValueError: the scheduler's betas or prediction type are not those that the network was trained with.
    """
    device, _ = placement(reference)
    x_0, conditioning = images.rows(torch.arange(min(CHECKED, len(images.drawn))))
    x_0 = x_0.to(device)
    steps = len(schedule.timesteps) - 1
    for step in range(steps // 4, steps, max(1, steps // 8)):
        if float(schedule.sigmas[step]) ** 2 < LEAST_NOISE:
            continue
        at = torch.full((len(x_0),), step, device=device)
        # of other rows than there are: a picture and the noise that it was drawn from are not independent
        noise = torch.stack([noise_of(tuple(x_0.shape[1:]), step, CHECKED + row) for row in range(len(x_0))]).to(x_0)
        x_t = schedule.add_noise(x_0, noise, at)
        prediction = predict_float32(reference, x_t, schedule.timesteps[at], conditioning)
        _, predicted = schedule.x_0_and_noise(prediction, x_t, at)
        departure = abs(float(predicted.square().sum() / (predicted * noise).sum()) - 1)
        if not departure <= FARTHEST:
            raise ValueError(
                f"at timestep {float(schedule.timesteps[step]):g} the noise that the network finds is "
                f"{100 * departure:.0f} % off that which the scheduler put in: it has other betas or another "
                "prediction_type than the network was trained with. If you are sure that it has not, write "
                "CADConfig(check_betas=False)"
            )


def checked_trajectories(
    reference: nn.Module,
    ddim: Sampler,
    shape: tuple[int, ...],
    config: CADConfig,
    conditioning: dict[str, Any] | None,
    *,
    images: Tensor | None,
    folder: str | Path | None,
    callback: Callable[[str, int, int], None] | None,
    progress: bool,
) -> Trajectories:
    """C_DC, of a scheduler that :func:`check_denoising` finds to fit; as :func:`draw_trajectories`."""
    rank, _ = rank_and_world()
    schedule = DDIMSchedule.of(ddim, config.steps, placement(reference)[0])
    is_guided = GUIDANCE_SCALE in (conditioning or {})
    return draw_trajectories(
        reference,
        ddim,
        shape,
        config,
        cast_floats(check_conditioning(reference, conditioning)),
        images=images,
        folder=folder,
        # a guided prediction is no estimate of the noise, and moves the pictures away from those of the network
        check=partial(check_denoising, reference, schedule) if config.check_betas and not is_guided else None,
        callback=callback,
        progress=progress and rank == 0,
    )
