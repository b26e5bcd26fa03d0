"""The teacher's recipe: golden losses, a killed run that goes on as if nothing had happened, and what it writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from PIL import Image

from pqcad_ao.recipes import train_teacher
from pqcad_ao.recipes.settings import load_settings
from pqcad_ao.recipes.train_teacher import averaged_copy, lr_at, main, target, train


def _config(**options):
    config = OmegaConf.create(
        {
            "unet": {
                "sample_size": 8,
                "in_channels": 1,
                "out_channels": 1,
                "layers_per_block": 1,
                "block_out_channels": [8],
                "down_block_types": ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"],
                "norm_num_groups": 4,
                "add_attention": False,
                "dropout": 0.1,
            },
            "scheduler": {
                "num_train_timesteps": 1000,
                "beta_schedule": "squaredcos_cap_v2",
                "prediction_type": "v_prediction",
                "timestep_spacing": "trailing",
                "clip_sample": False,
            },
            "data": {"image_size": 8, "flip": True},
            "train": {
                "steps": 10,
                "batch_size": 4,
                "lr": 1e-2,
                "warmup": 3,
                "grad_clip": 1.0,
                "ema": 0.9,
                "bf16": False,
                "seed": 0,
                "checkpoint_every": 4,
                "grid_every": 6,
                "grid_steps": 2,
            },
        }
    )
    return OmegaConf.merge(config, OmegaConf.from_dotlist([f"{key}={value}" for key, value in options.items()]))


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (20, 1, 8, 8), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return train(_config(), images, out), out


def _checkpoint(out) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def _assert_same_checkpoint(first: dict, second: dict) -> None:
    assert first["step"] == second["step"]
    for name, value in first["unet"].items():
        assert torch.equal(value, second["unet"][name])
    for mine, theirs in zip(first["ema"]["shadow_params"], second["ema"]["shadow_params"], strict=True):
        assert torch.equal(mine, theirs)
    for key in ("generator", "rng"):
        assert torch.equal(first[key], second[key])
    for index, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][index][name])


def test_golden_losses(undisturbed):
    """Ten steps in float32; a change of the recipe's arithmetic or of the order of its random draws shows here."""
    losses, _ = undisturbed
    golden = [0.52158, 0.54988, 0.64796, 0.58493, 0.61151, 0.56226, 0.56201, 0.66874, 0.66671, 0.82686]
    assert losses == pytest.approx(golden, rel=2e-3)


def test_a_run_killed_as_it_draws_still_leaves_its_pictures(undisturbed, images, tmp_path, monkeypatch):
    """At its last step, where a checkpoint is due as well: from that one it would go on without the picture."""

    def killed(*args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_teacher, "save_grid", lambda grid, path: killed() if path.name == "grid-10.png" else None)
        with pytest.raises(KeyboardInterrupt):
            train(_config(), images, tmp_path)
    train(_config(), images, tmp_path)
    assert (tmp_path / "grid-10.png").read_bytes() == (undisturbed[1] / "grid-10.png").read_bytes()


def test_a_damaged_checkpoint_is_named(images, tmp_path):
    """torch.load takes a flipped bit for a weight."""
    train(_config(), images, tmp_path, stop_after=4)
    file = tmp_path / "checkpoint.pt"
    whole = file.read_bytes()
    middle = len(whole) // 2
    for changed in (whole[:-50], whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
            train(_config(), images, tmp_path)


def test_a_killed_run_goes_on_bit_for_bit(undisturbed, images, tmp_path):
    """Stopped after 3 steps, at the checkpoint of 4, and after 9; dropout's draws are part of what must be restored."""
    losses, out = undisturbed
    pieces = [train(_config(), images, tmp_path, stop_after=stop) for stop in (3, 4, 9, None)]
    assert [len(piece) for piece in pieces] == [3, 1, 5, 1]
    assert [loss for piece in pieces for loss in piece] == losses
    _assert_same_checkpoint(_checkpoint(tmp_path), _checkpoint(out))
    for name in ("grid-6.png", "grid-10.png"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_a_run_killed_between_checkpoints_repeats_what_was_lost(undisturbed, images, tmp_path, monkeypatch):
    losses, out = undisturbed
    calls = []

    def dies(unet, x_t, timesteps):
        calls.append(0)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(unet, x_t, timesteps)

    original = train_teacher.predict
    monkeypatch.setattr(train_teacher, "predict", dies)
    with pytest.raises(KeyboardInterrupt):
        train(_config(), images, tmp_path)
    assert _checkpoint(tmp_path)["step"] == 4
    assert train(_config(), images, tmp_path) == losses[4:]
    _assert_same_checkpoint(_checkpoint(tmp_path), _checkpoint(out))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_one(images, tmp_path, monkeypatch):
    train(_config(), images, tmp_path, stop_after=4)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    write = Path.write_bytes

    def dies(path, content):
        write(path, content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        train(_config(), images, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_finished_run_has_nothing_left_to_do(undisturbed, images):
    _, out = undisturbed
    before = (out / "checkpoint.pt").read_bytes()
    assert train(_config(), images, out) == []
    assert (out / "checkpoint.pt").read_bytes() == before


def test_what_is_written_is_the_average_in_diffusers_layout(undisturbed):
    _, out = undisturbed
    state = _checkpoint(out)
    pipeline = DDIMPipeline(UNet2DModel.from_pretrained(out / "unet"), DDIMScheduler.from_pretrained(out / "scheduler"))
    averages = state["ema"]["shadow_params"]
    for parameter, average in zip(pipeline.unet.parameters(), averages, strict=True):
        assert torch.equal(parameter, average)
    assert any(not torch.equal(a, b) for a, b in zip(averages, state["unet"].values(), strict=False))
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    with Image.open(out / "grid-10.png") as grid:
        assert grid.size == (73, 73)  # eight by eight of 8x8, a pixel around each
    assert sorted(path.name for path in out.glob("grid-*.png")) == ["grid-10.png", "grid-6.png"]
    assert "dropout" in json.loads((out / "unet" / "config.json").read_text())


@pytest.mark.parametrize("checkpoint_every", [4, 50])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(images, tmp_path, monkeypatch, checkpoint_every):
    train(_config(), images, tmp_path, stop_after=4)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    original = train_teacher.target
    monkeypatch.setattr(train_teacher, "target", lambda *args: original(*args) * float("nan"))
    with pytest.raises(FloatingPointError, match=r"the loss is nan near step \d+; lower train.lr \(now 0.01\)"):
        train(_config(**{"train.checkpoint_every": checkpoint_every}), images, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_nothing_to_train_on_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="images holds no image"):
        train(_config(), torch.empty(0, 1, 8, 8, dtype=torch.uint8), tmp_path)


def test_training_lowers_the_loss(images, tmp_path):
    constant = torch.full_like(images, 255)
    losses = train(_config(**{"train.steps": 60, "train.batch_size": 8}), constant, tmp_path)
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_targets_lead_back_to_the_image(kind):
    """What the scheduler's own step makes of a perfect prediction is x_0."""
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind, clip_sample=False)
    x_0, noise = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4)
    timesteps = torch.tensor([10, 400, 800])
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    scheduler.set_timesteps(1000)
    for row, timestep in enumerate(timesteps):
        prediction = target(scheduler, x_0, noise, timesteps)[row]
        found = scheduler.step(prediction, int(timestep), x_t[row]).pred_original_sample
        torch.testing.assert_close(found, x_0[row], rtol=1e-3, atol=1e-3)


def test_the_learning_rate_rises_and_falls_to_zero():
    options = OmegaConf.create({"lr": 2.0, "warmup": 4, "steps": 20})
    rates = [lr_at(step, options) for step in range(21)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[12] == pytest.approx(1.0)
    assert rates[20] == pytest.approx(0.0)
    assert sorted(rates[4:], reverse=True) == rates[4:]


def test_the_average_is_a_copy_and_draws_nothing(tiny_unet):
    tiny_unet.train()
    ema = EMAModel([parameter + 1 for parameter in tiny_unet.parameters()])
    before, state = tiny_unet.conv_in.weight.clone(), torch.get_rng_state()
    averaged = averaged_copy(tiny_unet, ema)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(averaged.conv_in.weight, before + 1)
    assert torch.equal(tiny_unet.conv_in.weight, before)
    assert tiny_unet.training
    assert not averaged.training


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_shipped_configurations_build(name):
    config = load_settings(name)
    with torch.device("meta"):
        unet = UNet2DModel(**OmegaConf.to_container(config.unet))
    DDIMScheduler(**OmegaConf.to_container(config.scheduler))
    assert config.data.image_size == config.unet.sample_size
    assert set(config.train) == set(_config().train)
    if name == "fashion_mnist":
        assert sum(p.numel() for p in unet.parameters()) <= 1_200_000
    else:
        assert sum(p.numel() for p in unet.parameters()) == 35_746_307


def test_settings_stand_upon_the_architecture_that_they_name(tmp_path):
    config = load_settings("cifar10", ["unet.dropout=0.2", "train.steps=7"])
    assert (config.unet.dropout, config.unet.norm_num_groups, config.train.steps) == (0.2, 32, 7)
    (tmp_path / "mine.yaml").write_text("architecture: ddpm-cifar100\n")
    with pytest.raises(ValueError, match="'ddpm-cifar100': allowed are 'ddpm-cifar10', 'sd15'"):
        load_settings(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("content", ["7", "[1, 2]", "architecture: [1]", "architecture: ${nowhere}", "a: [", "\t"])
def test_settings_that_are_none_name_their_file(content, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"mine\.yaml is no YAML or is damaged"):
        load_settings(str(tmp_path / "mine.yaml"))


def test_the_command_line(tmp_path):
    for k in range(3):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 80 * k, np.uint8)).save(tmp_path / "data" / f"{k}.png")
    OmegaConf.save(_config(), tmp_path / "config.yaml")
    places = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    main([*places, "--config", str(tmp_path / "config.yaml"), "--device", "cpu", "train.steps=2", "train.batch_size=2"])
    assert _checkpoint(tmp_path / "out")["step"] == 2
    assert (tmp_path / "out" / "grid-2.png").is_file()


def test_weights_of_an_earlier_run_are_where_another_begins(images, tmp_path):
    train(_config(), images, tmp_path / "first")
    config = _config(**{"train.schedule": "constant", "train.lr": 1e-9})
    train(config, images, tmp_path / "second", start=tmp_path / "first")
    weights = [UNet2DModel.from_pretrained(tmp_path / name / "unet").state_dict() for name in ("first", "second")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=0)


def test_another_networks_weights_are_refused(images, tmp_path):
    train(_config(), images, tmp_path / "first", stop_after=1)
    config = _config(**{"unet.block_out_channels": "[12]"})
    with pytest.raises(ValueError, match="holds another network"):
        train(config, images, tmp_path / "second", start=tmp_path / "first")


def test_the_rate_may_stay_as_it_is():
    options = _config(**{"train.schedule": "constant"}).train
    assert lr_at(0, options) == pytest.approx(options.lr / 3)
    assert lr_at(9, options) == options.lr


def test_an_unknown_schedule_is_an_error(images, tmp_path):
    with pytest.raises(ValueError, match="allowed are cosine and constant"):
        train(_config(**{"train.schedule": "linear"}), images, tmp_path)


def test_training_ends_when_its_time_is_over(images, tmp_path):
    losses = train(_config(**{"train.seconds": 0, "train.steps": 1000}), images, tmp_path)
    assert len(losses) == 50  # looked at every so often
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 50
    assert (tmp_path / "grid-50.png").is_file()
