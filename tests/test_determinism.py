"""The same seed, machine and number of threads give the same bytes: each stage, in processes of their own."""

import os
import subprocess
import sys

import pytest

STAGES = """
import hashlib, os, sys, tempfile
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
from networks import SHAPE, Small, cosine_scheduler, quick

from pqcad_ao import CADConfig, PQCADConfig, distill_, export_pte, quantize_
from pqcad_ao.diffusion import trajectories
from pqcad_ao.diffusion.sampling import sample

trajectories.FARTHEST = float("inf")  # networks of random weights denoise nothing
options = {"scheduler": cosine_scheduler(), "sample_shape": SHAPE, "progress": False}


def show(stage, *values):
    sha = hashlib.sha256()
    for value in values:
        sha.update(value if isinstance(value, bytes) else value.detach().contiguous().numpy().tobytes())
    print(stage, sha.hexdigest())


reference = Small()
learned = Small()
ladders = {"learning_points": 32, "batch_size": 4, "iterations": 40, "window": 2, "patience": 1, "beta": 0.5}
quantize_(learned, quick(mode="progressive", **ladders), **options)
show("progressive quantization", *learned.state_dict().values())
cad = CADConfig(steps=4, iterations=20, batch_size=4, points=12, generation_batch_size=5)
scheduler = distill_(learned, reference, config=cad, **options)
show("distillation", *learned.state_dict().values())
noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
show("sampling", sample(learned, scheduler, noise, 2))
compiled = torch.compile(learned, backend="pqcad", fullgraph=True)
with torch.no_grad():
    show("compiled kernels", compiled(noise, torch.tensor([999])))
with tempfile.TemporaryDirectory() as folder:
    export_pte(learned, Path(folder) / "unet.pte", scheduler=scheduler, sample_shape=SHAPE, progress=False)
    show(".pte", (Path(folder) / "unet.pte").read_bytes())
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_two_processes_make_the_same_bytes(threads):
    found = []
    for seed in ("1", "2"):  # the order of sets must not matter
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", STAGES, os.path.dirname(__file__)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(dict(line.rsplit(" ", 1) for line in result.stdout.splitlines()))
    assert list(found[0]) == ["progressive quantization", "distillation", "sampling", "compiled kernels", ".pte"]
    assert found[0] == found[1]
