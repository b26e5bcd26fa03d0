"""The GPU's benchmark, run on the CPU with a tiny network: what it records, and what it refuses."""

import json
from functools import partial

import pytest
import torch

from pqcad_ao.bench.compile import card
from pqcad_ao.bench.compile import gpu as bench
from pqcad_ao.cli.command import main
from pqcad_ao.models import load_model
from pqcad_ao.utils.files import write_json


@pytest.fixture(scope="module")
def measured(least_dir, tmp_path_factory):
    """Our row and eager's, and a rival that fails."""
    file = tmp_path_factory.mktemp("bench") / "result.json"
    patch = pytest.MonkeyPatch()
    broken = bench.Row(lambda *_: 1 / 0, None, "nothing")
    patch.setattr(bench, "ROWS", {**bench.ROWS, "torchao_int8_dynamic": broken})
    patch.setattr(torch, "compile", lambda module, **options: module)  # has its own tests
    try:
        rows = ["torch_eager_bf16", "torchao_int8_dynamic", "pqcad_w4a4"]
        result = bench.bench_compile_gpu(
            str(least_dir),
            device="cpu",
            batches=[1, 3],
            rounds=2,
            iterations=2,
            rows=rows,
            kept=partial(write_json, file),
            progress=False,
        )
    finally:
        patch.undo()
    assert json.loads(file.read_text()) == result
    return result


def test_every_row_says_what_was_measured(measured):
    assert [(row["name"], row["batch"]) for row in measured["rows"] if "skipped" not in row] == [
        ("pqcad_w4a4", 1),
        ("pqcad_w4a4", 3),
        ("torch_eager_bf16", 1),
        ("torch_eager_bf16", 3),
    ]
    for row in measured["rows"]:
        if "skipped" not in row:
            assert row["runs"] == 4
            assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
            assert sum(row["kernels_ms"].values()) > 0
    ours, eager = (row for row in measured["rows"] if row["batch"] == 1 and "skipped" not in row)
    assert eager["sqnr_db_vs_fp32"] > 30
    assert 3 < ours["sqnr_db_vs_fp32"] < eager["sqnr_db_vs_fp32"]
    assert ours["resident_weight_bytes"] < eager["resident_weight_bytes"]
    assert "int8" in ours["arithmetic"]
    assert measured["versions"]["torch"] == torch.__version__


def test_a_rival_that_fails_is_a_row_with_the_reason(measured):
    skipped = [row for row in measured["rows"] if "skipped" in row]
    assert [row["name"] for row in skipped] == ["torchao_int8_dynamic"] * 2
    assert "ZeroDivisionError" in skipped[0]["skipped"]


def test_the_largest_convolutions_are_held_against_the_peak(measured):
    assert len(measured["convolutions"]) == card.LARGEST
    for conv in measured["convolutions"]:
        assert conv["part_of_int8_peak"] == pytest.approx(conv["tmacs"] / measured["peak_tmacs"]["int8"])
        assert conv["batch"] == 3


def test_the_table_shows_it(measured):
    text = bench.table(measured)
    assert "skipped torchao_int8_dynamic, batch 1: ZeroDivisionError" in text
    assert text.count("pqcad_w4a4") == 2
    assert "% of the int8 peak" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ["openvino_int8"]}, "'openvino_int8': allowed are pqcad_w4a4"),
        ({"batches": [0]}, "batches=0"),
        ({"model": "sdxl"}, "'sd15'"),
    ],
)
def test_bad_options_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        bench.bench_compile_gpu(**{"model": "demo", "device": "cpu", "progress": False} | changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command", [["bench", "compile", "--device", "cuda"], ["eval", "--model", "demo", "--device", "cuda"]]
)
def test_a_gpu_that_is_not_there_is_one_line(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command)
    error = capsys.readouterr().err
    assert "cuda" in error.lower()
    assert len(error.strip().splitlines()) == 1


def test_stable_diffusions_unet_has_its_published_size():
    with torch.device("meta"):
        unet, scheduler = load_model("sd15")
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    assert scheduler.config.beta_schedule == "scaled_linear"
