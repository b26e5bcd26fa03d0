"""C_DC: pictures that full precision drew, and a look whether its noise process and the network belong together."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from pqcad_ao.config import CADConfig
from pqcad_ao.denoiser import (
    cast_floats,
    check_conditioning,
    evaluation_mode,
    placement,
    predict_float32,
    spread_rows,
)
from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.process import settings_of
from pqcad_ao.diffusion.sampling import overflow
from pqcad_ao.diffusion.solvers import SOLVERS
from pqcad_ao.utils.files import digest, whole_file, write_whole
from pqcad_ao.utils.processes import rank_and_world, wait_for_all

CHECKED = 64  # pictures behind the denoising check
LEAST_NOISE = 0.05  # power of the noise at the timesteps it looks at: of less, little is to be found
FARTHEST = 0.04  # that a network's noise may be off; of the embedded teacher at most 0.011, with other betas from 0.06


class CleanImages:
    """C_DC's pictures: drawn by the full-precision network, kept on disk where there is a folder, read row by row.

    Args:
        extra: (N, C, H, W) further pictures in [-1, 1], such as real ones.
    """

    def __init__(self, drawn: Any, conditioning: dict[str, Any], extra: Tensor | None) -> None:
        self.drawn, self.conditioning, self.extra = drawn, conditioning, extra

    def __len__(self) -> int:
        return len(self.drawn) + (0 if self.extra is None else len(self.extra))

    def rows(self, index: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Pictures (B, C, H, W) of these numbers, on the CPU, and their conditioning."""
        own = index % len(self.drawn)
        images = torch.from_numpy(np.array(self.drawn[own.numpy()]))
        if self.extra is not None:
            real = index >= len(self.drawn)
            images[real] = self.extra[index[real] - len(self.drawn)].to(images.dtype)
        return images, spread_rows(self.conditioning, own, len(self.drawn))


def clean_images(
    reference: nn.Module,
    scheduler: DDIMScheduler,
    shape: tuple[int, int, int],
    config: CADConfig,
    conditioning: dict[str, Any],
    *,
    images: Tensor | None = None,
    folder: str | Path | None = None,
    check: Callable[[CleanImages], None] | None = None,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = False,
) -> CleanImages:
    """Draw ``config.points`` pictures with the full-precision network: ``config.steps`` of ``config.reference_solver``.

    Args:
        folder: keeps them in a file that is mapped rather than read, so that they may be more than memory holds. A draw
            that was cut short goes on with its next batch. Several processes draw a share each, into one file.
        check: looks at the pictures as soon as the first ``CHECKED`` are there; what it raises ends the draw.

    Raises:
        FloatingPointError: a picture leaves the finite numbers. ValueError: several processes and no folder, or a
            damaged file.
    """
    rank, world = rank_and_world()
    count, size = config.points, config.generation_batch_size
    starts = list(range(0, count, size))[rank::world]
    if folder is None:
        if world > 1:
            raise ValueError("several processes share C_DC in a file: give a folder")
        store = _Store(np.zeros((count, *shape), np.float32))
    else:
        key = digest(
            reference.state_dict(),
            settings_of(scheduler),
            config.steps,
            config.reference_solver,
            config.seed,
            count,
            shape,
            conditioning,
        )
        store = _Store.open(Path(folder), key, (count, *shape), size)
    done = store.batches_done(len(starts))
    pictures = CleanImages(store.images, conditioning, images)
    bar = tqdm(total=len(starts), initial=done, desc="pictures", disable=not progress, leave=False)

    def draw(numbers: range) -> None:
        """These of this process's batches."""
        for number in numbers:
            rows = torch.arange(starts[number], min(starts[number] + size, count))
            store.put(rows, _batch(reference, scheduler, shape, config, conditioning, rows), number)
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
    return pictures


@torch.no_grad()
def _batch(
    reference: nn.Module,
    scheduler: DDIMScheduler,
    shape: tuple[int, int, int],
    config: CADConfig,
    conditioning: dict[str, Any],
    rows: Tensor,
) -> Tensor:
    """The pictures of these numbers, (B, C, H, W). Raises FloatingPointError: one leaves the finite numbers."""
    device, dtype = placement(reference)
    schedule = DDIMSchedule.of(scheduler, config.steps, device)
    noise = torch.stack([noise_of(shape, config.seed, int(row)) for row in rows])
    x_t = noise.to(device, memory_format=torch.channels_last)  # as convolutions like it best
    chosen = spread_rows(conditioning, rows, config.points)
    start = torch.zeros(len(rows), dtype=torch.int64, device=device)
    solve = SOLVERS[config.reference_solver]
    pictures = solve(lambda x, t: predict_float32(reference, x, t, chosen), schedule, x_t, start, config.steps)
    if not pictures.isfinite().all():
        raise overflow("drawing C_DC", dtype, scheduler)
    return pictures


@dataclass
class _Store:
    """Where pictures are kept while they are drawn: memory, or a file and marks of what is in it.

    Attributes:
        images: (N, C, H, W) float32 array, of a file mapped rather than read.
        marks: file with the number of this process's batches that are there. whole: file that says that all are,
            however they were shared. None in memory.
    """

    images: Any
    marks: Path | None = None
    whole: Path | None = None

    @classmethod
    def open(cls, folder: Path, key: str, shape: tuple[int, ...], batch_size: int) -> "_Store":
        """The file of these pictures, made by the first process if it is not there."""
        rank, world = rank_and_world()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"c_dc-{key}.npy"
        if rank == 0 and not file.is_file():
            for old in folder.glob(f"c_dc-{key}.*.json"):
                old.unlink()
            with whole_file(file) as unfinished:
                np.lib.format.open_memmap(unfinished, "w+", np.float32, shape).flush()
        wait_for_all()
        marks = folder / f"c_dc-{key}.{batch_size}-{world}-{rank}.json"
        return cls(_mapped(file), marks, folder / f"c_dc-{key}.whole.json")

    def batches_done(self, of: int) -> int:
        """How many of this process's batches are there."""
        if self.whole is not None and self.whole.is_file():
            return of
        return json.loads(self.marks.read_text()) if self.marks is not None and self.marks.is_file() else 0

    def put(self, rows: Tensor, pictures: Tensor, number: int) -> None:
        """Keep the ``number``-th batch of this process."""
        self.images[rows.numpy()] = pictures.float().cpu().numpy()
        if self.marks is not None:
            self.images.flush()
            write_whole(self.marks, json.dumps(number + 1).encode())

    def finish(self) -> None:
        """Remember that all are there."""
        if self.whole is not None:
            write_whole(self.whole, b"true")


def _mapped(file: Path) -> Any:
    """The pictures of a file, to read and write.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        np.lib.format.open_memmap(file, "r")  # for writing, NumPy would fill up a file that was cut short with zeros
        return np.lib.format.open_memmap(file, "r+")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and its pictures are drawn again") from error


def noise_of(shape: tuple[int, ...], seed: int, row: int) -> Tensor:
    """The noise of one picture: the same, whichever process draws it."""
    return torch.randn(shape, generator=torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63))


@torch.no_grad()
def check_denoising(reference: nn.Module, schedule: DDIMSchedule, images: CleanImages) -> None:
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
                f"at timestep {int(schedule.timesteps[step])} the noise that the network finds is "
                f"{100 * departure:.0f} % off that which the scheduler put in: it has other betas or another "
                "prediction_type than the network was trained with. If you are sure that it has not, write "
                "CADConfig(check_betas=False)"
            )


def checked_images(
    reference: nn.Module,
    ddim: DDIMScheduler,
    shape: tuple[int, int, int],
    config: CADConfig,
    conditioning: dict[str, Any] | None,
    *,
    images: Tensor | None,
    folder: str | Path | None,
    callback: Callable[[str, int, int], None] | None,
    progress: bool,
) -> CleanImages:
    """C_DC, of a scheduler that :func:`check_denoising` finds to fit; as :func:`clean_images`."""
    rank, _ = rank_and_world()
    schedule = DDIMSchedule.of(ddim, config.steps, placement(reference)[0])
    return clean_images(
        reference,
        ddim,
        shape,
        config,
        cast_floats(check_conditioning(reference, conditioning)),
        images=images,
        folder=folder,
        check=partial(check_denoising, reference, schedule) if config.check_betas else None,
        callback=callback,
        progress=progress and rank == 0,
    )
