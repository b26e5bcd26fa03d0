"""Schedulers of diffusers as the noise processes they stand for, and walks that agree with their own steps."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    ScoreSdeVeScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
    VQDiffusionScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from networks import SHAPE, Small, sqnr

from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.process import VARIANCE_PRESERVING, as_sampler, read_scheduler
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.diffusion.schedule import teachable, timesteps_of

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(num_train_timesteps=500, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        DDPMScheduler(num_train_timesteps=500, clip_sample_range=2.0),
        EulerDiscreteScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction"),
        EulerDiscreteScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        EulerAncestralDiscreteScheduler(),
        HeunDiscreteScheduler(),  # its own defaults are other betas than DDIM's
        HeunDiscreteScheduler(beta_schedule="exp", prediction_type="sample"),
        KDPM2DiscreteScheduler(),
        LCMScheduler(),
        PNDMScheduler(),
        DEISMultistepScheduler(trained_betas=[0.01, 0.02, 0.05], num_train_timesteps=3),
        DPMSolverMultistepScheduler(**STABLE_DIFFUSION, use_karras_sigmas=True, thresholding=True),
        UniPCMultistepScheduler(beta_schedule="squaredcos_cap_v2"),
        SASolverScheduler(),
        UnCLIPScheduler(),
        CogVideoXDDIMScheduler(),  # shifts the signal that its betas leave
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_every_schedulers_noise_process_is_kept(scheduler, tmp_path):
    sampler = as_sampler(scheduler)
    assert type(sampler) is DDIMScheduler
    assert sampler is not scheduler
    torch.testing.assert_close(sampler.alphas_cumprod, scheduler.alphas_cumprod.float(), rtol=1e-4, atol=1e-6)
    for name in ("prediction_type", "num_train_timesteps", "timestep_spacing", "steps_offset", "thresholding"):
        if name in scheduler.config:
            assert sampler.config[name] == scheduler.config[name], name
    assert sampler.config.clip_sample == scheduler.config.get("clip_sample", False)
    scheduler.save_pretrained(tmp_path)
    assert dict(read_scheduler(tmp_path).config) == dict(sampler.config)


def test_each_kind_is_in_the_table_once():
    assert len(set(VARIANCE_PRESERVING)) == len(VARIANCE_PRESERVING)


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(timestep_spacing="trailing"),
        DPMSolverMultistepScheduler(solver_order=1, timestep_spacing="trailing"),
        EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="leading"),
    ],
)
def test_solvers_of_the_first_order_walk_as_their_sampler(scheduler):
    """Their step is DDIM's, written for an image to which noise is added: only if it is scaled for the network."""
    noise, network = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), Small()
    sampler = as_sampler(scheduler)
    scheduler.set_timesteps(5)
    assert timesteps_of(sampler, 5) == scheduler.timesteps.tolist()
    expected = DDIMScheduler.from_config(sampler.config, set_alpha_to_one=True)
    assert sqnr(sample(network, expected, noise, 5), sample(network, scheduler, noise, 5)) > 40


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (IPNDMScheduler(), "a IPNDMScheduler: allowed are instances of DDIMScheduler.*If the network was"),
        (ScoreSdeVeScheduler(), "a ScoreSdeVeScheduler"),
        (VQDiffusionScheduler(num_vec_classes=4), "a VQDiffusionScheduler"),
        (object(), "a object"),
        ("ddim", "a str"),
        (DDIMScheduler, "a DDIMScheduler: allowed are instances of"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), "flow_prediction together with use_flow_sigmas"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas=True and prediction_type='epsilon'"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "has invert_sigmas=True"),
        (EulerDiscreteScheduler(timestep_type="continuous"), "has timestep_type='continuous'"),
    ],
)
def test_what_is_not_understood_is_an_error(other, message):
    with pytest.raises(ValueError, match=message):
        as_sampler(other)


def test_a_file_names_a_class_of_the_table_or_none(tmp_path):
    IPNDMScheduler().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names the class IPNDMScheduler: allowed are DDIMScheduler"):
        read_scheduler(tmp_path)
    EulerDiscreteScheduler(beta_start=-2.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"scheduler_config\.json is damaged"):
        read_scheduler(tmp_path)


# Flows


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (5, 1.0), (12, 3.0), (7, 0.5)])
def test_a_flow_is_walked_as_diffusers_walks_it(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    noise, network = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), Small()
    scheduler.set_timesteps(sigmas=[(steps - step) / steps for step in range(steps)])  # as Flux's pipelines call it
    expected = noise
    schedule, found = DDIMSchedule.of(FlowMatchEulerDiscreteScheduler(shift=shift), steps), noise
    assert schedule.timesteps.tolist() == [*scheduler.timesteps.tolist(), 0]
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            expected = scheduler.step(network(expected, timestep), timestep, expected).prev_sample
            found = schedule.ddim_step(network(found, timestep), found, torch.full((2,), step))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sample(network, scheduler, noise, steps), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0),
        (FlowMatchHeunDiscreteScheduler(shift=2.0), 2.0),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 3.1582),  # e^1.15, of max_shift
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"), 1.15),
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0), 5.0),
    ],
)
def test_a_flows_shift_is_kept(scheduler, shift, tmp_path):
    sampler = as_sampler(scheduler)
    assert type(sampler) is FlowMatchEulerDiscreteScheduler
    assert sampler.config.shift == pytest.approx(shift, rel=1e-4)
    assert type(sampler).from_config(sampler.config).config.shift == sampler.config.shift
    scheduler.save_pretrained(tmp_path)
    assert dict(read_scheduler(tmp_path).config) == dict(sampler.config)


def test_a_dynamic_shift_is_the_static_one_of_the_largest_pictures():
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9)
    dynamic.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.9)
    assert timesteps_of(dynamic, 4) == pytest.approx(dynamic.timesteps.tolist(), rel=1e-5)


def test_a_shift_that_was_set_later_is_kept():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_shift(4.0)
    assert as_sampler(scheduler).config.shift == 4.0


@given(st.integers(1, 30), st.sampled_from([1.0, 3.0, 0.3, 3.1582]), st.integers(1, 3))
def test_a_halved_flow_is_every_second_timestep(steps, shift, halvings):
    parts = 2**halvings
    taught = teachable(FlowMatchEulerDiscreteScheduler(shift=shift), parts * steps, halvings)
    assert timesteps_of(taught, steps) == timesteps_of(taught, parts * steps)[::parts]


def test_a_flow_whose_steps_hang_on_their_number_is_not_halved():
    with pytest.raises(ValueError, match=r"shift_terminal=0.1 moves the timesteps"):
        teachable(FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), 4, 1)


@given(st.integers(0, 2**31), st.sampled_from([1.0, 3.0]), st.integers(1, 3))
def test_a_flows_prediction_stands_for_image_and_noise(seed, shift, substeps):
    schedule = DDIMSchedule.of(FlowMatchEulerDiscreteScheduler(shift=shift), 4, substeps=substeps)
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(4 * substeps, (3,), generator=generator)
    x_0, noise = (torch.randn(3, *SHAPE, generator=generator) for _ in range(2))
    x_t = schedule.add_noise(x_0, noise, step)
    found, found_noise = schedule.x_0_and_noise(noise - x_0, x_t, step)
    torch.testing.assert_close((found, found_noise), (x_0, noise), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(schedule.velocity(x_0, x_t, step), noise - x_0, rtol=1e-3, atol=1e-3)
    x_next = schedule.ddim_step(noise - x_0, x_t, step)
    torch.testing.assert_close(x_next, schedule.add_noise(x_0, noise, step + 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(schedule.target_x_0(x_next, x_t, step, 1), x_0, rtol=1e-2, atol=1e-2)
