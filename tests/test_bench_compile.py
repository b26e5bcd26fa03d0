"""The step benchmark's contract: rows, skipped rows, JSON, messages. Nothing here asserts a time."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

from pqcad_ao.bench.compile import contenders, cpu, drawing, worker, workload
from pqcad_ao.models import save_model
from pqcad_ao.utils import load, machine

COMMON = {"batches": (2,), "rounds": 2, "iterations": 2, "threads": 1, "progress": False}
MEASURED = {
    "ms": float,
    "ms_min": float,
    "ms_max": float,
    "runs": int,
    "compile_s": float,
    "resident_weight_bytes": int,
    "peak_rss_bytes": int,
    "base_rss_bytes": int,
    "ratio_vs_torch_eager_fp32": float,
    "gmacs": float,
    "arithmetic": str,
    "backend": str,
    "idle_cpu_s": float,
    "others_cores": float,
}


def _check_row(row):
    for key, kind in MEASURED.items():
        assert type(row[key]) is kind, key
    assert row["ms_min"] <= row["ms"] <= row["ms_max"]
    assert row["runs"] == COMMON["rounds"] * COMMON["iterations"]
    assert row["ratio_min"] <= row["ratio_vs_torch_eager_fp32"] <= row["ratio_max"]
    assert 0 < row["resident_weight_bytes"] < row["base_rss_bytes"] < row["peak_rss_bytes"]


def _rows(result):
    return {row["name"]: row for row in result["rows"]}


def test_result_of_a_run(tiny_dir, tmp_path, monkeypatch):
    """One run for all of the contract, as every worker imports torch."""
    monkeypatch.setitem(
        contenders.ROWS, "openvino_int8", contenders.Row(contenders.build_openvino_fp32, ("no_such_package",))
    )
    path, picture = tmp_path / "result.json", tmp_path / "result.png"
    names = ["openvino_int8", "openvino_fp32"]
    result = cpu.bench_compile(str(tiny_dir), rows=names, json_path=path, plot_path=picture, seed=3, **COMMON)
    assert json.loads(path.read_text()) == result
    assert picture.stat().st_size > 0
    assert {"versions", "threads", "cpu", "seed", "model", "loadavg", "rows", "roofline"} <= result.keys()
    assert (result["seed"], result["threads"], result["model"]) == (3, 1, str(tiny_dir))
    assert result["versions"]["torch"] == torch.__version__
    assert [(row["name"], row["batch"]) for row in result["rows"]] == [
        (contenders.REFERENCE, 2),
        *((n, 2) for n in names[::-1]),
    ]

    reference, rival, skipped = result["rows"]
    _check_row(reference)
    assert reference["ratio_vs_torch_eager_fp32"] == 1
    assert reference["sqnr_db_vs_fp32"] is None
    unet = UNet2DModel.from_pretrained(tiny_dir / "unet")
    assert reference["resident_weight_bytes"] == 4 * sum(parameter.numel() for parameter in unet.parameters())
    assert result["parameters"] * 4 == reference["resident_weight_bytes"]
    if importlib.util.find_spec("openvino"):
        _check_row(rival)
        assert rival["sqnr_db_vs_fp32"] > 60
    assert "no_such_package" in skipped["skipped"]
    assert "ms" not in skipped

    (roofline,) = result["roofline"]
    assert roofline["ms_at_peak_fp32"] == pytest.approx(roofline["gmac"] / roofline["peak_gmacs_fp32"] * 1e3)
    text = drawing.table(result)
    assert contenders.REFERENCE in text
    assert "skipped openvino_int8" in text


SQNR_FLOOR = {
    "torch_compile_fp32": 60,
    "torch_compile_bf16": 20,
    "torchao_int8": 10,
    "torchao_int8_f32": 10,
    "openvino_fp32": 60,
    "openvino_bf16": 15,
    "openvino_int8": 10,
    "openvino_int8_f32": 10,
    "onnxruntime_int8": 10,
    "ncnn_fp32": 60,
    "ncnn_int8": 10,
    "pqcad_w4a4": 0,
    "pqcad_w4a4_cache_full": 0,
    "pqcad_w4a4_cache_shallow": 0,
    "pqcad_w4a4_pt2": 0,
    "pqcad_w4a5_pt2": 0,
    "pqcad_w4a6_pt2": 0,
    "torch_compile_fp32_avx2": 60,
    "pqcad_w4a4_avx2": 0,
    "pqcad_w4a4_pt2_avx2": 0,
    "pqcad_w4a6_pt2_avx2": 0,
}


@pytest.mark.slow
def test_every_row(tiny_dir):
    pytest.importorskip("nncf")
    result = cpu.bench_compile(str(tiny_dir), **COMMON)
    rows = _rows(result)
    assert list(rows) == [name for name, row in contenders.ROWS.items() if not row.walks_only]
    for name, row in rows.items():
        if missing := cpu.missing_packages(name):
            assert row["skipped"].startswith(f"not installed: {', '.join(missing)}")
            continue
        assert "skipped" not in row, row
        _check_row(row)
        if name != contenders.REFERENCE:
            assert row["sqnr_db_vs_fp32"] > SQNR_FLOOR[name], name
    float_bytes = rows[contenders.REFERENCE]["resident_weight_bytes"]
    sizes = {name: row["resident_weight_bytes"] / float_bytes for name, row in rows.items()}
    assert sizes["torch_compile_bf16"] == pytest.approx(0.5, rel=0.01)
    assert sizes["torchao_int8"] < 0.5
    assert sizes["openvino_int8"] < 0.5
    assert sizes["pqcad_w4a4"] < 0.5


@pytest.mark.slow
def test_what_a_process_waits_for_its_first_step(tiny_dir):
    result = cpu.bench_compile(str(tiny_dir), rows=["pqcad_w4a4", "pqcad_w4a4_pt2"], **COMMON)
    rows = _rows(result)
    assert 0 < rows["pqcad_w4a4_pt2"]["ready_s"] < rows["pqcad_w4a4"]["ready_s"] < rows["pqcad_w4a4"]["compile_s"]
    assert rows[contenders.REFERENCE]["ready_s"] is None
    assert "ready s" in drawing.table(result)


@pytest.mark.slow
def test_walks(tiny_dir, tmp_path):
    names = ["pqcad_w4a6_pt2_half", "pqcad_w4a6_pt2_half_cached"]
    result = cpu.bench_compile(str(tiny_dir), rows=names, walk=4, json_path=tmp_path / "walks.json", **COMMON)
    rows = _rows(result)
    assert list(rows) == [contenders.REFERENCE, *names]
    for row in rows.values():
        assert "skipped" not in row, row
        _check_row(row)
        assert row["sqnr_db_vs_fp32"] is None
    steps = cpu.bench_compile(str(tiny_dir), rows=[contenders.REFERENCE], **COMMON)
    assert result["roofline"][0]["gmac"] == pytest.approx(4 * steps["roofline"][0]["gmac"])
    assert "picture in 4 steps" in drawing.table(result)


def test_rows_of_walks_alone_need_a_walk():
    with pytest.raises(ValueError, match=r"pqcad_w4a6_pt2_half.*give walk=20"):
        cpu.check_rows(["pqcad_w4a6_pt2_half"])
    with pytest.raises(ValueError, match="walk=5: pqcad_w4a6_pt2_half take 1/2 of the steps"):
        cpu.check_rows(["pqcad_w4a6_pt2_half"], walk=5)
    assert not any(contenders.ROWS[name].walks_only for name in cpu.check_rows(None))


def _worker_spec(name, folder, model):
    common = {"seed": 0, "threads": 1, "batch": 2, "walk": None}
    return {"name": name, "model": str(model), "folder": str(folder), **common}


@pytest.mark.slow
def test_rows_of_avx2_run_without_avx512(tiny_dir):
    if "avx2" not in machine.cpu_flags():
        pytest.skip("this machine has no AVX2")
    result = cpu.bench_compile(str(tiny_dir), rows=["torch_compile_fp32_avx2", "pqcad_w4a4_avx2"], **COMMON)
    rows = _rows(result)
    assert rows["torch_compile_fp32_avx2"]["sqnr_db_vs_fp32"] > 60
    assert "(AVX2, exact integers)" in rows["pqcad_w4a4_avx2"]["arithmetic"]


def test_worker_that_fails_gives_the_reason(tiny_dir, tmp_path):
    with (
        worker.Worker(_worker_spec(contenders.REFERENCE, tmp_path, tiny_dir)) as waiting,
        pytest.raises(worker.Failed, match=r"FileNotFoundError: .*inputs\.pt"),
    ):
        waiting.receive()
    assert not psutil.pid_exists(waiting.process.pid)


def test_worker_that_dies_is_reported(tiny_dir, tmp_path):
    with worker.Worker(_worker_spec(contenders.REFERENCE, tmp_path, tiny_dir)) as waiting:
        waiting.process.kill()
        with pytest.raises(worker.Failed, match="ended with code -9"):
            waiting.receive()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"rows": ["torch_eager_fp32", "tensorrt"]}, r"'tensorrt'.*allowed are torch_eager_fp32", id="row"),
        pytest.param({"model": "sdxl"}, r"'sdxl'.*'ddpm-cifar10'", id="model"),
        pytest.param({"batches": (1, 0)}, "batches=0.*from 1", id="batch"),
        pytest.param({"batches": ()}, r"batches=\[\].*from 1", id="no-batch"),
        pytest.param({"rounds": 0}, "rounds=0.*from 1", id="rounds"),
        pytest.param({"iterations": 1.5}, r"iterations=1\.5.*from 1", id="iterations"),
        pytest.param({"threads": 0}, "threads=0.*from 1", id="threads"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        cpu.bench_compile(**{"model": "ddpm-cifar10"} | changes)


def test_folder_without_a_full_precision_unet(tmp_path, quantized_unet, scheduler):
    with pytest.raises(ValueError, match="holds no diffusers UNet"):
        cpu.bench_compile(str(tmp_path))
    save_model(quantized_unet, scheduler, tmp_path)
    with pytest.raises(ValueError, match="is quantized: give the full-precision network"):
        cpu.bench_compile(str(tmp_path))


def test_inputs_come_from_trajectories(tiny_dir):
    unet, scheduler = workload.float_model(str(tiny_dir))
    assert scheduler.config.prediction_type == "v_prediction"
    inputs = workload.trajectory_inputs(unet, scheduler, 2, seed=0)
    assert len(inputs["calibration"]) == workload.CALIBRATION_IMAGES / 2
    assert len(inputs["check"]) == workload.CHECK_BATCHES
    assert len({int(timesteps[0]) for _, timesteps in inputs["check"]}) == workload.CHECK_BATCHES
    assert len({int(timesteps[0]) for _, timesteps in inputs["calibration"]}) == workload.TRAJECTORY_STEPS
    for x_t, timesteps in inputs["check"]:
        assert x_t.shape == (2, 1, 8, 8)
        assert timesteps.shape == (2,)
        assert timesteps.dtype == torch.int64
    again = workload.trajectory_inputs(unet, scheduler, 2, seed=0)
    assert torch.equal(again["check"][0][0], inputs["check"][0][0])
    assert not torch.equal(inputs["calibration"][0][0], inputs["check"][0][0])


def test_a_network_denoises_samples_of_another_size(tiny_dir, tmp_path):
    unet, scheduler = workload.float_model(f"{tiny_dir}@16")
    inputs = workload.trajectory_inputs(unet, scheduler, 2, seed=0)
    assert all(x_t.shape == (2, 1, 16, 16) for x_t, _ in inputs["check"])
    with pytest.raises(ValueError, match=r"samples of 9x9: this UNet halves them down to 1/2, give a multiple"):
        workload.float_model(f"{tiny_dir}@9")
    named = shutil.copytree(tiny_dir, tmp_path / "at@16")
    assert workload.float_model(str(named))[0].config.sample_size == 8  # a folder of this name comes first


def test_conditional_network_gets_text_states():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    inputs = workload.trajectory_inputs(unet, DDIMScheduler(), 2, seed=0)
    assert inputs["names"] == ["encoder_hidden_states"]
    x_t, timesteps, states = inputs["check"][0]
    assert states.shape == (2, workload.TEXT_TOKENS, 12)
    with torch.no_grad():
        prediction = workload.Step(unet, inputs["names"])(x_t, timesteps, states)
        assert torch.equal(prediction, unet(x_t, timesteps, states).sample)


def test_gmac_counts_a_convolution():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)
    assert workload.gmac_per_step(conv, (torch.zeros(2, 3, 4, 4),)) == pytest.approx(2 * 16 * 5 * 27 / 1e9)


def test_shared_storage_counts_once():
    weight = torch.zeros(10)
    assert contenders.tensor_bytes([weight, weight[2:4], torch.zeros(3, dtype=torch.int8)]) == 43


def test_peak_memory_of_a_child_is_its_own():
    ballast = torch.ones(100_000_000)
    # by its path, so that it brings torch and not the whole package
    program = f"import runpy; module = runpy.run_path({machine.__file__!r}); print(module['peak_rss_bytes']())"
    peak = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert peak < machine.rss_bytes()
    assert machine.peak_rss_bytes() > ballast.nbytes


def test_peak_memory_can_start_anew():
    del_me = torch.ones(60_000_000)
    high = machine.peak_rss_bytes()
    del del_me
    if not machine.reset_peak_rss():
        pytest.skip("this system does not reset a process's peak")
    assert machine.peak_rss_bytes() < high - 100e6


def test_peaks_of_the_machine():
    found = machine.peak_gmacs()
    assert {"fp32", "int8"} <= found.keys()
    assert all(rate > 0 for rate in found.values())


def test_description_of_the_machine(monkeypatch):
    found = machine.describe(2)
    json.dumps(found)
    assert found["threads"] == 2
    assert found["versions"]["diffusers"]
    monkeypatch.setattr(machine, "PACKAGES", ("no-such-package",))
    assert machine.versions()["no-such-package"] is None
    assert machine.check_threads(None) == load.available_cores()


def test_timed_counts_calls():
    calls = []
    assert len(machine.timed(lambda: calls.append(time.perf_counter()), 3)) == 3
    assert len(calls) == 4
