"""Solvers of the probability flow: their order where the flow is known, and that they are diffusers' own."""

from dataclasses import replace
from itertools import pairwise
from math import log
from typing import Any, get_args

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pqcad_ao import CADConfig, distill_
from pqcad_ao.config import Solver
from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.schedule import check_substeps, refined, substeps_from_anew, teachable, timesteps_of
from pqcad_ao.diffusion.solvers import SOLVERS

KINDS = ("epsilon", "v_prediction", "sample")
STEPS = [n for n in range(2, 251, 2) if 1000 % n == 0]
MEAN, SPREAD = 0.4, 0.3  # of the images x_0 ~ N(mean, spread²) whose flow is known


def scheduler_of(kind: str = "v_prediction", **options) -> DDIMScheduler:
    """That leaves some signal at the first timestep, so that every kind of prediction is allowed."""
    return DDIMScheduler(prediction_type=kind, timestep_spacing="trailing", **{"clip_sample": False, **options})


class Gaussian:
    """The ideal denoiser of images x_0 ~ N(mean, spread²), and where its flow leads, in float64."""

    def __init__(self, schedule: DDIMSchedule) -> None:
        alphas = schedule.alphas.double()
        sigmas = 1 - alphas if schedule.prediction_type == "flow" else (1 - alphas.square()).sqrt()
        self.schedule = replace(schedule, alphas=alphas, sigmas=sigmas)

    def __call__(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        step = torch.tensor([self.schedule.timesteps.tolist().index(t) for t in timesteps.tolist()])
        alpha, sigma = self.schedule.alpha_sigma(step, x_t)
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        x_0 = MEAN + gain * (x_t - alpha * MEAN)
        noise = (x_t - alpha * x_0) / sigma
        predictions = {
            "epsilon": noise,
            "sample": x_0,
            "v_prediction": alpha * noise - sigma * x_0,
            "flow": noise - x_0,
        }
        return predictions[self.schedule.prediction_type]

    def flow(self, x_t: Tensor, step: Tensor, steps: int) -> Tensor:
        """Each x_t keeps its distance from the mean, in units of the spread that x_t has there."""
        (alpha, sigma), (alpha_end, sigma_end) = (self.schedule.alpha_sigma(s, x_t) for s in (step, step + steps))
        spread, spread_end = ((a**2 * SPREAD**2 + s**2).sqrt() for a, s in ((alpha, sigma), (alpha_end, sigma_end)))
        return alpha_end * MEAN + spread_end / spread * (x_t - alpha * MEAN)


def misses(solver: str, scheduler: Any, steps: int, substeps: int) -> Tensor:
    """How far a jump over two of ``steps`` misses the flow, (steps / 2,), each with ``substeps``."""
    network = Gaussian(DDIMSchedule.of(scheduler, steps, substeps=substeps))
    step = substeps * torch.arange(0, steps, 2)
    x_t = torch.randn(len(step), 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = SOLVERS[solver](network, network.schedule, x_t, step, 2 * substeps)
    return (found - network.flow(x_t, step, 2 * substeps)).flatten(1).norm(dim=1)


def refinable(kind: str, zero_snr: bool) -> Any:
    """A scheduler of this kind of prediction with 1000 training timesteps, which begins without signal or nearly so."""
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=2.0 if zero_snr else 1.0)
    # where no signal is, the noise says nothing of the image, and such a schedule is refused
    kind = "v_prediction" if zero_snr and kind == "epsilon" else kind
    return scheduler_of(kind, beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=zero_snr)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "flow"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_more_substeps_converge_to_the_flow_with_the_solvers_order(solver, order, kind, zero_snr):
    scheduler = refinable(kind, zero_snr)
    few, more, most = (misses(solver, scheduler, 8, substeps) for substeps in (5, 25, 125))
    for coarse, fine in ((few, more), (more, most)):
        # between two noisy images; close to the image itself the steps' length in log SNR does not fall as they do
        within = (coarse / fine).log()[:-1] / log(5)
        assert (within > order - 0.25).all(), within
        assert (within < order + 0.15).all(), within
    assert few[-1] > 15 * most[-1]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "flow"])
def test_unipcs_corrector_raises_the_order_to_three(kind, zero_snr):
    scheduler = refinable(kind, zero_snr)
    few, most = (misses("unipc", scheduler, 8, substeps) for substeps in (5, 125))
    # the error of the first jump is as small as its rounding, and the last one leads to the image, as above
    assert ((few / most).log()[1:-1] / log(25) > 2.75).all(), (few / most).log() / log(25)
    assert (most[:-1] < 0.05 * misses("dpmpp_2m", scheduler, 8, 125)[:-1]).all()


def test_a_second_order_walk_is_closer_to_the_flow_in_as_many_steps():
    scheduler = scheduler_of(beta_schedule="squaredcos_cap_v2")
    for substeps in (2, 5, 25):
        first, second = (misses(solver, scheduler, 20, substeps).norm() for solver in ("ddim", "dpmpp_2m"))
        assert second < 0.5 * first


def network(x_t: Tensor, timesteps: Tensor) -> Tensor:
    """Smooth in both arguments, as a network is."""
    return torch.tanh(x_t + timesteps.view(-1, 1, 1, 1) / 1000) / 2


@given(
    st.sampled_from(["dpmpp_2m", "unipc"]),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 6),
    st.sampled_from(KINDS),
    st.sampled_from(["linear", "squaredcos_cap_v2"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_multistep_solvers_are_diffusers_own(solver, steps, substeps, kind, betas, to_one, seed):
    scheduler = scheduler_of(kind, beta_schedule=betas, set_alpha_to_one=to_one)
    schedule = DDIMSchedule.of(scheduler, steps, substeps=substeps)
    visited, generator = schedule.timesteps[:-1].tolist(), torch.Generator().manual_seed(seed)
    start = int(torch.randint(len(visited), (1,), generator=generator))
    length = int(torch.randint(1, len(visited) - start + 1, (1,), generator=generator))
    x_t = torch.randn(3, 1, 2, 2, generator=generator)
    theirs: Any = DPMSolverMultistepScheduler.from_config(
        scheduler.config, euler_at_final=True, final_sigmas_type="zero" if to_one else "sigma_min"
    )
    theirs.set_timesteps(timesteps=visited[start:])
    if solver == "unipc":  # whose set_timesteps knows of no timesteps that are given
        visits, theirs = theirs, UniPCMultistepScheduler.from_config(theirs.config, solver_order=2)
        theirs.set_timesteps(len(visits.timesteps))
        theirs.timesteps, theirs.sigmas = visits.timesteps, visits.sigmas
    expected = x_t
    for timestep in theirs.timesteps[:length]:
        prediction = network(expected, timestep.repeat(3))
        expected = theirs.step(prediction, timestep, expected).prev_sample
    found = SOLVERS[solver](network, schedule, x_t, torch.full((3,), start), length)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@settings(max_examples=30)
@given(
    st.sampled_from(list(SOLVERS)),
    st.sampled_from(STEPS),
    st.floats(0, 1),
    st.sampled_from(("v_prediction", "sample")),
    st.booleans(),
    st.booleans(),
)
def test_a_walk_from_no_signal_to_no_noise_is_finite(solver, steps, share, kind, clip, to_one):
    scheduler = scheduler_of(
        kind,
        beta_schedule="squaredcos_cap_v2",
        rescale_betas_zero_snr=True,
        clip_sample=clip,
        set_alpha_to_one=to_one,
    )
    substeps = max(1, round(share * 1000 / steps))
    schedule = DDIMSchedule.of(teachable(scheduler, steps, 1), steps, substeps=substeps)
    assert schedule.alphas[0] == 0
    x_t = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    end = SOLVERS[solver](network, schedule, x_t, torch.zeros(2, dtype=torch.int64), steps * substeps)
    assert end.isfinite().all()
    target = schedule.target_x_0(end, x_t, torch.zeros(2, dtype=torch.int64), steps * substeps)
    assert schedule.velocity(target, x_t, torch.zeros(2, dtype=torch.int64)).isfinite().all()
    if clip and to_one:  # the image is the last prediction
        assert end.abs().max() <= 1


@given(st.sampled_from(STEPS), st.data())
def test_a_finer_walk_visits_the_samplers_own_timesteps(steps, data):
    substeps = data.draw(st.integers(1, 1000 // steps))
    sampler = teachable(scheduler_of(), steps, 1)
    own = timesteps_of(sampler, steps)
    found = refined(sampler, steps, substeps)
    assert found[::substeps] == own
    assert len(found) == steps * substeps
    gaps = [start - end for start, end in pairwise([*found, -1])]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1 + (1000 // steps % substeps > 0)
    check_substeps(sampler, steps, substeps)
    assert DDIMSchedule.of(sampler, steps, substeps=substeps).timesteps.tolist() == [*found, -1]


@given(st.sampled_from(STEPS), st.integers(1, 4))
def test_a_walk_from_anew_takes_twice_the_substeps_where_timesteps_hold_them(steps, substeps):
    sampler, room = teachable(scheduler_of(), steps, 1), 1000 // steps
    assert substeps_from_anew(sampler, steps, substeps) == (2 * substeps if 2 * substeps <= room else substeps)


def test_every_solver_can_be_asked_for():
    assert set(SOLVERS) == set(get_args(Solver))


def test_what_the_reference_cannot_walk_is_said_before_any_work():
    never = torch.nn.Conv2d(1, 1, 1)
    never.forward = lambda *given: pytest.fail("the work began")
    scheduler = scheduler_of(beta_schedule="squaredcos_cap_v2")

    def distill(scheduler=scheduler, **options):
        distill_(torch.nn.Conv2d(1, 1, 1), never, scheduler, CADConfig(**options), sample_shape=(1, 4, 4))

    with pytest.raises(
        ValueError, match=r"reference_substeps=51: 20 of 1000 training timesteps are 50 apart.* most 50"
    ):
        distill(reference_substeps=51)
    with pytest.raises(ValueError, match="reference_solver='heun': allowed are 'ddim', 'dpmpp_2m', 'unipc'"):
        distill(reference_solver="heun")
    with pytest.raises(ValueError, match="reference_substeps=0"):
        distill(reference_substeps=0)
    noiseless = scheduler_of(trained_betas=[0.0] * 500 + [0.01] * 500)
    with pytest.raises(ValueError, match="adds no noise between some of the 20 timesteps"):
        distill(noiseless)
