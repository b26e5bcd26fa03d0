"""A model is saved over another one as a whole: whenever the process is killed, one of the two is there to be read."""

import copy
import json
import os
import resource
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from networks import cosine_scheduler, sd3_transformer
from torch import nn

from pqcad_ao.denoiser import predict
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.diffusers_plugin import attach
from pqcad_ao.nn.state import quantized_state


@pytest.fixture
def models(quantized_unet):
    """A network and one that was distilled from it, each with its scheduler."""
    distilled, scheduler = copy.deepcopy(quantized_unet), cosine_scheduler()
    with torch.no_grad():
        distilled.conv_norm_out.weight.mul_(3)
    state = quantized_state(distilled)
    state.timestep.schedule = [999, 749, 499, 249]
    attach(distilled, state)
    changed = DDIMScheduler.from_config(scheduler.config, clip_sample=True)
    return (quantized_unet, scheduler), (distilled, changed)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.Conv2d(1, 8, 3, padding=1))])
def test_a_replaced_layer_is_named_before_anything_is_written(layer, tiny_unet, quantized_unet, scheduler, tmp_path):
    for unet in (copy.deepcopy(tiny_unet), quantized_unet):
        unet.conv_in = layer
        with pytest.raises(ValueError, match=r"could not be loaded, .* network: conv_in\..* register_to_config"):
            save_model(unet, scheduler, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_of_a_flow(tiny_unet, scheduler, tmp_path):
    save_model(tiny_unet, scheduler, tmp_path)
    transformer, conditioning = sd3_transformer()
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    save_model(transformer, flow, tmp_path)
    assert not (tmp_path / "model_index.json").exists(), "of another network, whose pipeline is of another kind"
    assert "from diffusers import FlowMatchEulerDiscreteScheduler, SD3" in (tmp_path / "README.md").read_text()
    again, sampler = load_model(tmp_path)
    assert sampler.config.shift == 3
    x_t, timestep = torch.randn(6, 4, 8, 8), torch.tensor(500.5)  # of no dimensions, where the network wants one
    with torch.no_grad():
        expected, found = (predict(each, x_t, timestep, conditioning) for each in (transformer.eval(), again))
    assert torch.equal(expected, found)


def _which(folder: Path, models) -> int:
    """The number of the model that is there, as a whole."""
    unet, scheduler = load_model(folder)
    (number,) = [n for n, (_, other) in enumerate(models) if other.config.clip_sample == scheduler.config.clip_sample]
    expected = models[number][0]
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in expected.state_dict().items())
    assert quantized_state(unet).timestep.schedule == quantized_state(expected).timestep.schedule
    return number


def _killed_at(model, folder: Path, moment: int) -> bool:
    """Save in another process that ends without a word at its so-manieth call that touches the folder."""

    def save() -> None:
        calls = 0

        def count(event: str, args: tuple) -> None:
            nonlocal calls
            if event.startswith(("os.", "open", "shutil.")) and any(str(folder) in str(arg) for arg in args):
                calls += 1
                if calls == moment:
                    os._exit(9)

        sys.addaudithook(count)
        save_model(*model, folder)
        os._exit(0)

    process = get_context("fork").Process(target=save)
    process.start()
    process.join()
    assert process.exitcode in (0, 9)
    return process.exitcode == 9


def _check_kills(models, folder: Path, moments: range) -> list[int]:
    """Which model was there after a kill at each of these moments."""
    found = []
    for moment in moments:
        save_model(*models[0], folder)
        if not _killed_at(models[1], folder, moment):
            assert _which(folder, models) == 1
            break
        found.append(_which(folder, models))
        save_model(*models[1], folder)
        assert _which(folder, models) == 1
        left = {"unet", "scheduler", "model_index.json", "pqcad.json", "README.md", "notes.txt"}
        assert {path.name for path in folder.iterdir()} == left
        assert len(DDIMPipeline.from_pretrained(folder).unet.config.quantization_config.values["schedule"]) == 4
    assert found == sorted(found), "once the new model is there it stays"
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("the user's")
    return tmp_path / "model"


def test_a_kill_leaves_the_old_model_or_the_new_one(models, folder):
    assert {0, 1} == set(_check_kills(models, folder, range(3, 400, 11)))  # moments closer than the last moves take


@pytest.mark.slow
def test_a_kill_at_every_moment_leaves_the_old_model_or_the_new_one(models, folder):
    found = _check_kills(models, folder, range(1, 400))
    assert {0, 1} == set(found)
    assert len(found) < 399, "the last one was not killed"


def test_a_full_precision_model_over_a_quantized_one(models, tiny_unet, folder):
    save_model(*models[1], folder)
    assert json.loads((folder / "pqcad.json").read_text())["timesteps"] == [999, 749, 499, 249]
    save_model(tiny_unet, cosine_scheduler(), folder)
    assert not (folder / "pqcad.json").exists()
    assert not load_model(folder)[1].config.clip_sample
    assert quantized_state(load_model(folder)[0]) is None


def test_parts_of_two_models_are_refused(models, tmp_path):
    save_model(*models[0], tmp_path / "a")
    save_model(*models[1], tmp_path / "b")
    other = DDIMScheduler.from_config(models[1][1].config, timestep_spacing="leading")
    other.save_pretrained(tmp_path / "b" / "scheduler")
    with pytest.raises(ValueError, match=r"b: its network was distilled for timesteps 999, .* not saved together"):
        load_model(tmp_path / "b")
    DDIMScheduler(num_train_timesteps=500).save_pretrained(tmp_path / "a" / "scheduler")
    with pytest.raises(ValueError, match="has 500 training timesteps, its network was quantized for 1000"):
        load_model(tmp_path / "a")
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    (tmp_path / "a" / weights).write_bytes((tmp_path / "b" / weights).read_bytes())
    with pytest.raises(ValueError, match=r"unet cannot be read .* not those that config\.json was written with"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("at", [0.5, 0.999])
def test_a_flipped_bit_of_full_precision_is_said(at, tiny_unet, tmp_path):
    weights = save_model(tiny_unet, cosine_scheduler(), tmp_path)
    assert load_model(tmp_path)
    content = bytearray(weights.read_bytes())
    content[int(at * len(content))] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"safetensors is damaged: what it holds is not what was written"):
        load_model(tmp_path)


def test_full_precision_that_diffusers_saved_over_ours_is_read(tiny_unet, tmp_path):
    save_model(tiny_unet, cosine_scheduler(), tmp_path)
    with torch.no_grad():
        tiny_unet.conv_in.weight.mul_(2)
    tiny_unet.save_pretrained(tmp_path / "unet")
    assert torch.equal(load_model(tmp_path)[0].conv_in.weight, tiny_unet.conv_in.weight)


def test_what_is_saved_is_the_same_everywhere(models, tmp_path):
    """The same bytes from wherever it was read, and the permissions that the umask leaves."""
    save_model(*models[0], tmp_path / "a")
    save_model(*load_model(tmp_path / "a"), tmp_path / "b")
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    for name in files:
        a, b = tmp_path / "a" / name, tmp_path / "b" / name
        assert a.read_bytes() == b.read_bytes(), name
        assert str(tmp_path) not in b.read_bytes().decode(errors="replace"), name
        assert a.stat().st_mode & 0o777 == 0o644
    assert len(files) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_timesteps": 10**12}, r"scheduler_config\.json: num_train_timesteps=1000000000000: allowed"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps='many'"),
        ({"beta_schedule": "none such"}, "cannot be read as a DDIMScheduler"),
        ({"trained_betas": [2.0] * 1000}, "is damaged: with its betas"),
        ({"trained_betas": [float("nan")] * 1000}, "is damaged: with its betas"),
    ],
    ids=str,
)
def test_a_damaged_scheduler_is_named(change, message, models, tmp_path):
    save_model(*models[0], tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 100_000, b"\xff\xfe\x00", b"[]", b"7", b"1" * 5000], ids=lambda content: str(content[:4])
)
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_what_is_no_json_is_named(name, content, models, tmp_path):
    save_model(*models[0], tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "change", [{"layers_per_block": 10**9}, {"block_out_channels": [2**40, 16]}, {"sample_size": 1e300}]
)
def test_a_configuration_of_a_network_that_cannot_be_is_refused_at_once(change, models, tmp_path):
    save_model(*models[0], tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=r"config\.json is damaged: .* allowed is up to"):
        load_model(tmp_path)


@pytest.mark.parametrize("size", [100, 60_000], ids=["configuration", "weights"])
def test_a_full_disk_leaves_the_model_that_was_there(size, models, folder, tiny_unet):
    larger = UNet2DModel.from_config({**tiny_unet.config, "block_out_channels": [64, 64]})

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            save_model(larger, cosine_scheduler(), folder)
        except OSError:
            os._exit(3)
        os._exit(0)

    save_model(*models[0], folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    process = get_context("fork").Process(target=limited)
    process.start()
    process.join()
    assert process.exitcode == 3
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert _which(folder, models) == 0
