import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from PIL import Image
from torch import Tensor, nn

from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.diffusion import trajectories
from pqcad_ao.evaluate.features import RealFeatures
from pqcad_ao.learn import halving, progressive, training
from pqcad_ao.nn.conv2d import QuantizedConv2d
from pqcad_ao.recipes import demo, forms


class Pixels(nn.Module):
    """A feature network for 1×8×8 images: the means of four quarters."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 4).flatten(1)


@pytest.fixture(scope="module")
def features() -> tuple[nn.Module, RealFeatures]:
    generator = torch.Generator().manual_seed(0)
    return Pixels(), RealFeatures.from_features(torch.randn(64, 4, generator=generator))


def run_tiny(
    out: Path,
    model: Path,
    features: tuple[nn.Module, RealFeatures],
    say: Callable[[str], None] = print,
    mode: str = "progressive",
) -> dict[str, Any]:
    sizes = {"calibration_points": 16, "timestep_groups": 4, "learning_points": 16, "batch_size": 4, "iterations": 40}
    return demo.run(
        out,
        model=str(model),
        config=PQCADConfig.fast(mode=mode, beta=0.5, **sizes),
        cad=CADConfig.fast(steps=4, iterations=6, batch_size=4, points=8) if mode != "ptq" else None,
        shipped=str(model) if mode != "ptq" else None,
        images=6,
        steps=4,
        batch_size=4,
        latency_calls=2,
        pictures=4,
        features=features,
        command="pqcad demo --out out",
        say=say,
    )


@pytest.fixture(scope="module")
def made(
    least_dir: Path, features: tuple[nn.Module, RealFeatures], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[str]]:
    """The demo on a tiny network, nothing compiled: its folder, its result, and what it said."""
    pytest.importorskip("executorch", reason="the demo exports a .pte: needs executorch")
    out, said = tmp_path_factory.mktemp("demo") / "new" / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda module, **options: module)
        patch.setattr(trajectories, "FARTHEST", float("inf"))  # random weights denoise nothing
        return out, run_tiny(out, least_dir, features, said.append), said


@pytest.mark.slow
def test_with_the_compiler(least_dir: Path, features: tuple[nn.Module, RealFeatures], tmp_path: Path):
    pytest.importorskip("executorch", reason="the demo exports a .pte: needs executorch")
    summary = run_tiny(tmp_path, least_dir, features, mode="ptq")
    assert "skipped" not in summary
    assert summary["fid"].keys() == {"fp_full", "ptq_full", "ptq_half"}
    latency = summary["latency_ms"]
    assert summary["speedup_end_to_end"] == pytest.approx(2 * latency["fp32_compile"] / latency["compressed_compile"])
    assert "transitions" not in summary
    assert "Learning" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    least_dir: Path, features: tuple[nn.Module, RealFeatures], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trajectories, "FARTHEST", float("inf"))
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    original, begun = halving._Halving.update, list[int]()

    def update(self: Any) -> Any:
        begun.append(len(self.log))
        if len(begun) == 4 or begun[0] > 0:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(halving._Halving, "update", update)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, least_dir, features)
    begun.clear()
    monkeypatch.setattr(progressive._Run, "update", lambda self: pytest.fail("it learned again"))
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, least_dir, features)
    assert begun == [2]


def test_summary_has_the_keys_that_are_promised_and_no_others(made: tuple[Path, dict[str, Any], list[str]]):
    out, _, _ = made
    summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["steps"] == {"full": 4, "half": 2}
    assert summary["fid"].keys() == {"fp_full", "fp_half", "ptq_full", "pq_full", "pqcad_half", "shipped_half"}
    assert summary["fid"]["shipped_half"] == summary["fid"]["fp_half"]  # here it is the same network
    assert summary["fid_n"] == 6
    assert all(low < high for low, high in summary["fid_ci"].values())
    assert summary["fid_ci"].keys() == summary["precision"].keys() == summary["recall"].keys() == summary["fid"].keys()
    assert summary["bytes"].keys() == {"fp32_checkpoint", "checkpoint", "fp32_pte", "pte", "resident_weights"}
    assert summary["latency_ms"].keys() == {"fp32_eager", "fp32_compile", "compressed_compile", "pte_fp32", "pte"}
    assert summary["latency_batch"] == 1
    assert summary["threads"] == torch.get_num_threads()
    assert summary["sqnr_db"].keys() == {"ptq_step", "pq_step", "pte_vs_eager", "pte_images"}
    keys = {"stage", "step", "from_bits", "to_bits", "momentum", "reason"}
    assert all(transition.keys() == keys for transition in summary["transitions"])
    assert [t["to_bits"] for t in summary["transitions"] if t["stage"] == "weights"][-1] == 4
    assert summary["arithmetic"]
    latency = summary["latency_ms"]
    assert summary["speedup_end_to_end"] == pytest.approx(2 * latency["fp32_compile"] / latency["compressed_compile"])
    assert "skipped" not in summary


def test_numbers_are_those_of_the_files(made: tuple[Path, dict[str, Any], list[str]]):
    out, summary, _ = made
    weights = out / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    assert summary["bytes"]["checkpoint"] == weights.stat().st_size < summary["bytes"]["fp32_checkpoint"]
    assert summary["bytes"]["pte"] == (out / "unet.pte").stat().st_size
    assert summary["bytes"]["resident_weights"] < summary["bytes"]["fp32_checkpoint"]
    assert all(milliseconds > 0 for milliseconds in summary["latency_ms"].values())
    assert summary["sqnr_db"]["pte_vs_eager"] > 20 > summary["sqnr_db"]["ptq_step"] > 0


def test_everything_is_there_and_nothing_else(made: tuple[Path, dict[str, Any], list[str]]):
    out, summary, said = made
    assert {path.name for path in out.iterdir()} == {"summary.json", "report.html", "samples.png", "model", "unet.pte"}
    assert isinstance(DDIMPipeline.from_pretrained(out / "model").unet.conv_in, QuantizedConv2d)
    with Image.open(out / "samples.png") as picture:
        assert picture.width > picture.height
    page = (out / "report.html").read_text()
    assert f"{summary['fid']['ptq_full']:.2f}" in page
    assert "pqcad demo --out out" in page
    assert page.split("<details>")[0].count("<img") == 4 * 4  # full precision, shipped, this run's, and a difference
    assert "Learning" in page
    assert len([line for line in said if line.startswith("[")]) == len(summary["stages_s"])


def test_a_network_for_other_images_is_refused_before_the_work(least_dir: Path, tmp_path: Path):
    pytest.importorskip("executorch", reason="the demo exports a .pte: needs executorch")
    said: list[str] = []
    with pytest.raises(ValueError, match=r"takes \(N, 1, 32, 32\)"):
        demo.run(tmp_path, model=str(least_dir), say=said.append)
    assert [line for line in said if not line.startswith("note: other programs")] == said[-1:]


def test_sizes_out_of_range_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="images=1: allowed are whole numbers from 2"):
        demo.run(tmp_path / "out", images=1)
    assert not (tmp_path / "out").exists()


def test_median_leaves_out_the_warm_up():
    calls: list[int] = []
    forms.median_ms(lambda: calls.append(0), 5)
    assert len(calls) == forms.WARMUP_CALLS + 5


def test_a_form_that_cannot_be_compiled_is_named():
    def no_compiler():
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand more")

    calls, skipped = forms.build({"fp32_eager": lambda: lambda: None, "fp32_compile": no_compiler})
    assert calls.keys() == {"fp32_eager"}
    assert skipped == {"latency_ms.fp32_compile": "no C++ compiler"}


def test_an_export_that_fails_says_why(tmp_path: Path):
    with (
        forms.exporting(tmp_path / "none", tmp_path / "a.pte", "--steps", "3") as finish,
        pytest.raises(RuntimeError, match="no model"),
    ):
        finish()
