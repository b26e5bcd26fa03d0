"""What a change of the code alone must leave as it is, bit for bit.

``python tests/golden.py --write FILE`` before it, ``--compare FILE`` after it.

Networks quantized, learned, distilled, saved, compiled, exported and sampled from, through public names alone. Floating
point differs between processors, numbers of threads and versions of libraries, so a file holds for one machine; on
another one it is refused. Takes a minute or two on one thread.
"""

import argparse
import copy
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from pqcad_ao import CADConfig, PQCADConfig, PTESampler, distill_, export_pte, load_quantized, plan, quantize_
from pqcad_ao import save_quantized as save_plain
from pqcad_ao.models import load_model, save_model

TINY_PQ = {
    "calibration_points": 16,
    "calibration_steps": 4,
    "calibration_batch_size": 8,
    "timestep_groups": 4,
    "learning_points": 16,
    "batch_size": 4,
    "iterations": 40,
    "weight_share": 0.4,
    "beta": 0.5,
    "window": 1,
    "patience": 1,
    "weight_ladder": [8, 6, 5],
    "activation_ladder": [8, 6],
}
PTQ = {"mode": "ptq", "calibration_points": 8, "calibration_steps": 4, "calibration_batch_size": 4}
CAD = {
    "steps": 4,
    "iterations": 4,
    "batch_size": 4,
    "points": 8,
    "generation_batch_size": 4,
    "reference_solver": "ddim",
    "reference_substeps": 1,
    "learning_rate": 2e-4,
}


def machine() -> dict[str, Any]:
    """All that the last bits depend on besides the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    kept = ("model name", "cpu family", "model", "stepping")
    found = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    return {
        "processor": {name: found[name] for name in kept if name in found} or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "environment": {
            name: os.environ[name] for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in os.environ
        },
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "torchao", "diffusers", "executorch", "numpy")},
    }


def of_bytes(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()[:16]


def of(value: Tensor) -> str:
    """A tensor by type, shape and content; its mean size is there for eyes."""
    value = value.detach().cpu().contiguous()
    content = of_bytes(
        f"{value.dtype} {tuple(value.shape)}".encode() + value.flatten().view(torch.uint8).numpy().tobytes()
    )
    return f"{content} {value.double().abs().mean():.6g}" if value.numel() else content


def of_file(file: Path) -> str:
    """A file by its content; of safetensors the header's entries count in any order, as its library writes them."""
    content = file.read_bytes()
    if file.suffix == ".json":  # diffusers writes where a network was read from
        content = json.dumps({**json.loads(content), "_name_or_path": None}).encode()
    if file.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        content = json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]
    return of_bytes(content)


def of_network(name: str, network: nn.Module) -> Iterator[tuple[str, str]]:
    for key, value in network.state_dict().items():
        yield f"{name}: {key}", of(value)
    yield f"{name}: plan", str(plan(network))
    rows = ((row.fqn, row.weight_bits, row.activation_bits, row.segments, row.sensitivity) for row in plan(network))
    yield f"{name}: rows", of_bytes(repr([*rows]).encode())


def of_use(
    name: str, network: nn.Module, scheduler: DDIMScheduler, steps: int, folder: Path
) -> Iterator[tuple[str, str]]:
    """A network called, compiled, sampled from, saved and read again."""
    channels, size = network.config.in_channels, network.config.sample_size
    x_t = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([999, 499, 249])
    with torch.no_grad():
        yield f"{name}: eager", of(network(x_t, timesteps).sample)
        compiled = torch.compile(network, backend="pqcad")
        yield f"{name}: compiled", of(compiled(x_t, timesteps).sample)
    pipeline = DDIMPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    pictures = pipeline(2, generator=generator, num_inference_steps=steps, output_type="np").images
    yield f"{name}: pictures", of(torch.from_numpy(pictures))
    save_model(network, scheduler, folder)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield f"{name}: saved {file.relative_to(folder)}", of_file(file)
    loaded, _ = load_model(folder)
    with torch.no_grad():
        yield f"{name}: loaded", of(copy.deepcopy(loaded)(x_t, timesteps).sample)


def of_pte(
    name: str, network: nn.Module, scheduler: DDIMScheduler, steps: int, folder: Path
) -> Iterator[tuple[str, str]]:
    shape = (1, network.config.in_channels, network.config.sample_size, network.config.sample_size)
    for objective in ("speed", "size"):
        file = folder / f"{name}-{objective}.pte"
        options: dict[str, Any] = {"objective": objective, "min_sqnr_db": 0.0, "trajectories": 1, "progress": False}
        export_pte(network, file, scheduler=scheduler, num_inference_steps=steps, **options)
        sampler = PTESampler(file)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        yield f"{name}: .pte {objective}, sampled", of(torch.as_tensor(sampler.sample(noise)))


def golden(folder: Path) -> Iterator[tuple[str, str]]:
    """Every entry's name and value."""
    options: dict[str, Any] = {"progress": False}
    torch.manual_seed(0)
    reference = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()
    noise = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**noise, clip_sample=False)

    tiny = copy.deepcopy(reference)
    quantize_(tiny, PQCADConfig(**TINY_PQ), scheduler=scheduler, **options)
    yield from of_network("tiny, learned", tiny)
    yield from of_use("tiny, learned", tiny, scheduler, 4, folder / "tiny")
    save_plain(tiny, folder / "tiny.safetensors")
    yield "tiny, learned: save_quantized", of_file(folder / "tiny.safetensors")
    again = load_quantized(copy.deepcopy(reference), folder / "tiny.safetensors")
    yield from of_network("tiny, load_quantized", again)

    student = copy.deepcopy(tiny)
    sampler = distill_(student, reference, scheduler, CADConfig(**CAD, check_betas=False), **options)
    yield from of_network("tiny, distilled", student)
    yield from of_pte("tiny, distilled", student, sampler, 2, folder)
    plain = copy.deepcopy(reference)
    distill_(plain, reference, scheduler, CADConfig(**CAD, check_betas=False), **options)
    yield from ((f"tiny, distilled in full precision: {key}", of(value)) for key, value in plain.state_dict().items())

    wider = copy.deepcopy(reference)
    quantize_(
        wider, PQCADConfig(**PTQ, timestep_groups=2, activation_bits=6, target_bits=5.5), scheduler=scheduler, **options
    )
    yield from of_network("tiny, sensitive", wider)

    # a copy: what a network computes depends in its last bits on where its weights lie in memory
    teacher, scheduler = load_model("demo")
    teacher = copy.deepcopy(teacher)
    demo = copy.deepcopy(teacher)
    quantize_(demo, PQCADConfig(**PTQ), scheduler=scheduler, **options)
    yield from of_network("demo, ptq", demo)
    yield from of_use("demo, ptq", demo, scheduler, 4, folder / "demo")
    sampler = distill_(demo, teacher, scheduler, CADConfig(**CAD, teacher_weight=0.5), **options)
    yield from of_network("demo, distilled", demo)
    yield from of_use("demo, distilled", demo, sampler, 2, folder / "demo-distilled")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE", help="receives what is found")
    what.add_argument("--compare", type=Path, metavar="FILE", help="that --write made on this machine")
    args = parser.parse_args(argv)
    before: dict[str, Any] = json.loads(args.compare.read_text()) if args.compare else {}
    if before and before["machine"] != machine():
        print(f"error: {args.compare} is of {before['machine']}, this is {machine()}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        found = dict(golden(Path(folder)))
    if args.write:
        args.write.write_text(json.dumps({"machine": machine(), "entries": found}, indent=1))
        print(f"{args.write}: {len(found)} entries")
        return 0
    there = before["entries"]
    changed = [name for name in there.keys() | found.keys() if there.get(name) != found.get(name)]
    for name in sorted(changed):
        print(f"{name}\n  before {there.get(name)}\n  now    {found.get(name)}")
    print(f"{len(found)} entries, {len(changed)} changed")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
