"""A visit to a GPU, in one command: ``python bench/visit.py --out DIR --data IMAGES``.

Three things are done, and each is written as it goes, so that a visit that is cut loses nothing: the kernels are held
against the reference (``exactness.json``), a step is timed beside its peers (``compile.json``), and a colour teacher is
trained from where the last visit left it (``teacher/``, in half precision). The teacher trains while contenders are
compiled, and is stopped while anything is timed. Needs torch 2.11 or newer with CUDA and Triton; installs nothing.
This process itself imports next to nothing: on a cold machine that takes half a minute, which its two children share.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

EXACTNESS_S, COMPILE_S, TEACHER_S = 60, 240, 360
GRACE_S = 20  # that a teacher has to write its weights after its time
SETTLE_S = 0.5  # what a stopped process has queued on the card
REFUSED = 2  # exit code of a machine that cannot be visited
LOG = 4000  # characters of the measurements' output that are shown
TRAINER = "PQCAD_VISIT_TRAINER"  # environment: the process that trains

# What a rehearsal shrinks: a network of seconds, on a CPU.
TINY_TEACHER = [
    *("unet.block_out_channels=[8,8]", "unet.down_block_types=[DownBlock2D,DownBlock2D]", "unet.norm_num_groups=4"),
    "unet.attention_head_dim=4",
    *("unet.up_block_types=[UpBlock2D,UpBlock2D]", "unet.layers_per_block=1", "train.batch_size=2", "train.steps=4"),
    *("train.compile=false", "train.bf16=false", "train.checkpoint_every=2", "train.grid_steps=2"),
]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Stop the process that trains, so that what is timed has the card for itself."""
    trainer = int(os.environ.get(TRAINER, 0))
    with contextlib.suppress(ProcessLookupError):  # it may have ended
        if trainer:
            os.kill(trainer, signal.SIGSTOP)
            time.sleep(SETTLE_S)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            if trainer:
                os.kill(trainer, signal.SIGCONT)


def write(path: Path, content: dict[str, Any]) -> None:
    from pqcad_ao.utils.files import write_whole

    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


# ------------------------------------------------------------------------------------------------------- exactness


def layers(rehearse: bool) -> list[tuple[Any, ...]]:
    """Batch, segments, output channels, pixels, kernel, stride, dilation, groups, weight bits and kind of addend."""
    if rehearse:
        return [(2, [32], 24, 6, 3, 1, 1, 1, 4, "pixels"), (1, [12, 4], 8, 5, 1, 2, 1, 1, 5, "none")]
    return [
        (64, [128], 128, 32, 3, 1, 1, 1, 4, "pixels"),
        (16, [256, 128], 128, 32, 3, 1, 1, 1, 4, "channels"),
        (64, [256], 256, 16, 3, 1, 1, 1, 4, "none"),
        (64, [256], 256, 16, 1, 1, 1, 1, 4, "pixels"),
        (3, [256, 256], 256, 8, 1, 1, 1, 1, 4, "none"),
        (1, [96], 72, 7, 3, 1, 1, 1, 4, "pixels"),
        (4, [64], 64, 20, 3, 1, 2, 1, 5, "none"),
        (4, [128], 128, 33, 3, 2, 1, 1, 4, "none"),
        (4, [64], 64, 16, 3, 1, 1, 2, 4, "none"),
        (4, [3], 64, 32, 3, 1, 1, 1, 8, "none"),
        (4, [32, 32, 32], 64, 8, 3, 1, 1, 1, 4, "none"),
    ]


QUANTIZERS = [  # batch, channels of the images side by side, pixels, groups, upsampling
    *((16, [128], 32, 32, 1), (16, [256, 128], 32, 32, 1), (16, [256], 16, 32, 2), (4, [320], 64, 32, 1)),
    (16, [64, 96], 16, 0, 1),
]


def exactness(out: Path, device: str, rehearse: bool) -> None:
    """Hold every form of every layer, and the quantizer, against the reference on the card."""
    import torch

    from pqcad_ao.ops.triton import forms, kernels, tma

    generator = torch.Generator(device).manual_seed(0)
    engine = rehearse or torch.cuda.get_device_capability() >= forms.COPY_ENGINE
    result: dict[str, Any] = {"device": device if rehearse else torch.cuda.get_device_name(), "wrong": {}}
    result["torch"], start = torch.__version__, time.perf_counter()
    chosen = layers(rehearse)
    arguments = [_layer(layer, generator) for layer in chosen]
    names = [str(blocks) for blocks in (*kernels.DIRECT, *kernels.WIDE, *(tma.TMA if engine else ()))]
    result["layers"] = dict.fromkeys(names, 0)

    def check(name: str) -> None:  # a form's layers one after another: kernels of several forms compile side by side
        for layer, (given, sums) in zip(chosen, arguments, strict=True):
            served = map(str, tma.blocks_for(len(given[2]), given[6], given[7], given[8], given[11]))
            if name in tma.BLOCKS and name not in served:
                continue
            result["layers"][name] += 1
            if not torch.equal(forms.run(name, given).double(), sums):
                result["wrong"].setdefault(name, []).append(list(layer))

    with ThreadPoolExecutor(1 if rehearse else os.cpu_count()) as pool:
        for _ in pool.map(check, names):
            result["seconds"] = time.perf_counter() - start
            write(out / "exactness.json", result)
    result["quantizers"] = [_quantizer(row, generator) for row in ([(2, [16, 8], 8, 8, 2)] if rehearse else QUANTIZERS)]
    result["seconds"] = time.perf_counter() - start
    write(out / "exactness.json", result)


def _quantizer(row: tuple[Any, ...], generator: Any) -> dict[str, Any]:
    """How many integers of GroupNorm, SiLU and quantizer differ from the reference's, and by how much at most."""
    import torch

    from pqcad_ao.ops import reference
    from pqcad_ao.ops.triton import norm

    batch, channels, pixels, groups, upsample = row
    device = generator.device
    options = {"generator": generator, "device": device, "dtype": torch.bfloat16 if device.type == "cuda" else None}
    images = [3 + torch.randn(batch, width, pixels, pixels, **options) for width in channels]
    weight, bias = torch.randn(2, sum(channels), **options) if groups else (None, None)
    scale = torch.rand(batch, len(channels), generator=generator, device=device) + 0.1
    low = torch.full(scale.shape, -4, dtype=torch.int16, device=device)
    given = (images, weight, bias, groups, 1e-5, True, scale, low, channels, 4, upsample)
    apart = (norm.norm_silu_quantize(*given).int() - reference.norm_silu_quantize(*given).int()).abs()
    return {"shape": list(row), "most": int(apart.max()), "part": float((apart > 0).double().mean())}


def _layer(layer: tuple[Any, ...], generator: Any) -> tuple[list[Any], Any]:
    """Arguments of ``pqcad::conv2d`` with scales of one, and its exact integer sums, (B, O, H', W') float64."""
    import torch

    from pqcad_ao.ops import reference
    from pqcad_ao.ops.packing import pack

    batch, segments, out_channels, pixels, kernel, stride, dilation, groups, bits, kind = layer
    device, channels = generator.device, sum(segments)
    on_device = {"generator": generator, "device": device, "dtype": torch.int8}
    x = torch.randint(-8, 8, (batch, channels, pixels, pixels), **on_device)
    x = x.contiguous(memory_format=torch.channels_last)
    highest = 2 ** (bits - 1)
    weight = torch.randint(-highest, highest, (out_channels, kernel * kernel * channels // groups), **on_device)
    packed = pack(weight, bits)
    geometry = ([kernel] * 2, [stride] * 2, [dilation * (kernel // 2)] * 2, [dilation] * 2, groups)
    parts = reference.conv2d_accumulators(x, packed, bits, segments, *geometry)
    sums = torch.stack([part.double() for part in parts]).sum(0)
    ones = torch.ones(out_channels, device=device), torch.ones(batch, len(segments), device=device), None
    addend = None
    if kind != "none":
        shape = sums.shape if kind == "pixels" else (*sums.shape[:2], 1, 1)
        addend = torch.randint(-9, 9, shape, generator=generator, device=device).float()
        sums = sums + addend
    return [x, packed, *ones, bits, segments, *geometry, torch.float32, 4, addend], sums


# ---------------------------------------------------------------------------------------------------------- stages


def measure(args: argparse.Namespace) -> None:
    """Exactness, then the benchmark, in one process: to import everything takes half a minute on a cold machine."""
    out, device = Path(args.out), "cpu" if args.rehearse else "cuda"
    with _limited(EXACTNESS_S):
        exactness(out, device, args.rehearse)

    from pqcad_ao.bench.compile import gpu

    options: dict[str, Any] = {"batches": args.batches, "rows": args.rows}
    if args.rehearse:
        options = {"batches": [2], "rows": ["torch_eager_bf16"], "rounds": 1, "iterations": 1}
    file = out / "compile.json"
    print(gpu.table(gpu.bench_compile_gpu(args.model, device=device, json_path=file, timing=alone, **options)))


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Leave a stage after so many seconds; what it has written stays."""

    def over(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    except TimeoutError:
        print(f"cut after {seconds} s", file=sys.stderr)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def start_teacher(args: argparse.Namespace, seconds: float, environment: dict[str, str]) -> subprocess.Popen:
    """Train in a process of its own, for so long at most, from the weights of the last visit if there are any."""
    out = Path(args.out)
    command = [sys.executable, "-m", "pqcad_ao.recipes.train_teacher", "--data", args.data, "--out", str(out / "work")]
    command += ["--config", "cifar10_small", "--device", "cpu" if args.rehearse else "cuda"]
    if args.teacher:
        command += ["--start", args.teacher]
    command += TINY_TEACHER if args.rehearse else [f"train.seconds={seconds}", f"train.seed={args.seed}"]
    return subprocess.Popen(command, stdout=(out / "teacher.log").open("w"), stderr=subprocess.STDOUT, env=environment)


def keep_teacher(out: Path) -> bool:
    """Write the averaged weights in half precision, from which the next visit starts; False if there are none."""
    work = out / "work" / "unet"
    if not (work / "config.json").is_file():
        return False
    import torch
    from diffusers import DDIMScheduler, UNet2DModel

    UNet2DModel.from_pretrained(work).to(torch.float16).save_pretrained(out / "teacher" / "unet")
    DDIMScheduler.from_pretrained(out / "work" / "scheduler").save_pretrained(out / "teacher" / "scheduler")
    return True


def refusal(args: argparse.Namespace) -> str | None:
    """Why this machine cannot be visited, or None."""
    if args.rehearse:
        return None
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device here: --rehearse runs everything on the CPU, small"
    capability, memory = torch.cuda.get_device_capability(), torch.cuda.get_device_properties(0).total_memory
    if capability < (8, 0):
        return f"{torch.cuda.get_device_name()} has compute capability {capability}: the kernels need (8, 0)"
    if memory < 15e9:
        return f"{torch.cuda.get_device_name()} has {memory / 1e9:.0f} GB: training and timing at batch 256 need 15"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, help="receives what was found")
    parser.add_argument(
        "--data", help="a folder of colour images, as train_teacher takes it; without it none is trained"
    )
    parser.add_argument("--teacher", help="the teacher/ of the last visit, to go on from")
    parser.add_argument("--seconds", type=float, default=EXACTNESS_S + COMPILE_S + TEACHER_S, help="of the visit (660)")
    parser.add_argument("--model", default="ddpm-cifar10", help="the network that is timed (ddpm-cifar10)")
    parser.add_argument(
        "--batches", type=lambda text: [int(part) for part in text.split(",")], default=[256, 64, 16, 1]
    )
    parser.add_argument("--rows", type=lambda text: text.split(","), help="contenders (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the teacher's data: another one for each visit")
    parser.add_argument("--rehearse", action="store_true", help="everything on the CPU, with tiny sizes")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # the process that times
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not args.measure:
        return visit(args, list(sys.argv[1:] if argv is None else argv))
    why = refusal(args)
    if why is not None:
        print(f"error: {why}")
        return REFUSED
    measure(args)
    return 0


def visit(args: argparse.Namespace, argv: list[str]) -> int:
    """Both processes side by side, until the time is over."""
    out, starts = Path(args.out), time.monotonic()
    # Two programs that each start a thread for every core keep one another waiting for minutes.
    environment, trainer = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 4))}, None
    if args.rehearse:
        environment["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    if args.data:
        trainer = start_teacher(args, args.seconds - GRACE_S, environment)
        environment[TRAINER] = str(trainer.pid)
    command = [sys.executable, __file__, *argv, "--measure"]
    with (out / "measure.log").open("w") as log:
        measuring = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        codes: dict[str, int | None] = {"measure": _end(measuring, starts + args.seconds - GRACE_S)}
    if trainer is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(trainer.pid, signal.SIGCONT)  # where its stopper was ended
        codes["teacher"] = _end(trainer, starts + args.seconds if codes["measure"] != REFUSED else 0)
        codes["kept"] = int(keep_teacher(out))
    print((out / "measure.log").read_text()[-LOG:])
    (out / "visit.json").write_text(json.dumps({"seconds": args.seconds, "codes": codes}, indent=2) + "\n")
    if codes["measure"] == REFUSED:
        return REFUSED
    return 0 if codes["measure"] == 0 and codes.get("teacher", 0) == 0 else 1


def _end(process: subprocess.Popen, ends: float) -> int | None:
    """A process's exit code, or None where its time was over first."""
    try:
        return process.wait(max(1.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


if __name__ == "__main__":
    sys.exit(main())
