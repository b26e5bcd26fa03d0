"""The visit to a GPU, rehearsed on the CPU: what it writes, what the next one starts from, and a visit that is cut."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pqcad_ao.models import load_model

VISIT = Path(__file__).resolve().parents[1] / "bench" / "visit.py"


def visit(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(VISIT), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def rehearsed(pictures, tiny_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("visit")
    done = visit(out, "--data", str(pictures), "--model", str(tiny_dir), "--rehearse")
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return out


@pytest.mark.slow
def test_a_rehearsal_does_all_three_things(rehearsed):
    exactness = json.loads((rehearsed / "exactness.json").read_text())
    assert exactness["wrong"] == {}
    assert sum(exactness["layers"].values()) >= 12
    assert exactness["quantizers"][0]["part"] == 0
    rows = json.loads((rehearsed / "compile.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["torch_eager_bf16"]
    assert json.loads((rehearsed / "visit.json").read_text())["codes"] == {"measure": 0, "teacher": 0, "kept": 1}


@pytest.mark.slow
def test_the_next_visit_goes_on_from_the_teachers_averaged_weights(rehearsed, pictures, tiny_dir, tmp_path):
    weights = load_file(rehearsed / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    unet, scheduler = load_model(rehearsed / "teacher")
    assert scheduler.config.prediction_type == "v_prediction"
    kept = {name: value.half() for name, value in unet.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in weights.items())
    again = ["--data", str(pictures), "--model", str(tiny_dir), "--rehearse", "--seed", "1"]
    done = visit(tmp_path, *again, "--teacher", str(rehearsed / "teacher"))
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    later = load_file(tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    far = [float((later[name] - value).float().abs().max()) for name, value in weights.items()]
    assert 0 < max(far) < 0.05  # a few small steps from there, and not from new random weights


def test_a_visit_that_is_cut_ends_with_what_there_is(pictures, tiny_dir, tmp_path):
    done = visit(tmp_path, "--data", str(pictures), "--model", str(tiny_dir), "--rehearse", "--seconds", "2")
    assert done.returncode == 1
    assert json.loads((tmp_path / "visit.json").read_text())["codes"] == {"measure": None, "teacher": None, "kept": 0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(tiny_dir, tmp_path):
    done = visit(tmp_path, "--model", str(tiny_dir))
    assert done.returncode == 2
    assert "sees no CUDA device here: --rehearse" in done.stdout
