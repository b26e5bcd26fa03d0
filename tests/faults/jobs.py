"""The long jobs, each on a network small enough to be run to its end a hundred times: what is killed and goes on."""

import copy
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import UNet2DModel
from networks import SHAPE, Small, cosine_scheduler, quick
from omegaconf import OmegaConf

from pqcad_ao import CADConfig, compress, distill_, export_pt2, export_pte, quantize_
from pqcad_ao.bench.quality.measure import bench_quality
from pqcad_ao.diffusion.calibration import calibration_set
from pqcad_ao.diffusion.trajectories import draw_trajectories
from pqcad_ao.evaluate.features import RealFeatures
from pqcad_ao.models import load_model, save_model
from pqcad_ao.ops.cpu import loader
from pqcad_ao.ops.cpu.build import INSTRUCTION_SETS
from pqcad_ao.recipes.train_teacher import train
from pqcad_ao.utils.code_cache import VARIABLE
from pqcad_ao.utils.files import bytes_of

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
TEACHER = {
    "unet": UNET,
    "scheduler": {"num_train_timesteps": 1000, "prediction_type": "v_prediction"},
    "data": {"image_size": 8, "flip": True},
    "train": {
        "seed": 0,
        "lr": 1e-3,
        "warmup": 2,
        "steps": 40,
        "batch_size": 4,
        "bf16": False,
        "grad_clip": 1.0,
        "ema": 0.99,
        "checkpoint_every": 5,
        "grid_every": 20,
        "grid_steps": 2,
    },
}
LEARNS = {
    "mode": "progressive",
    "iterations": 40,
    "batch_size": 4,
    "learning_points": 16,
    "window": 3,
    "patience": 1,
    "beta": 0.5,
}
CAD = CADConfig(steps=4, iterations=30, batch_size=4, points=16, generation_batch_size=4, check_betas=False)


def fingerprint(*values: object) -> str:
    """What a job's result is, to the last bit."""
    sha = hashlib.sha256()
    for value in values:
        for name, tensor in sorted(value.items()) if isinstance(value, dict) else [("", value)]:
            sha.update(name.encode())
            sha.update(bytes_of(tensor) if isinstance(tensor, torch.Tensor) else bytes(tensor))
    return sha.hexdigest()


def _given(folder: Path) -> dict:
    return {"sample_shape": SHAPE, "folder": folder, "progress": False}


def calibrate(folder: Path) -> str:
    config = quick(calibration_batch_size=2, calibration_steps=8)
    return fingerprint(calibration_set(Small(), cosine_scheduler(), SHAPE, config, folder=folder).x_t)


def draw(folder: Path) -> str:
    drawn = draw_trajectories(Small(), cosine_scheduler(), SHAPE, CAD, {}, folder=folder)
    return fingerprint(drawn.rows(torch.arange(len(drawn)))[0])


def learn(folder: Path) -> str:
    model = Small()
    quantize_(model, quick(**LEARNS), scheduler=cosine_scheduler(), **_given(folder))
    return fingerprint(model.state_dict())


def distill(folder: Path) -> str:
    student = Small()
    quantize_(student, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    distill_(student, Small(), cosine_scheduler(), CAD, **_given(folder))
    return fingerprint(student.state_dict())


def both(folder: Path) -> str:
    student, _ = compress(Small(), cosine_scheduler(), quick(**LEARNS), CAD, **_given(folder))
    return fingerprint(student.state_dict())


def teach(folder: Path) -> str:
    images = torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train(OmegaConf.create(copy.deepcopy(TEACHER)), images, folder)
    return fingerprint(load_model(folder)[0].state_dict())


def save(folder: Path) -> str:
    """Eight models one after another, of which the last is left."""
    for seed in range(8):
        torch.manual_seed(seed)
        save_model(UNet2DModel(**UNET), cosine_scheduler(), folder)
        load_model(folder)
    return fingerprint(load_model(folder)[0].state_dict())


def compile_kernels(folder: Path) -> str:
    """A library that takes a second, through the compiler and the cache that the kernels go through."""
    text = "".join(f'extern "C" int answer_{number}() {{ return {number}; }}\n' for number in range(2000))
    with patch.dict(os.environ, {VARIABLE: str(folder)}), patch.object(loader, "source", lambda: text):
        answer = str(loader._library(INSTRUCTION_SETS["avx2"]).answer_1999())
    for path in folder.glob("*.so"):  # named after its content, which the compiler makes another in another folder
        path.replace(folder / "kernels.so")
    return answer


def bench(folder: Path) -> str:
    """Two rows of the quality benchmark; how long each took is another number every time."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        save_model(UNet2DModel(**UNET), cosine_scheduler(), scratch)
        real = RealFeatures.from_features(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
        found = bench_quality(
            scratch,
            rows=["fp_full", "ptq_full"],
            steps=2,
            n=6,
            work=folder,
            features=(torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten()), real),
            options={"calibration_points": 16, "calibration_steps": 4, "calibration_batch_size": 8},
            say=lambda line: None,
        )
    return str([row["fid"] for row in found["rows"]])


def quantized() -> Small:
    model = Small()
    quantize_(model, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    return model


def export(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    options = {"num_inference_steps": 2, "min_sqnr_db": 0.0, "progress": False, "trajectories": 1}
    export_pte(quantized(), folder / "a.pte", scheduler=cosine_scheduler(), sample_shape=SHAPE, **options)
    return fingerprint((folder / "a.pte").read_bytes())


def package(folder: Path) -> str:
    """Machine code: the compiler's choices are its own, so that there is a whole package is all that is compared."""
    folder.mkdir(exist_ok=True)
    export_pt2(quantized(), folder / "a.pt2", sample_shape=SHAPE, min_sqnr_db=0.0)
    return "written"


JOBS: dict[str, Callable[[Path], str]] = {
    "C_QC": calibrate,
    "C_DC": draw,
    "quantization learning": learn,
    "distillation": distill,
    "compress": both,
    "teacher training": teach,
    "save_model": save,
    "kernel compile": compile_kernels,
    "bench": bench,
}
EXPORTS: dict[str, Callable[[Path], str]] = {"export_pte": export, "export_pt2": package}


def run(job: Callable[[Path], str], folder: Path) -> str:
    """A job that keeps what it did far more often than it does for a user, so that kills meet it writing."""
    torch.set_num_threads(1)
    with (
        patch("pqcad_ao.learn.training.CHECKPOINT_EVERY", 2),
        patch("pqcad_ao.diffusion.calibration.SAVE_EVERY_S", -1.0),
    ):
        return job(folder)
