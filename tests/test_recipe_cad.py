"""The recipe on one process and on several: the same network comes out, and a process that dies is noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pqcad_ao.diffusion import trajectories
from pqcad_ao.models import load_model
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.recipes import cad

PQ = [
    "--pq.mode",
    "ptq",
    "--pq.calibration-points",
    "8",
    "--pq.timestep-groups",
    "4",
    "--pq.calibration-batch-size",
    "1",
]
CAD = ["--cad.steps", "4", "--cad.iterations", "6", "--cad.batch-size", "4", "--cad.points", "8"]
CAD += ["--cad.generation-batch-size", "4", "--cad.learning-rate", "2e-4"]

# What torchrun starts: the recipe, in which a process may die in the middle of an update. It distills in float64: a
# 4-bit network is a step function, so one value that rounding moves over its threshold moves others, and the loss by
# percents within a few updates (noise of 1e-7 on the weights does the same in one process). Float64 rounds 2^29 times
# finer, and runs that learn the same stay together. Some updates are clipped and some are not, so that the size of
# gradients counts, which Adam alone would not see.
WORKER = """
import contextlib, copy, os, sys, torch
from unittest.mock import patch
torch.set_num_threads(1)
from pqcad_ao.diffusion import calibration, trajectories
from pqcad_ao.learn import halving, training
from pqcad_ao.recipes import cad
trajectories.FARTHEST = float("inf")  # random weights denoise nothing
training.CHECKPOINT_EVERY = 2
training.LARGEST_GRADIENT = 1.2
dies_at = int(sys.argv.pop(1))
def counted(module, draws, name):
    original = getattr(module, draws)
    def sample(*args, **options):
        with open(f"{sys.argv[4]}-{name}-{os.environ.get('RANK', 0)}", "a") as file:
            file.write("batch ")
        return original(*args, **options)
    setattr(module, draws, sample)
counted(calibration, "sample", "walked")
counted(trajectories, "_batch", "drawn")
unfold = halving.unfold
def unfolded(*args):
    graph, skeleton = unfold(*args)
    return graph.double(), skeleton
@contextlib.contextmanager
def float64():
    with (
        patch.object(torch.Tensor, "float", torch.Tensor.double),
        patch.object(torch.nn.Module, "float", torch.nn.Module.double),
        patch.object(halving, "unfold", unfolded),
    ):
        yield
class Halving(halving._Halving):
    def __init__(self, student, reference, *args):
        torch.save(student.state_dict(), f"{sys.argv[4]}-untaught-{os.environ.get('RANK', 0)}")
        with float64():
            super().__init__(student, copy.deepcopy(reference).double().eval(), *args)
    def update(self):
        if len(self.log) == dies_at and self.rank == 1:
            os._exit(9)
        with float64():
            return super().update()
    def give_back(self, *args):
        self.graph.float()
        super().give_back(*args)
halving._Halving = Halving
sys.exit(cad.main(sys.argv[1:]))
"""


def start(model: Path, folder: Path, processes: int, *more: str, dies_at: int = -1) -> subprocess.CompletedProcess:
    worker = folder.parent / "worker.py"
    worker.write_text(WORKER)
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    recipe = ["--model", str(model), "--out", str(folder), *PQ, *CAD, *more]
    command = [sys.executable, *many, str(worker), str(dies_at), *recipe]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def log_of(folder: Path) -> list[float]:
    lines = (folder / "work" / "halving-1" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(least_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "out"
    done = start(least_dir, folder, 1)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def same_run(one: Path, other: Path) -> None:
    """Both began with the same bits and learned the same, but for the order of sums in float64."""
    for pattern in ("work/c_qc-*.safetensors", "work/c_dc-*.npy"):
        files = [next(folder.glob(pattern)) for folder in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), pattern
    assert log_of(one) == pytest.approx(log_of(other), rel=1e-9)
    ours, theirs = (load_model(folder)[0].state_dict() for folder in (one, other))
    start, others = (torch.load(f"{folder}-untaught-0") for folder in (one, other))
    torch.testing.assert_close(start, others, rtol=0, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    moved = {name.rpartition(".")[2] for name, value in ours.items() if not torch.equal(value, start[name])}
    assert moved >= {"weight", "bias", "weight_scale", "input_scale"}


def test_one_process_writes_a_network_that_knows_its_steps(alone):
    unet, scheduler = load_model(alone)
    assert quantized_state(unet).timestep.schedule == [999, 499]
    assert scheduler.config.timestep_spacing == "trailing"
    assert len(log_of(alone)) == 6


def test_two_processes_learn_what_one_does(alone, least_dir, tmp_path):
    done = start(least_dir, tmp_path / "out", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    same_run(tmp_path / "out", alone)
    # both walked a part of C_QC and drew a part of C_DC
    for what in ("walked", "drawn"):
        batches = [len(Path(f"{tmp_path / 'out'}-{what}-{rank}").read_text().split()) for rank in (0, 1)]
        assert sum(batches) == len(Path(f"{alone}-{what}-0").read_text().split())
        assert abs(batches[0] - batches[1]) <= 1
    assert len(list((tmp_path / "out" / "work").glob("c_qc-*.safetensors"))) == 1


@pytest.mark.slow
def test_two_processes_learn_with_weights_in_parts_what_one_does(alone, least_dir, tmp_path):
    done = start(least_dir, tmp_path / "out", 2, "--cad.shard")
    assert done.returncode == 0, done.stderr[-2000:]
    same_run(tmp_path / "out", alone)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_and_leaves_a_checkpoint(alone, least_dir, tmp_path):
    died = start(least_dir, tmp_path / "out", 2, dies_at=3)
    assert died.returncode != 0
    assert "exitcode  : 9" in died.stderr  # torchrun's report says which process ended, and how
    assert not (tmp_path / "out" / "model_index.json").exists()
    again = start(least_dir, tmp_path / "out", 1)  # the checkpoint serves any number of processes
    assert again.returncode == 0, again.stderr[-2000:]
    same_run(tmp_path / "out", alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cad.steps", "5"], "steps=5 cannot be halved"),
        (["--cad.stepz", "4"], "Did you mean --cad.steps?"),
        (["--cad", "learning_rate=1e-4"], "--cad learning_rate=1e-4: write --cad.learning-rate 1e-4"),
        (["--pq.weight-bits", "9"], "weight_bits=9"),
        (["--pq.override", "3"], "'3' is not ROLE=W,A"),
        (["--pq.weight-ladder", "[6,x]"], "'x' is no whole number"),
        (["--device", "tpu"], "device 'tpu' cannot be used"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    try:
        code = cad.main(["--model", "demo", "--out", str(tmp_path), *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_an_empty_image_folder_is_an_error(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    command = ["--model", "demo", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "images")]
    assert cad.main(command) == 2
    assert "error: no images in" in capsys.readouterr().err


def test_another_networks_folder_is_refused(alone, least_dir, capsys, monkeypatch):
    monkeypatch.setattr(trajectories, "FARTHEST", float("inf"))
    arguments = ["--model", str(least_dir), "--out", str(alone), *CAD, *PQ, "--pq.weight-bits", "3"]
    assert cad.main(arguments) == 2
    assert "is of another run (another network, configuration or calibration set)" in capsys.readouterr().err
