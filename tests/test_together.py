"""Several processes quantize, sample and evaluate as one does; one that is killed ends all.

How they distill is in ``test_recipe_cad.py``.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("together.py")
pytestmark = pytest.mark.slow


def environment(**more: Any) -> dict[str, str]:
    return {**os.environ, **{name: str(value) for name, value in more.items()}}


def start(out: Path, processes: int, *cases: str) -> dict[str, Any]:
    """What the processes leave, which torchrun starts where there are several."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *many, str(WORKER), str(out), "-1", *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


CASES = ("calibrated", "progressive", "fixed")
SHARDED = ("sharded", "sharded fixed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    return start(tmp_path_factory.mktemp("alone") / "out", 1, *CASES, "sharded")


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Both learned the same, but for the order of sums in float64."""
    assert one["log"] == pytest.approx(other["log"], rel=1e-9)
    assert [move["step"] for move in one.get("moves", [])] == [move["step"] for move in other.get("moves", [])]
    torch.testing.assert_close(one["state"], other["state"], rtol=1e-6, atol=1e-7)


def test_two_processes_make_what_one_does(alone, tmp_path):
    together = start(tmp_path / "out", 2, *CASES)
    # what is not summed over processes has the same bits
    for case in ("calibrated", "piped", "evaluated"):
        torch.testing.assert_close(together[case], alone[case], rtol=0, atol=0)
    for case in ("progressive", "fixed"):
        same(together[case], alone[case])
    assert len(alone["progressive"]["moves"]) >= 2  # a ladder was walked down


@pytest.mark.parametrize("processes", [2, 4])
def test_weights_in_parts_learn_what_whole_ones_do(processes, alone, tmp_path):
    together = start(tmp_path / "out", processes, "sharded")
    for case in SHARDED:
        same(together[case], alone[case])
    same(together["sharded"], alone["progressive"])  # with whole weights
    watched, expected = together["watched"], torch.arange(7.0, dtype=torch.float64).view(7, 1)
    assert watched["whole"] > 4 * 8 * 3000
    assert watched["kept"] == pytest.approx(watched["whole"] / processes, rel=0.01)
    # layer after layer: a weight as it was gathered, and as it is quantized
    assert watched["gathered"] <= 3 * watched["largest"] < watched["whole"] / 4
    assert torch.equal(together["divided"]["whole"], expected)
    assert torch.equal(together["divided"]["gradient"], expected * (processes + 1))


def test_commands_share_their_work(tmp_path):
    """Under torchrun the command makes the group: two processes print once, and write what one does."""
    quick = ["--mode", "ptq", "--calibration-points", "8", "--calibration-steps", "2", "--calibration-batch-size", "1"]
    quality, weights = [], []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        said = cli(processes, "compress", "--model", "demo", "--out", out, *quick, "--groups", "4", "--threads", "1")
        assert said.count("bytes of weights") == 1
        sampling = ["--n", "8", "--steps", "2", "--batch-size", "2", "--threads", "1"]
        assert cli(processes, "eval", "--model", out, *sampling, "--json", out / "quality.json").count("FID") == 1
        quality.append(json.loads((out / "quality.json").read_text()))
        weights.append(load_file(out / "unet" / "diffusion_pytorch_model.safetensors"))
        assert not (out / "unfinished").exists()
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert quality[0]["fid"] == pytest.approx(quality[1]["fid"], rel=1e-6)


def cli(processes: int, *argv: Any) -> str:
    """What a command prints, in one process or by torchrun."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *many, "-m", "pqcad_ao.cli", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("case", ["progressive", "sharded"])
def test_a_process_that_is_killed_ends_the_others_and_leaves_a_checkpoint(case, alone, tmp_path):
    """As on two machines, whose torchrun does not know of the other's processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(WORKER), str(tmp_path / "out"), "11", case]
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2}
    ranks = [
        subprocess.Popen(command, env=environment(RANK=rank, **group), stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        assert ranks[1].wait(300) == -9
        begin = time.monotonic()
        _, errors = ranks[0].communicate(timeout=100)
        assert time.monotonic() - begin < 90  # the group's timeout is 60 s; a connection that is closed is seen at once
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == 1
    assert "process 0 of 2 waited in vain for another one, which ended" in errors
    assert f"{tmp_path / 'out-work' / case} keeps what was done" in errors
    same(start(tmp_path / "out", 1, case)[case], alone["progressive"])
