"""A visit to a GPU, in one command: ``python bench/visit.py --out DIR --data PICTURES``.

The kernels are held against the reference on the card, then a step is timed beside its peers (``measured.json``).
Meanwhile a colour teacher is trained from where the last visit left it (``teacher/``, in half precision); it stands
still while anything is timed. With ``--stages teacher,quality`` a later visit quantizes and distills it on the card,
too, and draws the pictures behind its table (``quality.tar``). All of it is written as it goes, so that a visit that is
cut loses nothing, and comes back in few and small files. Needs torch 2.11 or newer with CUDA, Triton, and what
``NEEDED`` names; installs nothing. ``--rehearse`` does everything on a CPU, with tiny sizes.

This process itself imports next to nothing: on a cold machine that takes half a minute, which its children share. What
they do is in ``stages.py``, and the teacher is the recipe's.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

STAGES = ("exactness", "compile", "teacher", "quality")
MEASURED = {"exactness", "compile"}  # by one process, beside the one that trains
EXACTNESS_S, COMPILE_S, TEACHER_S = 60, 240, 360
LOADING_S = 60  # that a cold machine takes to import everything and to read the pictures
GRACE_S = 20  # for what was learned and timed to be written before the end
FILES, LARGEST = 8, 16 * 2**20  # what comes back at most, and bytes of each: some cards stand behind a narrow door
REFUSED = 2  # exit code of a visit that cannot be
SHOWN = 4000  # characters of the log that are printed
MEMORY = 15e9  # bytes of a card: training, and timing at batch 256
TRAINER = "PQCAD_VISIT_TRAINER"  # environment: the process that trains
WEIGHTS = Path("teacher", "unet", "diffusion_pytorch_model.safetensors")
FEATURES = ("classifier.safetensors", "features_test.safetensors")  # what train_classifier writes
NEEDED = [  # what pqcad_ao depends on, as it is imported
    *("torch", "torchao", "diffusers", "safetensors", "numpy", "tqdm", "tabulate", "jinja2", "huggingface_hub"),
    *("yaml", "matplotlib", "omegaconf", "cyclopts", "PIL", "psutil", "accelerate", "triton"),
]
FOR_QUALITY = ["torchmetrics", "scipy"]

# What a rehearsal shrinks: a network of seconds, on a CPU.
TINY_TEACHER = [
    *("unet.block_out_channels=[8,8]", "unet.down_block_types=[DownBlock2D,DownBlock2D]", "unet.norm_num_groups=4"),
    "unet.attention_head_dim=4",
    *("unet.up_block_types=[UpBlock2D,UpBlock2D]", "unet.layers_per_block=1", "train.batch_size=2", "train.steps=4"),
    *("train.compile=false", "train.bf16=false", "train.checkpoint_every=2", "train.grid_steps=2"),
]


def wrong(args: argparse.Namespace) -> str | None:
    """What is wrong with the command, or None."""
    unknown = [name for name in args.stages if name not in STAGES]
    if unknown:
        return f"--stages {','.join(unknown)}: allowed are {', '.join(STAGES)}"
    tabled = "quality" in args.stages
    missing = [name for name in NEEDED + FOR_QUALITY * tabled if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed here: {', '.join(missing)}. Bring their wheels, as docs/gpu.md says"
    if args.data and not Path(args.data).exists():
        return f"--data {args.data}: no such folder or tar file"
    if args.last and not Path(args.last, WEIGHTS).is_file():
        return f"--last {args.last}: it holds no {WEIGHTS}; without --last a new teacher is trained"
    if "teacher" in args.stages and not args.data:
        return "no --data: give the pictures that the teacher is trained on"
    if args.features and not all(Path(args.features, name).is_file() for name in FEATURES):
        return f"--features {args.features}: it holds no {' and '.join(FEATURES)}, which train_classifier writes"
    if tabled and not (args.features or args.rehearse):
        return "no --features: the teacher's table wants a feature network of colour pictures, from train_classifier"
    if tabled and not (args.last or "teacher" in args.stages):
        return "no --last: give what the visit that trained the teacher brought back"
    return None


def refusal(args: argparse.Namespace) -> str | None:
    """Why this machine's card cannot be visited, or None."""
    if args.rehearse:
        return None
    import torch

    if [int(part) for part in torch.__version__.split(".")[:2]] < [2, 11]:
        return f"torch {torch.__version__} is too old: 2.11 or newer is needed"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device here: --rehearse runs everything on the CPU, small"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory
    if capability < (8, 0):
        return f"{name} has compute capability {capability}: the kernels need (8, 0)"
    if memory < MEMORY:
        return f"{name} has {memory / 1e9:.0f} GB: training, and timing at batch 256, need {MEMORY / 1e9:.0f}"
    return None


def work_of(args: argparse.Namespace) -> Path:
    """The folder beside ``--out`` that need not come back: checkpoints, unpacked pictures, compressed networks."""
    out = Path(args.out).absolute()
    return out.with_name(out.name + "-work")


def unpack(file: Path, folder: Path) -> None:
    """Unpack a tar file into a folder that is not there yet, whole or not at all."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    with tarfile.open(file) as tar:
        tar.extractall(unfinished, filter="data")
    unfinished.rename(folder)


def noise_pictures(folder: Path) -> str:
    """Pictures of noise, as CIFAR-10's binary batches, for a rehearsal."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (folder / name).write_bytes(os.urandom(8 * 3073))
    return str(folder)


def teacher(args: argparse.Namespace) -> list[str]:
    """The command that trains, from the weights of the last visit if there are any."""
    seconds = args.seconds - LOADING_S - GRACE_S
    if "quality" in args.stages:
        seconds = min(TEACHER_S, seconds)
    command = [sys.executable, "-m", "pqcad_ao.recipes.train_teacher", "--data", args.data, "--config", "cifar10_small"]
    command += ["--out", str(work_of(args) / "teacher"), "--half", str(Path(args.out, "teacher"))]
    command += ["--device", "cpu" if args.rehearse else "cuda"]
    command += ["--start", str(Path(args.last, "teacher"))] if args.last else []
    return [*command, *(TINY_TEACHER if args.rehearse else [f"train.seconds={seconds}"]), f"train.seed={args.seed}"]


def attend(parts: dict[str, list[str]], ends: float, environment: dict[str, str], start: Any) -> dict[str, int | None]:
    """Run commands side by side; the exit code of each, None where its time was over or another was refused."""
    running, codes = dict[str, subprocess.Popen](), dict[str, int | None]()
    until = {"measure": ends - GRACE_S}  # the others to the end
    try:
        for name, command in parts.items():
            running[name] = start(command, env=environment)
            environment = {**environment, TRAINER: str(running[name].pid)}  # the teacher's is the first
        while len(codes) < len(running):
            for name in running.keys() - codes.keys():
                code = running[name].poll()
                if code is not None or time.monotonic() > until.get(name, ends) or REFUSED in codes.values():
                    running[name].kill()
                    running[name].wait()
                    codes[name] = code
            if "measure" in codes and "teacher" in running.keys() - codes.keys():
                running["teacher"].send_signal(signal.SIGCONT)  # what had stopped it may have been ended
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return codes


def visit(args: argparse.Namespace, argv: list[str]) -> int:
    """Measure and train side by side, then make the teacher's table, until the time is over."""
    out, work, ends = Path(args.out), work_of(args), time.monotonic() + args.seconds
    if args.rehearse and not args.data:
        args.data = noise_pictures(work / "noise")
    why = wrong(args)
    if why is None and not MEASURED & {*args.stages}:  # or the process that measures looks
        why = refusal(args)
    if why is not None:
        print(f"error: {why}")
        return REFUSED
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    if args.data and Path(args.data).is_file():
        unpack(Path(args.data), work / "pictures")
        args.data = str(work / "pictures")
    if args.last and Path(args.last, "quality.tar").is_file():
        unpack(Path(args.last, "quality.tar"), work / "quality")
    # Two programs that each start a thread for every core keep one another waiting for minutes.
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 4))}
    if args.rehearse:
        environment |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}  # to compile takes minutes
    given = [*argv, *(["--data", args.data] if args.data else [])]
    child = [sys.executable, "-m", "pqcad_ao.bench.stages"]
    beside = {"teacher": teacher(args)} if "teacher" in args.stages else {}
    if MEASURED & {*args.stages}:
        beside["measure"] = [*child, "measure", *given]
    with (out / "visit.log").open("wb") as log:
        start = partial(subprocess.Popen, stdout=log, stderr=subprocess.STDOUT)
        codes = attend(beside, ends, environment, start)
        if "quality" in args.stages and REFUSED not in codes.values():
            codes |= attend({"quality": [*child, "quality", *given]}, ends, environment, start)
    return report(out, args.seconds, codes)


def report(out: Path, seconds: float, codes: dict[str, int | None]) -> int:
    """Write ``visit.json``, which says how each stage ended, and print the end of the log; the visit's exit code."""
    said = (out / "visit.log").read_text(errors="replace")
    stages = dict(re.findall(r"^stage (.+): ((?:done|cut|failed|interrupted).*)$", said, re.MULTILINE))
    if "teacher" in codes:
        stages["teacher"] = {0: "done", None: "cut at the end"}.get(codes["teacher"], "failed, see visit.log")
    unfinished = out / ".visit.json"
    unfinished.write_text(json.dumps({"seconds": seconds, "codes": codes, "stages": stages}, indent=2) + "\n")
    unfinished.replace(out / "visit.json")
    print(said[-SHOWN:])
    files = [path for path in out.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    if len(files) > FILES or largest.stat().st_size > LARGEST:
        print(f"{out} holds {len(files)} files, {largest} is the largest: more than {FILES}, or than {LARGEST:,} bytes")
    if REFUSED in codes.values():
        return REFUSED
    return int(any(code != 0 for code in codes.values()))


def parsed(argv: list[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def counts(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, help="receives what was found; what need not come back is beside it")
    parser.add_argument("--data", help="colour pictures: a folder as train_teacher takes it, or a tar file of one")
    parser.add_argument("--last", help="the --out of the last visit: its teacher and its table go on")
    parser.add_argument("--features", help="what train_classifier wrote, with network.in_channels=3; for the table")
    parser.add_argument(
        "--stages", type=names, help=f"{','.join(STAGES)} (without quality, and teacher without --data)"
    )
    parser.add_argument("--seconds", type=float, default=EXACTNESS_S + COMPILE_S + TEACHER_S, help="of the visit (660)")
    parser.add_argument("--compile-seconds", type=float, default=COMPILE_S, help="of all timed networks together (240)")
    parser.add_argument("--models", type=names, help="networks that are timed (ddpm-cifar10,sd15)")
    parser.add_argument("--batches", type=counts, help="of each of them (256,64,16,1, of sd15 8,1)")
    parser.add_argument("--rows", type=names, help="contenders, as pqcad bench compile --device cuda has them (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the teacher's data: another one for each visit")
    parser.add_argument("--rehearse", action="store_true", help="everything on the CPU, with tiny sizes")
    args = parser.parse_args(argv)
    if args.stages is None:
        args.stages = [*STAGES] if args.rehearse else [*STAGES[: 3 if args.data else 2]]
    return args


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    return visit(parsed(argv), argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this process ends its children, too
    sys.exit(main())
