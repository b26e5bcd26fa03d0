import dataclasses
import io
import json
import operator
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import rich.console
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from pqcad_ao import CachedUNet, cli, distill
from pqcad_ao.cli.command import app
from pqcad_ao.config import CacheConfig, CADConfig, Correction, PQCADConfig
from pqcad_ao.denoiser import predict
from pqcad_ao.diffusion import trajectories
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.edge import export
from pqcad_ao.evaluate import features, fid
from pqcad_ao.evaluate.features import FeatureClassifier
from pqcad_ao.learn import progressive
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.conv2d import QuantizedConv2d
from pqcad_ao.pages import pictures
from pqcad_ao.recipes import demo
from pqcad_ao.utils import machine
from pqcad_ao.utils.tensor_files import write_tensors

QUICK = ["--calibration-points", "16", "--groups", "4", "--mode", "ptq"]


@pytest.fixture
def model_dir(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny_dir`` that a test may damage."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def compressed_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "compressed"
    assert cli.main(["compress", "--model", str(tiny_dir), "--out", str(out), *QUICK]) == 0
    return out


def run_json(tmp_path: Path, *argv: object) -> dict:
    """The JSON result of a command that must succeed."""
    file = tmp_path / "result.json"
    assert cli.main([*map(str, argv), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def error_line(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    capsys.readouterr()
    try:
        code = cli.main([*map(str, argv)])
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("pqcad: error: ")
    return lines[0]


def test_plan_prints_and_writes_every_layer(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    found = run_json(
        tmp_path, "plan", "--model", model_dir, "--override", "attention=8,8", "--override", "conv_*=float"
    )
    rows = {row["fqn"]: row for row in found["rows"]}
    assert rows["conv_in"]["weight_bits"] is None
    assert rows["mid_block.attentions.0.to_q"]["activation_bits"] == 8
    assert rows["mid_block.resnets.0.conv1"]["weight_bits"] == 4
    printed = capsys.readouterr().out
    assert all(fqn in printed for fqn in rows)
    assert found["summary"] in printed


def test_compress_writes_a_pipeline_that_computes_the_same_bits(
    model_dir: Path, compressed_dir: Path, capsys: pytest.CaptureFixture
):
    unet, scheduler = load_model(compressed_dir)
    assert isinstance(unet.mid_block.resnets[0].conv1, QuantizedConv2d)
    loaded = DDIMPipeline.from_pretrained(compressed_dir)
    assert loaded.scheduler.config.timestep_spacing == "trailing"
    x_t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1, 500, 999])
    with torch.no_grad():
        assert torch.equal(predict(loaded.unet, x_t, timesteps), predict(unet, x_t, timesteps))
        full, _ = load_model(model_dir)
        assert not torch.equal(predict(full, x_t, timesteps), predict(unet, x_t, timesteps))

    def pictures(pipeline: DDIMPipeline) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        return pipeline(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images

    assert np.array_equal(pictures(loaded), pictures(DDIMPipeline(unet, scheduler)))


def test_compress_writes_a_page(model_dir: Path, tmp_path: Path):
    page = tmp_path / "new" / "report.html"
    argv = ["compress", "--model", model_dir, "--out", tmp_path / "a", "--report", page, *QUICK]
    assert {"pictures", "log"}.isdisjoint(run_json(tmp_path, *argv))
    text = page.read_text()
    assert text.count("<img") == 8 * 3 + 2  # full precision, compressed and the difference; and both as grids
    for said in ("Size", "The network", "Plan", "no FID was measured", "nothing was learned", "--report", "conv_in"):
        assert said in text, said


def test_eval_writes_a_page(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quality = {"fid": 3.0, "kid": None, "precision": 0.9, "recall": 0.8, "n": 5, "fid_ci": [2.0, 4.0]}
    monkeypatch.setattr(fid, "image_quality", lambda *given, **options: quality)
    monkeypatch.setattr(features, "extract_features", lambda *given: None)
    argv = ["eval", "--model", model_dir, "--n", 5, "--steps", 2, "--report", tmp_path / "report.html"]
    assert "pictures" not in run_json(tmp_path, *argv)
    text = (tmp_path / "report.html").read_text()
    assert "3.00 (2.00 to 4.00)" in text
    assert text.count("<img") == 5 + 1


def test_compress_reports_what_it_wrote(model_dir: Path, tmp_path: Path):
    out = tmp_path / "w6"
    found = run_json(tmp_path, "compress", "--model", model_dir, "--out", out, "--weight-bits", "6", *QUICK)
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    assert found["checkpoint_bytes"] == weights.stat().st_size
    assert {row["weight_bits"] for row in found["rows"] if row["role"] == "body"} == {6}
    assert found["arithmetic"]
    assert cli.main(["plan", "--model", str(out)]) == 0  # of a quantized network: what was done
    assert cli.main(["plan", "--model", str(out), "--weight-bits", "5"]) == 2


def test_sample_is_the_same_for_the_same_seed(compressed_dir: Path, tmp_path: Path):
    sample = ["sample", "--model", compressed_dir, "--n", 5, "--steps", 2]
    found = run_json(tmp_path, *sample, "--out", tmp_path / "a.png", "--seed", 3, "--batch-size", 2)
    assert (found["n"], found["steps"], found["seed"]) == (5, 2, 3)
    run_json(tmp_path, *sample, "--out", tmp_path / "b.png", "--seed", 3)
    run_json(tmp_path, *sample, "--out", tmp_path / "c.png", "--seed", 4)
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_eval_against_a_folder_of_images(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.manual_seed(0)
    FeatureClassifier(in_channels=1, image_size=8, channels=(4, 4)).save(tmp_path / "features.safetensors")
    (tmp_path / "real").mkdir()
    for index, image in enumerate(torch.randint(256, (20, 8, 8), dtype=torch.uint8)):
        Image.fromarray(image.numpy()).save(tmp_path / "real" / f"{index}.png")
    given = ["--data", tmp_path / "real", "--features", tmp_path / "features.safetensors", "--card"]
    found = run_json(tmp_path, "eval", "--model", model_dir, "--n", 24, "--steps", 2, *given, "--bootstrap", 20)
    assert f"FID {found['fid']:.2f} ({found['fid_ci'][0]:.2f} to" in (model_dir / "README.md").read_text()
    assert found["fid"] > 0
    assert found["n"] == 24
    assert found["fid_ci"][0] <= found["fid"] <= found["fid_ci"][1]
    printed = capsys.readouterr().out
    assert f"FID {found['fid']:.3f}" in printed
    assert f"precision {found['precision']:.3f}, recall {found['recall']:.3f}" in printed


def test_compress_distills_and_its_steps_are_then_the_default(
    least_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trajectories, "FARTHEST", float("inf"))  # an untrained network fails the check of the betas
    out = tmp_path / "student"
    argv = ["compress", "--model", least_dir, "--out", out, "--distill", 4, "--fast", *QUICK]
    assert run_json(tmp_path, *argv)["steps"] == 2
    found = run_json(tmp_path, "sample", "--model", out, "--out", tmp_path / "grid.png", "--n", 2)
    assert found["steps"] == 2


def test_halvings_of_nothing_are_one_line(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    line = error_line(capsys, "compress", "--model", model_dir, "--out", tmp_path / "a", "--halvings", 2, *QUICK)
    assert "--halvings 2 without --distill N" in line


def test_what_the_demo_cannot_do_is_one_line_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture):
    asked = ["demo", "--out", tmp_path, "--images", 2, "--steps"]
    assert "--steps 25 cannot be halved: give an even number, or --no-distill" in error_line(capsys, *asked, 25)
    assert "24 steps do not divide the scheduler's 1000 training timesteps" in error_line(capsys, *asked, 24)


def test_compress_takes_real_pictures(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = {}
    monkeypatch.setattr(
        distill, "compress", lambda unet, scheduler, pq, cad, **given: found.update(given) or (unet, scheduler)
    )
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "ab":
        Image.new("L", (8, 8), 255).save(pictures / f"{name}.png")
    argv = ["compress", "--model", model_dir, "--out", tmp_path / "out", "--distill", 4, "--data", pictures]
    run_json(tmp_path, *argv)
    assert torch.equal(found["images"], torch.ones(2, 1, 8, 8))


def test_export_hands_on_what_was_asked_for(
    compressed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    pytest.importorskip("executorch", reason="export needs executorch")
    asked: dict = {}

    def export_pte(unet, path: Path, **options) -> export.PTEReport:
        asked.update(options, path=path)
        return export.PTEReport(
            path, 1234, 3, {"aten::upsample": 2}, {999: 30.0, 499: 41.5}, arithmetic={"conv_in": "int8 products"}
        )

    monkeypatch.setattr(export, "export_pte", export_pte)
    argv = ["--model", compressed_dir, "--out", tmp_path / "new" / "unet.pte", "--steps", 7, "--batch-size", 2]
    argv += ["--objective", "size", "--max-bytes", 5000]
    found = run_json(tmp_path, "export", *argv)
    assert (asked["num_inference_steps"], asked["batch_size"]) == (7, 2)
    assert (asked["objective"], asked["max_bytes"]) == ("size", 5000)
    assert asked["path"] == tmp_path / "new" / "unet.pte"
    assert asked["scheduler"].config.prediction_type == "v_prediction"
    assert (found["bytes"], found["steps"], found["sqnr_db"]) == (1234, 7, {"999": 30.0, "499": 41.5})
    assert "30.0 dB at worst" in capsys.readouterr().out
    argv[argv.index("--batch-size") + 1] = "1,4"
    assert run_json(tmp_path, "export", *argv)["batch_size"] == asked["batch_size"] == [1, 4]


def test_export_of_the_baseline(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("executorch", reason="export needs executorch")
    asked: dict = {}

    def export_fp32_pte(unet, path: Path, **options) -> export.PTEReport:
        asked.update(options, path=path)
        return export.PTEReport(path, 99, 1, {})

    monkeypatch.setattr(export, "export_fp32_pte", export_fp32_pte)
    found = run_json(tmp_path, "export", "--model", tiny_dir, "--out", tmp_path / "fp32.pte", "--full-precision")
    assert asked == {"path": tmp_path / "fp32.pte", "batch_size": 1, "conditioning": {}}
    assert found["bytes"] == 99
    assert "steps" not in found, "it has no schedule in it"


def test_export_of_a_network_in_full_precision_is_one_line(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    pytest.importorskip("executorch", reason="export needs executorch")
    line = error_line(capsys, "export", "--model", tiny_dir, "--out", tmp_path / "unet.pte")
    assert "is not quantized" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compress", "--out", "o"], "--model requires an argument"),
        (["plan", "--mdoel", "demo"], "Did you mean --model instead of --mdoel? (see pqcad plan --help)"),
        (["comprss", "--model", "demo"], 'Did you mean "compress"? Available commands: demo, plan'),
        (["plan", "--model", "nowhere"], "no model 'nowhere'"),
        (["plan", "--model", "{tmp}"], "holds no diffusers UNet"),
        (["plan", "--model", "{model}/unet/config.json"], "no model"),
        (["plan", "--model", "{model}", "--weight-bits", "9"], "weight_bits=9"),
        (["plan", "--model", "{model}", "--weight-bits", "float"], "use overrides"),
        (["plan", "--model", "{model}", "--override", "attention"], "write attention=8,8"),
        (["plan", "--model", "{model}", "--override", "attention=8,8,8"], "write attention=8,8"),
        (["plan", "--model", "{model}", "--override", "attention=x"], "neither a number of bits nor 'float'"),
        (["plan", "--model", "{model}", "--override", "atention=8"], "matches no layer"),
        (["compress", "--model", "{model}", "--out", "o", "--mode", "magic"], 'Choose from: "ptq", "fixed"'),
        (["compress", "--model", "{model}", "--out", "o", "--iteratoins", "5"], "Did you mean --iterations?"),
        (["compress", "--model", "{model}", "--out", "o", "--iterations", "1.5"], "'1.5' is no whole number"),
        (["compress", "--model", "{model}", "--out", "{tmp}/a", "--cad.points", "5"], "--cad.points without --distill"),
        (["bench", "quality", "--pq", "batch_size=5"], "--pq batch_size=5: write --pq.batch-size 5"),
        (["plan", "--model", "{model}", "--iterations", "5"], "Unknown option: --iterations"),
        (["plan", "--model", "{model}", "--json", "{model}/model_index.json/x"], "cannot write to"),
        (["compress", "--model", "{model}", "--out", "{model}/model_index.json"], "cannot write to"),
        (["compress", "--model", "{model}", "--out", "{tmp}/a", "--data", "x"], "--data x without --distill N"),
        (["sample", "--model", "{model}", "--out", "{tmp}/a.png", "--n", "0"], "Must be >= 1"),
        (["export", "--model", "x", "--out", "o", "--full-precision", "--batch-size", "1,4"], "writes one batch size"),
        (["sample", "--model", "{model}", "--out", "{tmp}/a.nopicture", "--n", "1", "--steps", "1"], ".nopicture"),
        (["eval", "--model", "{model}", "--n", "2", "--steps", "1"], "takes (N, 1, 32, 32)"),
        (["eval", "--model", "{model}", "--features", "f"], "give --data DIR too"),
        (["eval", "--model", "{model}", "--data", "{tmp}/none"], "is no folder"),
        (["eval", "--model", "demo", "--card"], "demo is no folder with a model"),
        (["bench", "compile", "--model", "nowhere"], "no model 'nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], says: str
):
    filled = [argument.format(model=model_dir, tmp=tmp_path) for argument in arguments]
    assert says in error_line(capsys, *filled)


def damage(model_dir: Path, how: str) -> None:
    weights = model_dir / "unet" / "diffusion_pytorch_model.safetensors"
    config = model_dir / "unet" / "config.json"
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "no JSON":
        config.write_text("{")
    elif how == "foreign class":
        config.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    elif how == "no scheduler":
        (model_dir / "scheduler" / "scheduler_config.json").unlink()
    elif how == "foreign scheduler":
        (model_dir / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "IPNDMScheduler"}')


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated weights", "cannot be read as a UNet2DModel"),
        ("no weights", "cannot be read as a UNet2DModel"),
        ("no JSON", "is no JSON or is damaged"),
        ("foreign class", "allowed are UNet2DModel"),
        ("no scheduler", "scheduler.save_pretrained"),
        ("foreign scheduler", "IPNDMScheduler: allowed are DDIMScheduler"),
    ],
)
def test_damaged_model_is_one_line(model_dir: Path, capsys: pytest.CaptureFixture, how: str, says: str):
    damage(model_dir, how)
    assert says in error_line(capsys, "sample", "--model", model_dir, "--out", "a.png")


def test_nan_in_the_weights_is_one_line(
    tiny_unet: UNet2DModel, scheduler: DDIMScheduler, tmp_path: Path, capsys: pytest.CaptureFixture
):
    with torch.no_grad():
        tiny_unet.conv_in.weight[0] = float("nan")
    save_model(tiny_unet, scheduler, tmp_path / "nan")
    line = error_line(capsys, "compress", "--model", tmp_path / "nan", "--out", tmp_path / "out", *QUICK)
    assert "conv_in.weight holds NaN" in line
    assert not (tmp_path / "out" / "unet").exists()


@pytest.fixture(scope="module")
def classes_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of ten classes, and beside it what its conditioning may be: good.safetensors and bad ones."""
    folder = tmp_path_factory.mktemp("classes")
    unet, scheduler = load_model(tiny_dir)
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    save_model(UNet2DModel(**config | {"num_class_embeds": 10}), scheduler, folder)
    good = {"class_labels": torch.tensor([3, 7])}
    for name, tensors in {"good": good, "foreign": {**good, "style": torch.ones(2)}, "empty": {}}.items():
        write_tensors(folder / f"{name}.safetensors", tensors)
    return folder


def test_a_conditional_network_goes_through_every_command(
    classes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = ["--conditioning", classes_dir / "good.safetensors"]
    assert "layers quantized" in run_json(tmp_path, "plan", "--model", classes_dir, *given)["summary"]
    out = tmp_path / "out"
    run_json(tmp_path, "compress", "--model", classes_dir, "--out", out, *QUICK, *given)
    run_json(tmp_path, "plan", "--model", out)  # of a quantized network: it is not run
    drawn = []
    monkeypatch.setattr(pictures, "save_grid", lambda images, path: drawn.append(images))
    run_json(tmp_path, "sample", "--model", out, "--out", tmp_path / "a.png", "--n", 3, "--steps", 2, *given)
    unet, scheduler = load_model(out)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sample(unet, scheduler, noise, 2, conditioning={"class_labels": torch.tensor([3, 7, 3])})
    assert torch.equal(drawn[0], expected)
    asked: dict = {}
    monkeypatch.setattr(export, "export_fp32_pte", lambda *_, **options: asked.update(options) or 1 / 0)
    assert (
        cli.main(["export", "--model", str(classes_dir), "--out", "a.pte", "--full-precision", *map(str, given)]) == 2
    )
    assert asked["conditioning"]["class_labels"].tolist() == [3, 7]


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (None, "conditional and conditioning has no 'class_labels': write --conditioning FILE.safetensors"),
        ("foreign", "UNet2DModel takes no style: allowed in conditioning are class_labels, return_dict"),
        ("empty", "empty.safetensors holds no tensors"),
        ("nowhere", "no file"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "compress", "sample", "eval", "export"])
def test_a_conditioning_that_is_missing_or_bad_is_one_line(
    classes_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str, file: str | None, says: str
):
    out = [] if command in ("plan", "eval") else ["--out", tmp_path / "out"]
    given = [] if file is None else ["--conditioning", classes_dir / f"{file}.safetensors"]
    assert says in error_line(capsys, command, "--model", classes_dir, *out, *given)


def test_a_plan_needs_no_scheduler(model_dir: Path):
    shutil.rmtree(model_dir / "scheduler")
    assert cli.main(["plan", "--model", str(model_dir)]) == 0


def test_quantizing_twice_is_one_line(compressed_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    line = error_line(capsys, "compress", "--model", compressed_dir, "--out", tmp_path / "twice", *QUICK)
    assert "quantized already" in line


def test_traceback_shows_where(model_dir: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["plan", "--model", str(model_dir), "--weight-bits", "9", "--traceback"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("pqcad: error: weight_bits=9")


def configuration_of(argv: list[str]) -> PQCADConfig:
    """What ``pqcad compress`` makes of its options, without the work."""
    _, bound, _ = app.parse_args(argv)
    bound.apply_defaults()
    return (PQCADConfig.fast if bound.arguments["fast"] else PQCADConfig)(**bound.arguments["pq"])


def test_options_mirror_the_config():
    compress = ["compress", "--model", "demo", "--out", "out"]
    argv = [*compress, "--weight-bits", "3", "--activation-bits", "float", "--mode", "ptq"]
    argv += ["--groups", "5", "--calibration-points", "9", "--weight-ladder", "8,6"]
    argv += ["--override", "head=8,8", "--override", "up_blocks.*=float", "--override", "stem=8,float"]
    expected = PQCADConfig(
        mode="ptq",
        weight_bits=3,
        activation_bits=None,
        timestep_groups=5,
        calibration_points=9,
        weight_ladder=[8, 6],
        overrides={
            "head": {"weight_bits": 8, "activation_bits": 8},
            "up_blocks.*": {"weight_bits": None},
            "stem": {"weight_bits": 8, "activation_bits": None},
        },
    )
    assert configuration_of(argv) == expected
    assert configuration_of(compress) == PQCADConfig()
    argv = [*compress, "--fast", "--iterations", "400", "--target-bits", "4.2"]  # 400 is the default, and not fast's
    assert configuration_of(argv) == PQCADConfig.fast(iterations=400, target_bits=4.2)


@pytest.mark.parametrize(
    ("kind", "command", "prefix"),
    [
        (PQCADConfig, "bench quality", "--pq."),
        (CADConfig, "bench quality", "--cad."),
        (CacheConfig, "cache", "--"),
        (Correction, "correct", "--"),
    ],
)
def test_every_field_of_a_configuration_is_an_option_with_its_description(kind: type, command: str, prefix: str):
    options = reduce(operator.getitem, command.split(), app).assemble_argument_collection()
    helps = {name: option.parameter.help for option in options for name in option.names}
    written = {"overrides": "override"}
    for field in dataclasses.fields(kind):
        if field.name != "seed":  # every command's
            assert len(helps[prefix + written.get(field.name, field.name).replace("_", "-")]) > 20


def commands_with_options() -> dict[str, list[str]]:
    """Every command, such as ``bench quality``, and the examples that its help shows at the usual width."""
    names = [name for name in app if not name.startswith("-") and name != "bench"]
    names += [f"bench {name}" for name in app["bench"] if not name.startswith("-")]
    shown = {}
    for name in names:
        console = rich.console.Console(width=80, file=io.StringIO(), force_terminal=False)
        app.help_print(name.split(), console=console)
        shown[name] = re.findall(r"^ +(pqcad .*)$", console.file.getvalue(), re.MULTILINE)
    return shown


@pytest.mark.parametrize(("name", "examples"), commands_with_options().items())
def test_help_shows_examples_that_can_be_typed(name: str, examples: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "check_device", lambda name: name)  # one is for a GPU
    assert examples
    for line in examples:
        assert line.startswith(f"pqcad {name}")
        command, _, _ = app.parse_args(shlex.split(line)[1:], print_error=False, exit_on_error=False)
        assert command.__doc__.count(line)  # not broken


def test_help_imports_no_pytorch():
    commands = [[], *(name.split() for name in commands_with_options())]
    code = (
        "import sys, pqcad_command\n"
        f"for command in {commands}:\n"
        "    sys.argv = ['pqcad', *command, '--help']\n"
        "    pqcad_command.main()\n"
        "print('heavy:', sorted({'torch', 'torchao', 'diffusers', 'numpy', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\n")
    assert done.stdout.count("Usage: pqcad") == len(commands)


def test_the_command_registers_what_the_package_does_and_prints_no_noise(compressed_dir: Path):
    """In a process of its own, where nothing but the command has imported the package: diffusers reads our layers."""
    code = "import sys, pqcad_command; sys.exit(pqcad_command.main())"
    command = [sys.executable, "-c", code, "plan", "--model", str(compressed_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "layers quantized" in done.stdout


def test_an_interrupted_command_says_how_to_go_on_and_goes_on(
    least_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "an out"
    argv = ["compress", "--model", str(least_dir), "--out", str(out), "--calibration-points", "16", "--groups", "4"]
    argv += ["--learning-points", "16", "--batch-size", "4", "--iterations", "2000"]
    # a shell starts what runs in its background, such as these tests, with the signal ignored
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listens}; import sys, pqcad_command; sys.exit(pqcad_command.main())"
    running = subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.PIPE, text=True)
    log = out / "unfinished" / "log.jsonl"
    while not log.is_file() or log.read_text().count("\n") < 60:  # behind the first checkpoint
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    said = running.communicate()[1].splitlines()
    assert running.returncode == 130
    assert said[-2:] == [
        f"pqcad: interrupted; what is done is kept in {out / 'unfinished'}, and the same command goes on from there:",
        f"  pqcad {shlex.join(argv)}",
    ]
    begun = []

    def first_update(run: progressive._Run) -> None:
        begun.append(len(run.log))
        raise KeyboardInterrupt

    monkeypatch.setattr(progressive._Run, "update", first_update)
    assert cli.main(shlex.split(said[-1])[1:]) == 130
    assert len(begun) == 1
    assert begun[0] >= 50


def test_an_interrupted_demo_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    said, command = capsys.readouterr().err.splitlines()
    assert f"kept in {tmp_path / 'unfinished'}, and the same command goes on from there" in said
    assert command == f"  pqcad demo --out {tmp_path}"


@pytest.mark.parametrize("options", [QUICK, [*QUICK[:4], "--fast", "--distill", "4"]], ids=["ptq", "distilled"])
def test_a_dry_run_says_what_it_comes_to_and_writes_nothing(
    tiny_dir: Path,
    compressed_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
):
    for name in ("quantize", "distill"):
        for call in ("calibration_set", "checked_trajectories"):
            monkeypatch.setattr(f"pqcad_ao.{name}.{call}", lambda *_, **__: pytest.fail("work began"), raising=False)
    out = tmp_path / "out"
    found = run_json(tmp_path, "compress", "--model", tiny_dir, "--out", out, *options, "--dry-run")
    assert not out.exists()
    printed = capsys.readouterr().out
    assert all(row["fqn"] in printed for row in found["rows"])
    written = load_file(compressed_dir / "unet" / "diffusion_pytorch_model.safetensors")
    assert found["bytes_after"] == sum(tensor.nbytes for tensor in written.values())
    full = load_file(tiny_dir / "unet" / "diffusion_pytorch_model.safetensors")
    assert found["bytes_before"] == sum(tensor.nbytes for tensor in full.values())
    assert f"{found['bytes_before']:,} bytes now, {found['bytes_after']:,} afterwards" in printed
    assert 0 < found["expected_seconds"] < 3600
    assert "expected: " in printed


def test_dry_runs_of_what_is_measured_write_nothing(tiny_dir: Path, compressed_dir: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    found = run_json(tmp_path, "cache", "--model", tiny_dir, "--out", out, "--steps", 4, "--dry-run")
    assert 0 < found["mean_macs"] < 0.7 * found["full_macs"]
    asked = ["correct", "--model", compressed_dir, "--reference", tiny_dir, "--out", out, "--dry-run"]
    assert run_json(tmp_path, *asked)["steps"] == 20
    assert not out.exists()
    printed = capsys.readouterr().out
    assert "4 steps, 2 of them in full" in printed
    assert printed.count("expected: ") == 2
    line = error_line(capsys, "correct", "--model", tiny_dir, "--reference", tiny_dir, "--out", out, "--dry-run")
    assert "quantize_" in line
    assert "size=4: allowed are odd numbers" in error_line(capsys, *asked, "--size", 4)


@pytest.mark.slow
def test_a_network_is_cached_corrected_and_sampled_by_commands(
    tiny_dir: Path, compressed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    kept, both = tmp_path / "kept", tmp_path / "both"
    asked = ["--reference", tiny_dir, "--points", 4]
    found = run_json(tmp_path, "cache", "--model", compressed_dir, "--out", kept, "--steps", 4, *asked)
    assert len(found["refresh"]) == 2
    assert found["mean_macs"] < 0.7 * found["full_macs"]
    found = run_json(tmp_path, "correct", "--model", kept, "--out", both, "--kind", "variance", "--size", 3, *asked)
    assert (found["steps"], found["cached"]) == (4, True)
    drawn = []
    monkeypatch.setattr(pictures, "save_grid", lambda images, path: drawn.append(images))
    for folder in (kept, both):
        result = run_json(tmp_path, "sample", "--model", folder, "--out", tmp_path / "a.png", "--n", 3)
        assert result["steps"] == 4
    unet, scheduler = load_model(both)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn[1], sample(CachedUNet(unet), scheduler, noise, 4))
    assert not torch.equal(drawn[0], drawn[1])
    line = error_line(capsys, "sample", "--model", both, "--out", tmp_path / "a.png", "--steps", 5)
    assert "fitted for the timesteps" in line


def test_nothing_unfinished_stays_behind(compressed_dir: Path):
    kept = {"README.md", "model_index.json", "pqcad.json", "scheduler", "unet"}
    assert {path.name for path in compressed_dir.iterdir()} == kept


def test_random_cifar10_is_seeded_and_leaves_the_global_random_numbers():
    state = torch.get_rng_state()
    unet, scheduler = load_model("ddpm-cifar10")
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 35_746_307
    assert scheduler.config.prediction_type == "epsilon"
