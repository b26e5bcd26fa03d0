"""The sampler in C++, built against ExecuTorch's Python package, draws the pictures of the one in Python."""

import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import SHAPE, Small, cosine_scheduler, quick

from pqcad_ao import CacheConfig, PTESampler, cache_, export_pte, quantize_

executorch = pytest.importorskip("executorch.exir", reason="executorch is not installed: pip install pqcad_ao[edge]")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cpp"
SEED = 3


def libstdcpp_normal(seed: int):
    """std::normal_distribution<float> over std::mt19937, as libstdc++ has it: Marsaglia's polar method."""
    raw = np.random.RandomState(seed)

    def coordinate() -> np.float32:
        draw = np.float32(raw.randint(0, 2**32, dtype=np.uint32)) / np.float32(2**32)
        return np.float32(2) * min(draw, np.nextafter(np.float32(1), np.float32(0))) - np.float32(1)

    while True:
        x, y = coordinate(), coordinate()
        square = x * x + y * y
        if 0 < square <= 1:
            factor = np.sqrt(np.float32(-2) * np.log(square) / square)
            yield from (y * factor, x * factor)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["in full", "with a cache plan"])
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cmake"), reason="a build on Linux, with CMake")
def test_the_example_builds_and_draws_what_python_draws(cached, tmp_path):
    unet = Small()
    quantize_(unet, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    if cached:
        walk = {"scheduler": cosine_scheduler(), "num_inference_steps": 3, "sample_shape": SHAPE}
        cache_(unet, CacheConfig(points=4), **walk, progress=False)
    options = {"scheduler": cosine_scheduler(), "num_inference_steps": 3, "sample_shape": SHAPE, "batch_size": 2}
    report = export_pte(unet, tmp_path / "small.pte", **options, progress=False)

    package = Path(executorch.__file__).parents[1]
    places = [f"-Dexecutorch_DIR={package / 'share' / 'cmake'}", f"-DPython3_EXECUTABLE={sys.executable}"]
    for command in (["-S", EXAMPLE, "-B", tmp_path / "build", *places], ["--build", tmp_path / "build"]):
        built = subprocess.run(["cmake", *command], capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout + built.stderr
    program = [tmp_path / "build" / "sample", report.path, tmp_path / "out.pgm"]
    subprocess.run([*program, str(SEED)], check=True, capture_output=True)
    assert subprocess.run(program[:1], check=False, capture_output=True).returncode == 2

    noise = torch.tensor(list(islice(libstdcpp_normal(SEED), 2 * 64))).view(2, *SHAPE)
    expected = ((PTESampler(report.path).sample(noise)[0, 0].clamp(-1, 1) + 1) * 127.5).round()
    header, pixels = b"P5\n8 8\n255\n", (tmp_path / "out.pgm").read_bytes()
    assert pixels[: len(header)] == header
    drawn = torch.frombuffer(bytearray(pixels[len(header) :]), dtype=torch.uint8).view(8, 8)
    assert (drawn - expected).abs().max() <= 1
    assert len(drawn.unique()) > 10
