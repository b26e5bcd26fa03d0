"""Schedules that can be halved, and jumps that agree with diffusers' own sampler."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.schedule import default_steps, steps_to_bind, teachable, timesteps_of

STEPS = [n for n in range(2, 251, 2) if 1000 % n == 0]
KINDS = ("epsilon", "v_prediction", "sample")


def ddim(**options) -> DDIMScheduler:
    return DDIMScheduler(**{"clip_sample": False, "timestep_spacing": "trailing", **options})


@given(
    st.sampled_from(STEPS), st.sampled_from(["trailing", "leading", "linspace"]), st.integers(0, 1), st.integers(1, 3)
)
def test_a_halved_schedule_is_every_second_timestep(steps, spacing, offset, halvings):
    if steps % 2**halvings:
        return
    taught = teachable(ddim(timestep_spacing=spacing, steps_offset=offset), steps, halvings)
    visited = timesteps_of(taught, steps)
    assert visited[0] == 999
    for halving in range(1, halvings + 1):
        assert timesteps_of(taught, steps // 2**halving) == visited[:: 2**halving]
    for other in (1, steps, 1000):  # asked for others than it was taught, the sampler walks those
        assert max(timesteps_of(taught, other)) == 999


@given(
    st.sampled_from(STEPS),
    st.sampled_from(["trailing", "leading"]),
    st.sampled_from(KINDS),
    st.sampled_from(["linear", "squaredcos_cap_v2"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_jump_is_diffusers_step(steps, spacing, kind, betas, clip, to_one, seed):
    scheduler = ddim(
        timestep_spacing=spacing, prediction_type=kind, beta_schedule=betas, clip_sample=clip, set_alpha_to_one=to_one
    )
    schedule = DDIMSchedule.of(scheduler, steps)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    step = int(torch.randint(steps, (1,), generator=generator))
    x_t, prediction = (torch.randn(3, 1, 2, 2, generator=generator) for _ in range(2))
    expected = scheduler.step(prediction, scheduler.timesteps[step], x_t).prev_sample
    found = schedule.ddim_step(prediction, x_t, torch.full((3,), step))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@given(st.sampled_from(STEPS), st.sampled_from(["trailing", "leading"]), st.integers(0, 2**31))
def test_a_step_to_the_target_x_0_leads_there(steps, spacing, seed):
    schedule = DDIMSchedule.of(
        ddim(timestep_spacing=spacing, prediction_type="sample", beta_schedule="squaredcos_cap_v2"), steps
    )
    generator = torch.Generator().manual_seed(seed)
    step = 2 * torch.randint(steps // 2, (4,), generator=generator)
    x_t, x_0 = (torch.randn(4, 1, 2, 2, generator=generator) for _ in range(2))
    x_next = schedule.ddim_step(x_0, x_t, step, 2)
    torch.testing.assert_close(schedule.target_x_0(x_next, x_t, step, 2), x_0, rtol=1e-2, atol=1e-2)


@given(st.sampled_from(STEPS), st.integers(0, 2**31))
def test_an_error_of_v_reaches_as_far_as_it_says(steps, seed):
    schedule = DDIMSchedule.of(ddim(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"), steps)
    generator = torch.Generator().manual_seed(seed)
    step = 2 * torch.randint(steps // 2, (4,), generator=generator)
    x_t, v, error = (torch.randn(4, 1, 2, 2, generator=generator) for _ in range(3))
    moved = schedule.ddim_step(v + error, x_t, step, 2) - schedule.ddim_step(v, x_t, step, 2)
    torch.testing.assert_close(moved, -schedule.error_gain(step, 2).view(-1, 1, 1, 1) * error, rtol=1e-3, atol=1e-5)


@given(st.sampled_from(KINDS), st.integers(0, 2**31))
def test_every_kind_of_prediction_means_the_same(kind, seed):
    schedule = DDIMSchedule.of(ddim(prediction_type=kind), 20)
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(20, (4,), generator=generator)
    x_0, noise = (torch.randn(4, 1, 2, 2, generator=generator) for _ in range(2))
    x_t = schedule.add_noise(x_0, noise, step)
    alpha, sigma = schedule.alpha_sigma(step, x_t)
    prediction = {"epsilon": noise, "sample": x_0, "v_prediction": alpha * noise - sigma * x_0}[kind]
    found, found_noise = schedule.x_0_and_noise(prediction, x_t, step)
    torch.testing.assert_close(found, x_0, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found_noise, noise, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(schedule.velocity(x_0, x_t, step), alpha * noise - sigma * x_0, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "steps", "halvings", "message"),
    [
        (ddim(), 25, 1, "25 steps cannot be halved 1 times: give a multiple of 2, such as 24"),
        (ddim(), 10, 2, "10 steps cannot be halved 2 times: give a multiple of 4, such as 8"),
        (DDPMScheduler(), 20, 1, "DDPMScheduler draws noise at every step"),
        (EulerAncestralDiscreteScheduler(), 20, 1, r"EulerAncestral.* draws noise at every step.* pass .*as_sampler"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 20, 1, "DPMSolver.* draws noise"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), 20, 1, "FlowMatchEuler.* draws noise"),
        (FlowMatchLCMScheduler(), 20, 1, "FlowMatchLCMScheduler draws noise at every step"),
        (EDMEulerScheduler(), 20, 1, "distillation is not for networks of EDM's noise process"),
        (ddim(), 64, 1, "64 steps do not divide the scheduler's 1000 training timesteps"),
        (ddim(rescale_betas_zero_snr=True), 20, 1, "at timestep 999 the schedule has no signal"),
    ],
)
def test_what_cannot_be_halved_is_an_error(scheduler, steps, halvings, message):
    with pytest.raises(ValueError, match=message):
        teachable(scheduler, steps, halvings)


def test_zero_signal_is_fine_where_v_is_predicted():
    scheduler = teachable(ddim(rescale_betas_zero_snr=True, prediction_type="v_prediction"), 20, 1)
    schedule = DDIMSchedule.of(scheduler, 20)
    x_t, step = torch.randn(2, 1, 2, 2), torch.tensor([0, 0])
    assert schedule.velocity(schedule.target_x_0(torch.randn(2, 1, 2, 2), x_t, step, 2), x_t, step).isfinite().all()


@given(st.sampled_from(STEPS), st.permutations(["trailing", "leading"]))
def test_a_distilled_network_is_bound_to_its_own_schedule(steps, spacings):
    scheduler = ddim(timestep_spacing=spacings[0])
    distilled = timesteps_of(scheduler, steps)
    assert steps_to_bind(scheduler, None, distilled) == steps_to_bind(scheduler, steps, distilled) == steps
    with pytest.raises(ValueError, match=rf"distilled for {steps} steps.* write num_inference_steps={steps} and pass"):
        steps_to_bind(scheduler, steps + 1, distilled)
    with pytest.raises(ValueError, match="pass the scheduler that distill_ returned"):
        steps_to_bind(ddim(timestep_spacing=spacings[1]), None, distilled)


def test_any_other_network_takes_any_steps():
    assert steps_to_bind(ddim(), None, None) == default_steps(None) == 20
    assert steps_to_bind(ddim(), 7, None) == 7
    for wrong in (0, 1001, 2.5, True):
        with pytest.raises(ValueError, match=r"from 1 to 1000, the scheduler's training timesteps"):
            steps_to_bind(ddim(), wrong, None)
