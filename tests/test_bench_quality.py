"""The quality benchmark on a tiny network: rows, seeds, what is kept and reused."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pqcad_ao import CacheConfig, CADConfig, cli
from pqcad_ao.bench.quality import command, measure
from pqcad_ao.bench.quality.rows import ABLATIONS, ROWS, SETS, SOLVED
from pqcad_ao.cli.command import app
from pqcad_ao.data import to_uint8
from pqcad_ao.diffusion import trajectories
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.evaluate.features import FeatureClassifier, RealFeatures
from pqcad_ao.models import load_model
from pqcad_ao.utils.options import command_line

OPTIONS = {
    "calibration_points": 16,
    "calibration_steps": 4,
    "calibration_batch_size": 8,
    "timestep_groups": 4,
    "learning_points": 16,
    "batch_size": 4,
    "iterations": 24,
    "beta": 0.5,
    "window": 1,
    "patience": 1,
}


class Pixels(nn.Module):
    """A feature network for 1×8×8 images: the means of four quarters."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 4).flatten(1)


def run(least_dir: Path, work: Path, **options):
    generator = torch.Generator().manual_seed(0)
    features = Pixels(), RealFeatures.from_features(torch.randn(64, 4, generator=generator))
    said: list[str] = []
    return measure.bench_quality(
        str(least_dir),
        **{"steps": 2, "n": 6, "work": work, "features": features, "options": OPTIONS, **options},
        say=said.append,
    ), said


@pytest.fixture(scope="module")
def measured(least_dir, tmp_path_factory):
    work = tmp_path_factory.mktemp("quality")
    result, said = run(least_dir, work, rows=["fp_full", "ptq_full", "pq_full"], seeds=[0, 1])
    return work, result, said


def test_a_row_for_each_name_and_seed(measured):
    _, result, said = measured
    assert [(row["name"], row["seed"]) for row in result["rows"]] == [
        (name, seed) for seed in (0, 1) for name in ("fp_full", "ptq_full", "pq_full")
    ]
    assert len(said) == 6
    for row in result["rows"]:
        assert (row["n"], row["steps"]) == (6, 2)
        assert row["fid"] >= 0
        assert row["fid_ci"][0] <= row["fid"] <= row["fid_ci"][1]
        assert (row["sqnr_db"] is None) == (row["name"] == "fp_full")
        assert 0 <= row["precision"] <= 1
        assert 0 <= row["recall"] <= 1
        assert len(row["power"]) == 4
        assert row["power"][0] == 0 < min(row["power"][1:])  # 8 pixels hold no wave of 16
        assert row["cpu"] == result["cpu"]["name"]
        assert row["threads"] == torch.get_num_threads()
    learned = [row for row in result["rows"] if row["name"] == "pq_full"]
    assert all(row["iterations"] == 24 and row["transitions"] for row in learned)
    assert {"versions", "threads", "cpu"} <= result.keys()


def test_the_table_has_the_spread_of_the_seeds(measured):
    _, result, _ = measured
    lines = command.table(result).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    headings = lines[0].split(" | ")
    assert len(set(headings)) == len(headings)
    assert len(lines) == 5
    assert "±" in lines[-1]
    assert "progressive W4A4" in lines[-1]


def test_the_table_sets_each_row_over_full_precision_of_its_seed():
    def row(name, seed, fid, interval):
        rest = {"kid": None, "precision": 0.5, "recall": None, "sqnr_db": None, "seconds": None}
        return {"name": name, "title": name, "seed": seed, "n": 9, "steps": 4, "fid": fid, "fid_ci": interval, **rest}

    full = [row("fp_full", 0, 2.0, [1.8, 2.2]), row("fp_full", 1, 4.0, [3.0, 5.0])]
    other = [row("pq_full", 0, 3.0, [2.7, 3.3]), row("pq_full", 1, 8.0, [7.0, 9.0])]

    def cells(rows):
        return [cell.strip() for cell in command.table({"rows": rows}).splitlines()[-1].split("|")[1:-1]]

    assert cells(full + other)[:4] == ["pq_full", "4", "5.50 ± 3.54", "1.75 ± 0.35"]
    assert cells(full[:1] + other[:1])[2:6] == ["3.00 ± 0.30", "1.50 ± 0.21", "–", "0.500"]
    assert cells(full[1:] + other[:1])[3] == "–"  # full precision of another seed is no measure
    assert cells(other[:1] + full[:1])[3] == "1"


def test_the_table_sets_the_power_of_each_band_over_full_precisions():
    def row(name, seed, **power):
        rest = {"kid": None, "precision": 0.5, "recall": None, "sqnr_db": None, "seconds": None}
        return {
            "name": name,
            "title": name,
            "seed": seed,
            "n": 9,
            "steps": 4,
            "fid": 1.0,
            "fid_ci": [1, 1],
            **rest,
            **power,
        }

    full = [row("fp_full", 0, power=[0.0, 4.0, 2.0]), row("fp_full", 1, power=[0.0, 2.0, 1.0])]
    other = [row("pq_full", 0, power=[0.0, 3.0, 2.0]), row("pq_full", 1, power=[0.0, 2.5, 0.5])]
    older = [row("ptq_full", 0)]

    def shown(rows):
        lines = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in command.table({"rows": rows}).splitlines()
        ]
        return [line[lines[0].index("power by band")] for line in lines[2:]]

    assert shown(full + other + older) == ["– 1.00 1.00", "– 1.00 0.75", "–"]
    assert shown(other) == ["–"]


def test_what_was_measured_is_not_measured_again(measured, least_dir, monkeypatch):
    work, result, _ = measured
    monkeypatch.setattr(measure, "quantize_", lambda *args, **options: pytest.fail("it quantized again"))
    with monkeypatch.context() as patch:
        patch.setattr(measure, "sample", lambda *args, **options: pytest.fail("it sampled again"))
        again, _ = run(least_dir, work, rows=["pq_full", "fp_full"], seeds=[1])
    assert again["rows"] == [
        row for name in ("pq_full", "fp_full") for row in result["rows"] if (row["name"], row["seed"]) == (name, 1)
    ]
    more, _ = run(least_dir, work, rows=["pq_full"], seeds=[1], steps=3)  # the network is there, its pictures are not
    assert more["rows"][0]["steps"] == 3
    assert more["rows"][0]["seconds"] == again["rows"][0]["seconds"]


def test_pictures_of_every_row_are_kept(measured, least_dir):
    work, _, _ = measured
    drawn = run(least_dir, work, rows=["fp_full", "pq_full"], seeds=[1, 0])[0]["pictures"]
    assert [label.split(":")[0] for label in drawn] == ["full precision", "progressive W4A4"]
    first, second = drawn.values()
    assert first.shape == second.shape == (6, 1, 8, 8)
    assert not torch.equal(first, second)
    teacher, scheduler = load_model(least_dir)
    noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, to_uint8(sample(teacher, scheduler, noise, 2)))  # the first seed's, not the last one's


def test_bad_input_is_named(least_dir, tmp_path):
    with pytest.raises(ValueError, match="rows best_full: allowed are fp_full"):
        run(least_dir, tmp_path, rows=["best_full"])
    with pytest.raises(ValueError, match="n=1"):
        run(least_dir, tmp_path, n=1)
    with pytest.raises(ValueError, match="6 steps do not divide"):  # before the first row is measured
        run(least_dir, tmp_path, rows=["fp_full", "pqcad_half"], steps=6)
    assert not any(tmp_path.iterdir())


def test_every_row_has_a_valid_configuration():
    for name, row in ROWS.items():
        config = row.config(3)
        assert config is None or config.seed == 3
        assert row.base is None or row.base in ROWS
        cad = None if row.cad is None else CADConfig(**row.cad)
        assert cad is None or row.part == 2**cad.halvings
        cache = None if row.cache is None else CacheConfig(**row.cache)
        assert config or cad or row.solver or row.correct or cache or name in ("fp_full", "fp_half", "pq_half")
    learned = [row.cad.get("iterations") for name, row in ABLATIONS.items() if row.cad and name != "cad_joint"]
    assert set(learned) == {None}  # what is compared takes the same number of updates


@pytest.mark.parametrize("name", SOLVED)
def test_rows_of_other_solvers_sample_as_their_pipeline_does(least_dir, tmp_path, name):
    row, steps = ROWS[name], 8
    result, _ = run(least_dir, tmp_path, rows=[name], steps=steps)
    assert result["rows"][0]["steps"] == steps // row.part
    assert result["rows"][0]["sqnr_db"] is None
    network, scheduler = load_model(next(tmp_path.glob(f"{row.base}-*/model")) if row.base else least_dir)
    x_t = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    solver = getattr(diffusers, row.solver).from_config(scheduler.config)
    solver.set_timesteps(steps // row.part)
    with torch.no_grad():
        for timestep in solver.timesteps:
            x_t = solver.step(network(x_t, timestep).sample, timestep, x_t).prev_sample
    drawn = load_file(next(tmp_path.glob("*/*.safetensors")))["images"]
    assert (drawn.int() - to_uint8(x_t).int()).abs().max() <= 1


def test_a_row_is_a_line_of_json_with_the_options_asked_for(least_dir, tmp_path, monkeypatch, capsys):
    measure_rows, given = measure.bench_quality, {}

    def measured(model, **options):
        given.update(options)
        generator = torch.Generator().manual_seed(0)
        features = Pixels(), RealFeatures.from_features(torch.randn(64, 4, generator=generator))
        return measure_rows(model, **{**options, "features": features})

    monkeypatch.setattr(measure, "bench_quality", measured)
    asked = [
        "bench",
        "quality",
        "--model",
        str(least_dir),
        "--work",
        str(tmp_path),
        "--steps",
        "2",
        "--n",
        "6",
        "--rows",
        "fp_full,fp_half",
    ]
    changed = ["--cad.learning-rate", "6e-4", "--cad.direct", "--pq.activation-ladder", "[8,6]"]
    assert cli.main([*asked, *changed, "--lines"]) == 0
    assert given["cad_options"] == {"learning_rate": 6e-4, "direct": True}
    assert given["options"] == {"activation_ladder": [8, 6]}
    assert given["features"] is None
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["name"], line["n"], line["device"]) for line in lines] == [
        ("fp_full", 6, "cpu"),
        ("fp_half", 6, "cpu"),
    ]
    network = FeatureClassifier(3, channels=(4, 8)).eval()
    network.save(tmp_path / "classifier.safetensors")
    RealFeatures.from_features(torch.randn(9, 8)).save(tmp_path / "features_test.safetensors")
    assert cli.main([*asked, "--features", str(tmp_path), "--lines"]) == 0
    assert (given["features"][0].architecture["in_channels"], given["features"][1].n) == (3, 9)


def test_sets_of_rows_have_names():
    def asked(rows: str) -> list[str]:
        _, bound = command_line(app, ["bench", "quality", "--rows", rows])
        return bound.arguments["rows"]

    for name, rows in SETS.items():
        assert asked(name) == rows
        assert set(rows) <= ROWS.keys()
        assert "fp_full" in rows  # every ratio is to it
    halved = [
        "fp_half",
        "pq_half",
        "pqcad_half",
        "pqcad_quarter",
        "pqcad_quarter_direct",
        "pqcad_half_w4a6",
        "pqcad_quarter_w4a6",
    ]
    assert SETS["halving"] == ["fp_full", *halved, *SOLVED]
    assert asked("fp_full,pq_full") == ["fp_full", "pq_full"]


@pytest.mark.slow
def test_distilled_rows_start_from_another_rows_network(least_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "FARTHEST", float("inf"))  # random weights denoise nothing
    cad = {"iterations": 4, "batch_size": 4, "points": 8}
    rows = ["fp_half", "pq_half", "pqcad_half", "pqcad_quarter", "pd_half", "pd_then_q"]
    result, _ = run(least_dir, tmp_path, rows=rows, steps=4, cad_options=cad)
    found = {row["name"]: row for row in result["rows"]}
    assert list(found) == rows
    assert [row["steps"] for row in found.values()] == [2, 2, 2, 1, 2, 2]
    # the progressive network behind three of them was learned once
    assert len(list(tmp_path.glob("pq_full-*/made.json"))) == 1
    assert found["pqcad_half"]["fid"] != found["pq_half"]["fid"]
    assert found["pqcad_quarter"]["iterations"] == 8
    assert found["pqcad_half"]["average_bits"] == found["pq_half"]["average_bits"] < 8
    assert found["pd_half"]["average_bits"] == 32.0
    assert found["pd_then_q"]["average_bits"] < 8
    again, _ = run(least_dir, tmp_path, rows=rows, steps=4, cad_options=cad)
    assert again["rows"] == result["rows"]


@pytest.mark.slow
def test_rows_sampled_through_the_compiler_are_those_of_eager(measured, least_dir):
    work, result, _ = measured
    compiled, _ = run(least_dir, work, rows=["fp_full", "pq_full"], compiled=True)
    for row in compiled["rows"]:
        eager = next(other for other in result["rows"] if (other["name"], other["seed"]) == (row["name"], 0))
        assert (row["sampled"], eager["sampled"]) == ("compiled", "eager")
        # values on a threshold of the grid may go either way
        assert row["fid"] == pytest.approx(eager["fid"], rel=0.02)
        assert row["sqnr_db"] == eager["sqnr_db"]


@pytest.mark.slow
def test_rows_that_keep_features_cost_less_a_step(measured, least_dir):
    """Of the teacher, which stays as it is, and of a quantized network, in eager and compiled form."""
    work, before, _ = measured
    rows = ["fp_full", "cache_fp", "cache_naive", "cache_qc"]
    result, _ = run(least_dir, work, rows=rows, seeds=[0])
    full, *cached = result["rows"]
    assert full["fid"] == before["rows"][0]["fid"]
    for row in cached:
        assert 0.5 < row["gmacs_per_step"] / full["gmacs_per_step"] < 0.7
        assert row["sqnr_db"] is None
    assert "GMAC a step" in command.table(result)
    compiled, _ = run(least_dir, work, rows=["cache_qc"], seeds=[0], compiled=True)
    assert compiled["rows"][0]["fid"] == pytest.approx(cached[-1]["fid"], rel=0.05)
