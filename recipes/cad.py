"""Progressive quantization, then distillation: ``python -m pqcad_ao.recipes.cad --model M --out DIR``.

On several processes: ``torchrun --nproc-per-node K -m pqcad_ao.recipes.cad ...``. Every process has the whole network
and a share of each batch, so K processes learn what one does, up to the order of floating-point sums. The first one
quantizes; what it calibrates on and the pictures are drawn by all. What is killed goes on with the same command and
the same ``--out``.
"""

import contextlib
import copy
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cyclopts import App
from torch import distributed as dist
from torch import nn

from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.data import some_images
from pqcad_ao.denoiser import sample_shape
from pqcad_ao.diffusion.calibration import calibration_set
from pqcad_ao.diffusion.process import settings_of
from pqcad_ao.diffusion.trajectories import checked_trajectories
from pqcad_ao.distill import check_distillation, distill_
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.quantize import quantize_
from pqcad_ao.utils.files import digest, write_whole
from pqcad_ao.utils.machine import check_device
from pqcad_ao.utils.options import NONE_GIVEN, WRITTEN, command_line, options
from pqcad_ao.utils.processes import rank_and_world, wait_for_all

if TYPE_CHECKING:
    Quantizing = dict[str, Any]
    Distilling = dict[str, Any]
else:  # made at run time, where no type checker looks
    Quantizing = options(PQCADConfig, "Quantizing (PQCADConfig)", without=(), **WRITTEN)
    Distilling = options(CADConfig, "Distilling (CADConfig)", without=())


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[int, torch.device]]:
    """This process's rank and device; under torchrun, the group of all is there meanwhile."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    place = check_device(f"cuda:{local}" if device == "cuda" else device)
    if "WORLD_SIZE" not in os.environ:
        yield rank, place
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    # all wait while the first one quantizes; a process that dies is torchrun's business, which ends the others
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(days=7))
    try:
        yield rank, place
    finally:
        dist.destroy_process_group()


def compress_on_all(
    teacher: nn.Module,
    scheduler: Any,
    pq: PQCADConfig,
    cad: CADConfig,
    out: Path,
    *,
    rank: int = 0,
    images: torch.Tensor | None = None,
    progress: bool = True,
) -> nn.Module:
    """Quantize in the first process, distill in all; leaves the network and its sampler in ``out``.

    Args:
        teacher: full precision, on this process's device. images: real pictures for C_DC, (N, C, H, W) in [-1, 1].
        pq: its ``calibration_steps`` become ``cad.steps``.

    Raises:
        ValueError: ``out`` holds a network that was quantized from something else or in another
            way; and as ``quantize_`` and ``distill_``.
    """
    device = next(teacher.parameters()).device
    ddim, shape = check_distillation(teacher, scheduler, cad, images=images)
    quantized, name = out / "quantized", out / "quantized.txt"
    settings = replace(pq, calibration_steps=cad.steps)
    made_from = digest(teacher.state_dict(), settings_of(scheduler), settings)
    if (quantized / "model_index.json").is_file() and not (name.is_file() and name.read_text() == made_from):
        raise ValueError(
            f"{quantized} was made from another network, scheduler or PQCADConfig: give another folder, or delete it"
        )
    wait_for_all()  # nobody looks for what the first one begins to write
    unquantized = not (quantized / "model_index.json").is_file()
    keeps: dict[str, Any] = {"folder": out / "work", "callback": None, "progress": progress}
    # before anything is learned: it finds out whether the scheduler fits
    checked_trajectories(teacher, ddim, shape, cad, None, images=images, **keeps)
    if unquantized:
        student = copy.deepcopy(teacher)
    if unquantized and dist.is_initialized():
        # of the copy, as quantize_ does: what a network computes depends in its last bits on where its weights lie in
        # memory, which for one that was just read is anywhere
        shared: dict[str, Any] = {"folder": out / "work", "share": rank_and_world(), "progress": progress and rank == 0}
        calibration_set(student, ddim, shape, settings, **shared)
    if unquantized and rank == 0:
        quantize_(student, settings, scheduler=ddim, folder=out / "work", progress=progress)
        write_whole(name, made_from.encode())
        save_model(student, scheduler, quantized)
    wait_for_all()
    student = load_model(quantized)[0].to(device)
    sampler = distill_(student, teacher, scheduler, cad, images=images, folder=out / "work", progress=progress)
    if rank == 0:
        save_model(student, sampler, out)
    return student


def run(
    *,
    model: str,
    out: Path,
    data: Path | None = None,
    device: str = "cpu",
    pq: Quantizing = NONE_GIVEN,
    cad: Distilling = NONE_GIVEN,
) -> None:
    """Progressive quantization, then distillation, on one process or, under torchrun, on several.

    Args:
        model: demo, or a folder with a full-precision diffusers UNet.
        out: folder that receives unet/ and scheduler/; keeps the work in work/.
        data: folder with real pictures for up to half of C_DC; none are needed.
        device: cpu, or cuda: a GPU for each process.
    """
    config, halving = PQCADConfig(**pq), CADConfig(**cad)
    with processes(device) as (rank, place):
        teacher, scheduler = load_model(model)
        images = None
        if data is not None:
            images = some_images(data, sample_shape(teacher), halving.points, halving.seed)
        teacher.to(place)
        student = compress_on_all(teacher, scheduler, config, halving, out, rank=rank, images=images, progress=True)
        if rank == 0:
            state = quantized_state(student)
            schedule = state.timestep.schedule if state else None
            print(f"{out}: {len(schedule or [])} steps, {state.plan.summary() if state else ''}")


def main(argv: list[str] | None = None) -> int:
    app = App(name="python -m pqcad_ao.recipes.cad", help_format="plaintext", version_flags=[])
    app.default(run)
    command, bound = command_line(app, sys.argv[1:] if argv is None else argv)
    try:
        command(*bound.args, **bound.kwargs)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
