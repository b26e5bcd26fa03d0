"""C_DC: whose pictures they are, how they are kept and shared, and the look at sampler and network."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from networks import SHAPE, Small, cosine_scheduler
from torch import Tensor, nn

from pqcad_ao import CADConfig
from pqcad_ao.diffusion import trajectories
from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.diffusion.trajectories import check_denoising, checked_trajectories, draw_trajectories
from pqcad_ao.models import load_model


def config(**options) -> CADConfig:
    return CADConfig(**{"steps": 4, "points": 12, "generation_batch_size": 5, **options})


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_pictures_are_the_samplers(tmp_path, solver, clip):
    reference, settings = Small(), config(reference_solver=solver, reference_substeps=1)
    scheduler = DDIMScheduler.from_config(cosine_scheduler().config, clip_sample=clip, clip_sample_range=0.5)
    alone = draw_trajectories(reference, scheduler, SHAPE, settings, {})
    noise = torch.stack([trajectories.noise_of(SHAPE, settings.seed, row) for row in range(12)])
    if solver == "ddim":
        expected = sample(reference, scheduler, noise, 4)
    elif clip:  # which diffusers' solver does not know
        assert alone.rows(torch.arange(12))[0].abs().max() == 0.5
        return
    else:
        expected = sample(reference, DPMSolverMultistepScheduler.from_config(scheduler.config), noise, 4)
    torch.testing.assert_close(alone.rows(torch.arange(12))[0], expected, rtol=1e-4, atol=1e-4)
    kept = draw_trajectories(reference, scheduler, SHAPE, settings, {}, folder=tmp_path)
    torch.testing.assert_close(kept.rows(torch.arange(12))[0], expected, rtol=1e-4, atol=1e-4)
    assert not isinstance(alone.drawn, type(kept.drawn))  # the file is mapped, not read


def killed_after(calls: int):
    """What draws a batch, in which a kill follows some calls."""
    original, done = trajectories._batch, []

    def failing(*args):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args)

    return failing


def test_pictures_of_another_size_are_drawn_anew(tmp_path):
    reference = Small()
    small = draw_trajectories(reference, cosine_scheduler(), SHAPE, config(), {}, folder=tmp_path)
    large = draw_trajectories(reference, cosine_scheduler(), (1, 16, 16), config(), {}, folder=tmp_path)
    assert small.drawn.shape[2:] == SHAPE
    assert large.drawn.shape[2:] == (1, 16, 16)


def test_a_draw_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    reference, done, original = Small(), [], trajectories._batch
    monkeypatch.setattr(trajectories, "_batch", killed_after(2))
    with pytest.raises(KeyboardInterrupt):
        draw_trajectories(reference, cosine_scheduler(), SHAPE, config(), {}, folder=tmp_path)
    monkeypatch.setattr(trajectories, "_batch", lambda *args: done.append(1) or original(*args))
    resumed = draw_trajectories(reference, cosine_scheduler(), SHAPE, config(), {}, folder=tmp_path)
    assert len(done) == 1
    expected = draw_trajectories(reference, cosine_scheduler(), SHAPE, config(), {})
    assert torch.equal(resumed.rows(torch.arange(12))[0], expected.rows(torch.arange(12))[0])


def test_a_draw_that_changed_its_batches_is_no_black_picture(tmp_path, monkeypatch):
    reference, original = Small(), trajectories._batch
    expected = draw_trajectories(reference, cosine_scheduler(), SHAPE, config(), {}).rows(torch.arange(12))[0]

    def drawn(size: int) -> torch.Tensor:
        settings = config(generation_batch_size=size)
        found = draw_trajectories(reference, cosine_scheduler(), SHAPE, settings, {}, folder=tmp_path)
        return found.rows(torch.arange(12))[0]

    monkeypatch.setattr(trajectories, "_batch", killed_after(4))
    with pytest.raises(KeyboardInterrupt):
        drawn(2)
    monkeypatch.setattr(trajectories, "_batch", original)
    torch.testing.assert_close(drawn(5), expected, rtol=1e-4, atol=1e-4)
    for file in tmp_path.glob("*.npy"):
        file.unlink()
    torch.testing.assert_close(drawn(5), expected, rtol=1e-4, atol=1e-4)


def drawn_batches(monkeypatch) -> list[int]:
    """The sizes of the batches drawn from now on."""
    sizes, original = [], trajectories._batch

    def counting(*given):
        sizes.append(len(given[-1]))
        return original(*given)

    monkeypatch.setattr(trajectories, "_batch", counting)
    return sizes


def test_what_is_drawn_serves_any_number_of_batches(tmp_path, monkeypatch):
    reference, sizes = Small(), drawn_batches(monkeypatch)
    first = draw_trajectories(reference, cosine_scheduler(), SHAPE, config(), {}, folder=tmp_path)
    assert sizes == [5, 5, 2]
    before = np.array(first.drawn)
    again = draw_trajectories(
        reference, cosine_scheduler(), SHAPE, config(generation_batch_size=4), {}, folder=tmp_path
    )
    assert sizes == [5, 5, 2]
    assert np.array_equal(before, again.drawn)


@pytest.mark.parametrize("left", [0, 100, -4])
def test_a_damaged_file_is_an_error_that_says_what_to_do(left, tmp_path):
    draw_trajectories(Small(), cosine_scheduler(), SHAPE, config(), {}, folder=tmp_path)
    (file,) = tmp_path.glob("*.npy")
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"c_dc-.*npy is damaged .*: delete it, and its pictures are drawn again"):
        draw_trajectories(Small(), cosine_scheduler(), SHAPE, config(), {}, folder=tmp_path)
    file.unlink()
    assert draw_trajectories(Small(), cosine_scheduler(), SHAPE, config(), {}, folder=tmp_path).drawn.any()


def test_half_precision_that_overflows_is_named():
    reference = Small().half()
    nn.init.constant_(reference.first.weight, 6e4)
    with pytest.raises(FloatingPointError, match="drawing C_DC: float16 ends at 65504"):
        draw_trajectories(reference, cosine_scheduler(), SHAPE, config(), {})


def test_real_images_are_mixed_in():
    reference = Small()
    real = torch.full((3, *SHAPE), 0.5)
    mixed = draw_trajectories(reference, cosine_scheduler(), SHAPE, config(), {}, images=real)
    assert len(mixed) == 15
    rows, _ = mixed.rows(torch.tensor([0, 12, 14]))
    assert torch.equal(rows[1:], real[:2])
    assert not torch.equal(rows[0], real[0])


def test_a_network_that_says_nan_is_found_out(monkeypatch):
    monkeypatch.setattr(trajectories, "FARTHEST", 1e9)
    clean = draw_trajectories(Small(), cosine_scheduler(), SHAPE, config(), {})
    broken = Small()
    nn.init.constant_(broken.last.weight, float("nan"))
    with pytest.raises(ValueError, match="nan % off"):
        check_denoising(broken, DDIMSchedule.of(cosine_scheduler(), 4), clean)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 65])
def test_no_picture_is_checked_with_the_noise_it_was_drawn_from(seed, monkeypatch):
    """The two depend on each other, and the check takes them not to."""
    monkeypatch.setattr(trajectories, "FARTHEST", float("inf"))
    settings, original, asked = config(seed=seed), trajectories.noise_of, []

    def noise_of(shape, seed, row):
        asked.append(original(shape, seed, row))
        return asked[-1]

    clean = draw_trajectories(Small(), cosine_scheduler(), SHAPE, settings, {})
    monkeypatch.setattr(trajectories, "noise_of", noise_of)
    check_denoising(Small(), DDIMSchedule.of(cosine_scheduler(), 4), clean)
    steps = len(asked) // 12
    assert steps == 3
    for at, noise in enumerate(asked):
        assert not torch.equal(noise, original(SHAPE, seed, at % 12))


def test_the_look_at_betas_can_be_left_out():
    given = {"images": None, "folder": None, "callback": None, "progress": False}
    with pytest.raises(ValueError, match=r"If you are sure that it has not, write CADConfig\(check_betas=False\)"):
        checked_trajectories(Small(), cosine_scheduler(), SHAPE, config(), None, **given)
    settings = config(check_betas=False)
    assert len(checked_trajectories(Small(), cosine_scheduler(), SHAPE, settings, None, **given)) == 12
    assert repr(settings) == repr(config())  # what is kept in a folder serves either


@pytest.mark.slow
def test_other_betas_than_the_networks_are_found_out():
    teacher, scheduler = load_model("demo")
    clean = draw_trajectories(teacher, scheduler, (1, 32, 32), CADConfig(points=24, generation_batch_size=24), {})

    def check(candidate: DDIMScheduler) -> None:
        check_denoising(teacher, DDIMSchedule.of(candidate, 20), clean)

    check(scheduler)
    for offset in (0, 1):  # leading timesteps end where there is next to no noise to be found
        check(DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading", steps_offset=offset))
    for other in ({"beta_schedule": "linear"}, {"beta_schedule": "scaled_linear"}, {"prediction_type": "sample"}):
        with pytest.raises(ValueError, match="it has other betas or another prediction_type"):
            check(DDIMScheduler.from_config(scheduler.config, **other))


def test_a_flow_and_another_process_are_told_apart():
    """The ideal network of images x_0 ~ N(0, 1/4) in a flow, v = noise - x_0."""

    class Ideal(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            s = t.view(-1, 1, 1, 1) / 1000
            return (s - (1 - s) / 4) / ((1 - s) ** 2 / 4 + s**2) * x

    images = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0)) / 2
    clean = trajectories.Trajectories(images[:, None].numpy(), {}, None)
    check_denoising(Ideal(), DDIMSchedule.of(FlowMatchEulerDiscreteScheduler(shift=3.0), 20), clean)
    with pytest.raises(ValueError, match="it has other betas or another prediction_type"):
        check_denoising(Ideal(), DDIMSchedule.of(cosine_scheduler(), 20), clean)


def test_other_betas_are_found_out_on_the_first_pictures(monkeypatch):
    """As a user meets it: the pictures themselves are drawn with the wrong sampler, and no more than are looked at."""
    teacher, scheduler = load_model("demo")
    monkeypatch.setattr(trajectories, "CHECKED", 16)
    sizes = drawn_batches(monkeypatch)
    few = config(steps=10, points=32, generation_batch_size=16)
    given = {"images": None, "folder": None, "callback": None, "progress": False}
    wrong = DDIMScheduler.from_config(scheduler.config, beta_schedule="scaled_linear")
    with pytest.raises(ValueError, match="it has other betas or another prediction_type"):
        checked_trajectories(teacher, wrong, (1, 32, 32), few, None, **given)
    assert sizes == [16]
    sizes.clear()
    # real pictures are not the network's own, and say nothing about its betas
    given["images"] = torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    checked_trajectories(teacher, scheduler, (1, 32, 32), few, None, **given)
    assert sizes == [16, 16]
    monkeypatch.setattr(trajectories, "CHECKED", 100)
    checked_trajectories(teacher, scheduler, (1, 32, 32), replace(few, points=16), None, **given)
