"""The DDIM sampler against diffusers' own pipeline, and what it promises its callers."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, PNDMScheduler, UNet2DModel
from networks import SHAPE
from torch import nn

from pqcad_ao.denoiser import evaluation_mode, predict, take_rows
from pqcad_ao.diffusion.recording import Recorder, record_calls
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.diffusion.schedule import timesteps_of


def _noise(count: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_a_scheduler_is_walked_as_it_was_given(tiny_unet):
    """diffusers' from_config leaves out what was given without its name."""
    betas = (1000, 0.00085, 0.012, "scaled_linear")
    named = dict(zip(("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"), betas, strict=True))
    ways = [sample(tiny_unet, each, _noise(2), 4) for each in (DDIMScheduler(*betas), DDIMScheduler(**named))]
    assert torch.equal(*ways)
    assert not torch.allclose(ways[0], sample(tiny_unet, DDIMScheduler(), _noise(2), 4))


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_equals_diffusers_pipeline_on_the_same_noise(tiny_unet, prediction, steps):
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction, timestep_spacing="trailing"
    )
    pipeline = DDIMPipeline(tiny_unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    theirs = pipeline(batch_size=3, generator=generator, num_inference_steps=steps, output_type="np").images
    ours = (sample(tiny_unet, scheduler, _noise(3), steps) / 2 + 0.5).clamp(0, 1)
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=1e-5)


def test_the_scheduler_given_is_not_touched(tiny_unet, scheduler):
    scheduler.set_timesteps(3)
    before, config = scheduler.timesteps.clone(), dict(scheduler.config)
    sample(tiny_unet, scheduler, _noise(1), 5)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps == 3
    assert dict(scheduler.config) == config


def test_neither_noise_nor_random_state_is_touched(tiny_unet, scheduler):
    noise, state = _noise(2), torch.get_rng_state()
    sample(tiny_unet, scheduler, noise, 2)
    assert torch.equal(noise, _noise(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_give_what_one_batch_gives(tiny_unet, scheduler):
    together = sample(tiny_unet, scheduler, _noise(5), 3)
    assert together.shape == (5, *SHAPE)
    torch.testing.assert_close(sample(tiny_unet, scheduler, _noise(5), 3, batch_size=2), together, rtol=1e-4, atol=1e-5)


def test_a_scheduler_with_a_history_starts_each_batch_afresh(tiny_unet):
    scheduler = PNDMScheduler(skip_prk_steps=True)
    together = sample(tiny_unet, scheduler, _noise(4), 6)
    torch.testing.assert_close(sample(tiny_unet, scheduler, _noise(4), 6, batch_size=2), together, rtol=1e-4, atol=1e-4)


def test_the_callback_sees_every_input(tiny_unet, scheduler):
    calls = []
    noise = _noise(5)
    final = sample(tiny_unet, scheduler, noise, 3, batch_size=2, callback=lambda *args: calls.append(args))
    scheduler.set_timesteps(3)
    expected = [(first, step, int(t)) for first in (0, 2, 4) for step, t in enumerate(scheduler.timesteps)]
    assert [(first, step, int(t)) for first, step, t, _ in calls] == expected
    for first in (0, 2, 4):
        assert torch.equal(calls[expected.index((first, 0, 999))][3], noise[first : first + 2])
    # the last input and one step from it give the images
    first, _, t, x_t = calls[-1]
    with torch.no_grad():
        last = scheduler.step(predict(tiny_unet, x_t, t), t, x_t).prev_sample
    assert torch.equal(last, final[first:])


def test_each_image_keeps_its_own_conditioning(scheduler):
    class Labelled(nn.Module):
        def forward(self, x, t, label, nested):
            return x * 0 + label[:, None, None, None] + nested["more"][:, None, None, None]

    label = torch.arange(5.0)
    conditioning = {"label": label, "nested": {"more": 10 * label}}
    images = sample(Labelled(), scheduler, torch.zeros(5, *SHAPE), 1, conditioning=conditioning, batch_size=2)
    assert (images[:, 0, 0, 0] / images[1, 0, 0, 0]).tolist() == pytest.approx([0, 1, 2, 3, 4])


def test_a_network_gets_a_timestep_for_each_sample(scheduler):
    seen = []

    class Strict(nn.Module):
        def forward(self, x, t):
            seen.append(t)
            return x * t[:, None, None, None]

    sample(Strict(), scheduler, _noise(3), 2, batch_size=2)
    assert [t.tolist() for t in seen] == [[999, 999], [499, 499], [999], [499]]


def test_any_wrapping_of_the_prediction(tiny_unet):
    x, t = _noise(2), torch.tensor([1, 2])
    with torch.no_grad():
        expected = tiny_unet(x, t).sample
        assert torch.equal(predict(tiny_unet, x, t), expected)
        assert torch.equal(predict(lambda x, t: (tiny_unet(x, t).sample,), x, t), expected)
        assert torch.equal(predict(lambda x, t: tiny_unet(x, t).sample, x, t), expected)


def test_nothing_to_sample(tiny_unet, scheduler):
    assert sample(tiny_unet, scheduler, _noise(0), 2).shape == (0, *SHAPE)


def test_rows_of_nested_conditioning():
    conditioning = {"a": torch.arange(4), "b": {"c": torch.arange(8).view(4, 2)}, "scale": 2.0, "none": None}
    taken = take_rows(conditioning, torch.tensor([3, 0]))
    assert taken["a"].tolist() == [3, 0]
    assert taken["b"]["c"].tolist() == [[6, 7], [0, 1]]
    assert (taken["scale"], taken["none"]) == (2.0, None)


def test_evaluation_mode_puts_every_flag_back(tiny_unet):
    tiny_unet.train()
    tiny_unet.mid_block.eval()
    before = [module.training for module in tiny_unet.modules()]

    def fail():
        with evaluation_mode(tiny_unet):
            assert not any(module.training for module in tiny_unet.modules())
            raise ValueError("leave")

    with pytest.raises(ValueError, match="leave"):
        fail()
    assert [module.training for module in tiny_unet.modules()] == before
    assert isinstance(tiny_unet, UNet2DModel)


def test_a_recorder_keeps_every_call_in_order(tiny_unet, scheduler):
    noise = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    calls = record_calls(tiny_unet, scheduler, noise, 3, batch_size=2)
    visited = timesteps_of(scheduler, 3)
    assert [call.timesteps.tolist() for call in calls] == [[t] * rows for rows in (2, 2, 1) for t in visited]
    assert torch.equal(torch.cat([call.x_t for call in calls[::3]]), noise)
    for call in calls:
        assert torch.equal(call.prediction, tiny_unet(call.x_t, call.timesteps).sample)


def test_a_recorder_answers_as_its_network_and_keeps_as_many_calls_as_asked(tiny_unet, scheduler):
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    recorder = Recorder(tiny_unet, most=3)
    assert torch.equal(
        sample(recorder, scheduler, noise, 3, batch_size=2), sample(tiny_unet, scheduler, noise, 3, batch_size=2)
    )
    assert [len(call.x_t) for call in recorder.calls] == [2, 2, 2]
    assert torch.equal(recorder.calls[0].x_t, noise[:2])


def test_a_recorder_keeps_the_conditioning_of_each_call(scheduler):
    labels = torch.arange(3)
    calls = record_calls(
        lambda x_t, timesteps, labels: x_t * labels.view(-1, 1, 1, 1),
        scheduler,
        torch.zeros(3, 1, 2, 2),
        2,
        conditioning={"labels": labels},
        batch_size=2,
    )
    assert [call.conditioning["labels"].tolist() for call in calls] == [[0, 1], [0, 1], [2], [2]]
