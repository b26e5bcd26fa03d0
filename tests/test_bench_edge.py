"""The edge benchmark: what it refuses, what it says of a row that cannot be made, and (slowly) what it measures."""

import json

import pytest
import torch

from pqcad_ao.bench.edge import command, measure
from pqcad_ao.edge.storage import COSTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ["tflite"]}, r"'tflite': allowed are xnnpack_fp32, xnnpack_int8, pqcad_speed"),
        ({"rows": []}, r"rows='none'"),
        ({"steps": 0}, r"steps=0: allowed are whole numbers from 1"),
        ({"rounds": True}, r"rounds=True"),
        ({"n": -1}, r"n=-1: allowed are whole numbers from 0"),
        ({"threads": 0}, r"threads=0"),
    ],
)
def test_bad_arguments_are_named_before_the_work(monkeypatch, change, message):
    monkeypatch.setattr(measure, "alone", lambda *args: pytest.fail("the work began"))
    with pytest.raises(ValueError, match=message):
        measure.bench_edge(**change)


def test_rows_take_turns_and_a_rivals_fault_is_a_line(monkeypatch, tmp_path):
    """Processes are called in place of started, and return what they would measure."""
    asked = []

    def alone(function, *args):
        asked.append(function.__name__)
        if function is measure._build:
            if args[0] == "coreml_fp32":
                raise ImportError("No module named 'coremltools'")
            (path,) = args[2:]
            with open(path, "wb") as file:
                file.write(b"x" * 1000)
            return {"delegates": 1, "portable": {"aten::index_select": 2}, "arithmetic": "some"}
        if function is measure._alone:
            return {"load_ms": 1.0, "peak_rss_bytes": 9, "peak_rss_above_start_bytes": 5_000_000, "sqnr_db": 20.0}
        if function is measure._race:
            return {"xnnpack_int8": [2.0, 4.0, 2.0], "pqcad_speed": [1.0, 1.0, 1.5]}, 99.5
        return 3.5 if function is measure._fid else None

    monkeypatch.setattr(measure, "alone", alone)
    rows = ["xnnpack_int8", "pqcad_speed", "coreml_fp32"]
    result = measure.bench_edge(rows=rows, n=4, threads=1, json_path=tmp_path / "r.json")
    assert asked[0] == "_prepare"
    assert asked.count("_race") == 1
    int8, ours, coreml = result["rows"]
    assert (int8["ms"], ours["ms"], ours["over_int8"], ours["bytes"], ours["fid"]) == (2.0, 1.0, 0.5, 1000, 3.5)
    assert coreml["skipped"] == "ImportError: No module named 'coremltools'"
    assert json.loads((tmp_path / "r.json").read_text())["versions"]["torch"] == torch.__version__
    text = command.table(result)
    assert "other programs kept 99.5 cores busy" in text
    assert "2 index_select" in text
    assert "skipped: ImportError" in text
    assert "eager_w4a4: FID 3.500" in text


def test_the_planners_costs_are_measured_ones():
    costs = json.loads(COSTS.read_text())
    assert costs["versions"]["executorch"]
    assert len(costs["layers"]) >= 3
    for key, value in costs["nanoseconds"].items():
        assert min(row[key] for row in costs["layers"]) <= value <= max(row[key] for row in costs["layers"])


@pytest.mark.slow
def test_files_of_the_embedded_teacher(tmp_path):
    pytest.importorskip("executorch.exir")
    result = measure.bench_edge(rows=["xnnpack_int8", "pqcad_size"], steps=3, rounds=2, n=12)
    int8, size = result["rows"]
    assert size["bytes"] < int8["bytes"]
    assert size["delegates"] == 1
    assert int8["delegates"] > 10
    assert size["sqnr_db"] > int8["sqnr_db"]
    assert size["ms"] > 0
    assert abs(size["fid"] / result["eager"]["eager_w4a4"] - 1) < 0.1
