"""What the processes of a visit to a GPU do (``visit.py``): measuring, and making the teacher's table."""

import argparse
import contextlib
import io
import os
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

from pqcad_ao.bench.compile import gpu
from pqcad_ao.bench.compile.worker import reason
from pqcad_ao.bench.quality.command import table
from pqcad_ao.bench.quality.measure import bench_quality
from pqcad_ao.bench.visit import EXACTNESS_S, REFUSED, TRAINER, WEIGHTS, parsed, refusal, work_of
from pqcad_ao.data import load_images
from pqcad_ao.evaluate.features import FeatureClassifier, RealFeatures, features_in
from pqcad_ao.models import save_model
from pqcad_ao.utils.files import write_json, write_whole

SETTLE_S = 0.5  # what a stopped process has queued on the card
MODELS = ["ddpm-cifar10", "sd15"]
BATCHES = {"ddpm-cifar10": [256, 64, 16, 1], "sd15": [8, 1]}
TABLE = ["fp_full", "fp_half", "pq_w4a6", "pqcad_half_w4a6"]  # rows of pqcad bench quality
STEPS = (20, 100)  # of the table's two parts, the quicker one first; a distilled network takes half of them
IMAGES = 50_000

# What a rehearsal shrinks, where the teacher has learned nothing.
TINY_STEPS = (2, 4)
TINY_PQ: dict[str, Any] = {
    "calibration_points": 8,
    "calibration_batch_size": 8,
    "timestep_groups": 2,
    "learning_points": 4,
}
TINY_PQ |= {"batch_size": 4, "iterations": 24, "beta": 0.5, "window": 1, "patience": 1}
TINY_CAD = {"iterations": 2, "batch_size": 4, "points": 4, "check_betas": False}


class Over(BaseException):
    """A stage's time is over. No Exception: what a rival raises is a row that says so, and the benchmark goes on."""


@contextlib.contextmanager
def stage(name: str, seconds: float, ended: dict[str, str]) -> Iterator[None]:
    """Run a stage for so many seconds at most; how it ended is printed, and put into ``ended``."""

    def over(*_: Any) -> None:
        raise Over

    before = signal.signal(signal.SIGALRM, over)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
        ended[name] = "done"
    except Over:
        ended[name] = f"cut after {seconds:.0f} s"
    except Exception as error:  # the next stage may be luckier
        traceback.print_exc()
        ended[name] = f"failed, {reason(error)}"
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)
        print(f"\nstage {name}: {ended.get(name, 'interrupted')}", flush=True)


@contextlib.contextmanager
def alone(trainer: psutil.Process | None) -> Iterator[None]:
    """Stop the process that trains, so that what is timed has the card for itself."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended
        if trainer is not None:
            trainer.suspend()
            time.sleep(SETTLE_S)
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            if trainer is not None:
                trainer.resume()


def measure(args: argparse.Namespace) -> int:
    """Exactness, then the benchmark, in one process: to import everything takes half a minute on a cold machine."""
    from pqcad_ao.bench.compile.exactness import exactness  # needs Triton

    device, ended, measured = "cpu" if args.rehearse else "cuda", dict[str, str](), dict[str, Any]()
    trainer = None
    with contextlib.suppress(KeyError, psutil.NoSuchProcess):
        trainer = psutil.Process(int(os.environ[TRAINER]))

    def keep(name: str, found: dict[str, Any]) -> None:
        measured[name] = found
        write_json(Path(args.out) / "measured.json", measured)

    if "exactness" in args.stages:
        with stage("exactness", EXACTNESS_S, ended):
            exactness(device, args.rehearse, partial(keep, "exactness"))
    models = args.models or (tiny_models(work_of(args)) if args.rehearse else MODELS)
    for model in models if "compile" in args.stages else ():
        name, options = f"compile {model}", {"rounds": 1, "iterations": 1} if args.rehearse else {}
        batches = args.batches or ([2] if args.rehearse else BATCHES.get(model, gpu.BATCHES))
        with stage(name, args.compile_seconds / len(models), ended):
            found = gpu.bench_compile_gpu(
                model,
                device=device,
                batches=batches,
                rows=args.rows,
                kept=partial(keep, name),
                timing=partial(alone, trainer),
                **options,
            )
            print(gpu.table(found))
        torch.compiler.reset()  # the graphs of one network hold memory that the next one's want
    return 0 if set(ended.values()) == {"done"} else 1


def tiny_models(work: Path) -> list[str]:
    """Folders of two tiny networks, one without text and one with it."""
    sizes: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1}
    sizes |= {"norm_num_groups": 4, "attention_head_dim": 4}
    plain = UNet2DModel(**sizes, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    text = UNet2DConditionModel(
        **sizes,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    for name, unet in (("plain", plain), ("text", text)):
        save_model(unet, DDIMScheduler(), work / name)
    return [str(work / name) for name in ("plain", "text")]


def quality(args: argparse.Namespace) -> int:
    """Quantize and distill the teacher and draw what its table is of; rows of the last visit are not made again."""
    out, home, ended = Path(args.out), work_of(args) / "quality", dict[str, str]()
    model = (out if (out / WEIGHTS).is_file() else Path(args.last)) / "teacher"
    options: dict[str, Any] = {"n": IMAGES, "device": "cuda", "compiled": True}
    if args.rehearse:
        options = {"n": 6, "options": TINY_PQ, "cad_options": TINY_CAD}

    def say(line: str) -> None:
        print(line, flush=True)
        pack(home, out / "quality.tar")

    for steps in TINY_STEPS if args.rehearse else STEPS:
        with stage(f"quality of {steps} steps", args.seconds, ended):
            features = features_in(args.features) if args.features else tiny_features(args.data)
            result = bench_quality(
                str(model), rows=TABLE, steps=steps, work=home, features=features, say=say, **options
            )
            print(table(result))
    return 0 if set(ended.values()) == {"done"} else 1


def tiny_features(data: str) -> tuple[Any, RealFeatures]:
    """A feature network that has learned nothing, and what it sees in the test pictures."""
    network = FeatureClassifier(3, channels=(4, 8)).eval()
    return network, RealFeatures.from_images(load_images(data, "test")[0], network)


def pack(home: Path, file: Path) -> None:
    """Put what is finished in a work folder into one file: rows, pictures and networks, not what they learn from."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for path in sorted(home.rglob("*")):
            parts = path.relative_to(home).parts
            if path.is_file() and "learning" not in parts and not any(part.startswith(".") for part in parts):
                tar.add(path, "/".join(parts))
    write_whole(file, content.getvalue())


def main(argv: list[str]) -> int:
    """Do what the first argument names; the others are those of ``visit.py``."""
    args = parsed(argv[1:])
    why = refusal(args)
    if why is not None:
        print(f"error: {why}")
        return REFUSED
    return {"measure": measure, "quality": quality}[argv[0]](args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
