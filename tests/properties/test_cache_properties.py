"""Properties of feature caching: schedules, the correction's line, the plan's file, and walks that mix."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pqcad_ao.cache import _Sums
from pqcad_ao.diffusion.cache_plan import CachePlan, group_costs, optimal_starts, sources_of, uniform_starts
from pqcad_ao.diffusion.cache_walk import Walk

SEEDS = st.integers(0, 2**31)


def costs_of(steps: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return group_costs(torch.rand(steps, steps, generator=generator), torch.rand(steps, generator=generator))


def total(costs: Tensor, starts: list[int]) -> float:
    return sum(float(costs[a, b - 1]) for a, b in itertools.pairwise([*starts, len(costs)]))


@given(steps=st.integers(1, 24), interval=st.integers(1, 6), seed=SEEDS)
def test_the_optimal_schedule_is_never_worse_than_the_uniform_one(steps: int, interval: int, seed: int):
    costs = costs_of(steps, seed)
    uniform, optimal = uniform_starts(steps, interval), optimal_starts(costs, interval)
    assert len(optimal) == len(uniform)
    assert optimal[0] == 0
    assert all(1 <= b - a <= 2 * interval for a, b in itertools.pairwise([*optimal, steps]))
    assert total(costs, optimal) <= total(costs, uniform) + 1e-9


@given(steps=st.integers(1, 8), interval=st.integers(1, 4), seed=SEEDS)
@settings(max_examples=30)
def test_no_other_schedule_is_better(steps: int, interval: int, seed: int):
    costs = costs_of(steps, seed)
    groups = -(-steps // interval)
    every = ([0, *rest] for rest in itertools.combinations(range(1, steps), groups - 1))
    allowed = [s for s in every if all(b - a <= 2 * interval for a, b in itertools.pairwise([*s, steps]))]
    assert total(costs, optimal_starts(costs, interval)) <= min(total(costs, starts) for starts in allowed) + 1e-9


@given(steps=st.integers(2, 20), seed=SEEDS)
@settings(max_examples=30)
def test_the_cost_falls_with_the_number_of_full_steps(steps: int, seed: int):
    costs = costs_of(steps, seed)
    counts = {len(uniform_starts(steps, n)): total(costs, optimal_starts(costs, n)) for n in range(steps, 0, -1)}
    values = [counts[count] for count in sorted(counts)]
    assert values[-1] == 0  # all in full
    # lengths are bounded by 2·interval, within which one more start never costs
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(values[-2:]))


@given(starts=st.sets(st.integers(1, 19)))
def test_a_step_takes_the_feature_of_the_last_full_one(starts: set[int]):
    sources = sources_of([0, *sorted(starts)], 20)
    for step, source in enumerate(sources):
        assert source in {0, *starts}
        assert source <= step
        assert not any(source < other <= step for other in starts)


@given(seed=SEEDS, channels=st.integers(1, 6), spread=st.sampled_from([0.0, 1e-6, 0.1, 10.0]))
def test_the_line_never_raises_the_squared_error(seed: int, channels: int, spread: float):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, channels, 4, 4, generator=generator) * torch.rand(channels, 1, 1, generator=generator)
    y = torch.randn(channels, 1, 1, generator=generator) * x + spread * torch.randn(x.shape, generator=generator)
    scale, shift = (v.double().view(-1, 1, 1) for v in _Sums.of([x], [y]).line())
    assert ((scale >= 0) & (scale <= 2)).all()
    before, after = (x.double() - y).square().sum((0, 2, 3)), (scale * x + shift - y).square().sum((0, 2, 3))
    assert (after <= before * (1 + 1e-5) + 1e-9).all()


@given(seed=SEEDS, channels=st.integers(1, 6))
def test_a_feature_that_does_not_change_is_left_alone(seed: int, channels: int):
    x = torch.randn(3, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 0.5  # a channel that does not vary at all
    sums = _Sums.of([x], [x])
    scale, shift = sums.line()
    torch.testing.assert_close(scale, torch.ones(channels), rtol=0, atol=1e-6)
    torch.testing.assert_close(shift, torch.zeros(channels), rtol=0, atol=1e-6)
    assert sums.staleness < 1e-12


@given(seed=SEEDS)
def test_sums_over_batches_are_those_of_all(seed: int):
    x, y = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    both = (_Sums.of([x[:2]], [y[:2]]) + _Sums.of([x[2:]], [y[2:]])).line()
    torch.testing.assert_close(both, _Sums.of([x], [y]).line())


def plan_of(sources: list[int], channels: int = 2, seed: int = 0) -> CachePlan:
    steps = len(sources)
    tables = torch.randn(2, steps, channels, generator=torch.Generator().manual_seed(seed))
    timesteps = [1000 - 10 * (step + 1) for step in range(steps)]
    return CachePlan(1, timesteps, sources, *tables, [0.5] * steps, 1000, 100)


PLANS = st.builds(
    lambda starts, seed: plan_of(sources_of([0, *sorted(starts)], 8), seed=seed), st.sets(st.integers(1, 7)), SEEDS
)


@given(plan=PLANS)
def test_a_plan_is_read_as_it_was_written(plan: CachePlan):
    read = CachePlan.from_dict(plan.to_dict())
    assert torch.equal(read.scale, plan.scale)
    assert torch.equal(read.shift, plan.shift)
    assert read.to_dict() == plan.to_dict()


@given(plan=PLANS, data=st.data())
def test_a_damaged_plan_is_refused(plan: CachePlan, data: st.DataObject):
    values = plan.to_dict()
    name = data.draw(st.sampled_from(sorted(values)))
    wrong = data.draw(st.sampled_from([None, -1, "x", [], [1], {}, float("nan"), "AAAA", values["timesteps"][::-1]]))
    assume(wrong != values[name])
    with pytest.raises(ValueError, match="cache plan is damaged"):
        CachePlan.from_dict({**values, name: wrong})


class Counted:
    """Both programs of a toy network: the feature is the picture, and what a shallow step returns names it."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def full(self, x_t: Tensor, timesteps: Tensor, conditioning: dict) -> tuple[Tensor, Tensor]:
        self.made.append("full")
        return x_t * 2 + timesteps[0], x_t.repeat(1, 2, 1, 1)

    def shallow(self, x_t, timesteps, conditioning, feature, scale, shift) -> Tensor:
        self.made.append("shallow")
        return x_t + timesteps[0] + (feature * scale + shift).mean(1, keepdim=True)


def walked(plan: CachePlan, x_t: Tensor, conditioning: dict) -> list[Tensor]:
    """Every prediction of a walk that nothing disturbs."""
    network = Counted()
    walk, seen = Walk(plan, network.full, network.shallow, declared=True), []
    for t in plan.timesteps:
        seen.append(walk(x_t, t, **conditioning))
        x_t = x_t * 0.9 + seen[-1] * 1e-3
    return seen


@given(plan=PLANS, order=st.lists(st.integers(0, 2), min_size=24, max_size=24), text=st.booleans())
@settings(max_examples=60)
@pytest.mark.filterwarnings("ignore:another walk")
def test_walks_that_mix_in_one_network_are_exact_or_computed_in_full(plan: CachePlan, order: list[int], text: bool):
    """Three walks of as many pictures take turns. What is answered is right for the walk that asked, or full."""
    network = Counted()
    shared = Walk(plan, network.full, network.shallow)
    starts = [torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    texts = [{"text": torch.full((2, 1), float(k))} if text else {} for k in range(3)]
    alone = [walked(plan, x, c) for x, c in zip(starts, texts, strict=True)]
    at, x_t = [0, 0, 0], list(starts)
    for turn in order:
        if at[turn] == len(plan.timesteps):
            continue
        step = at[turn]
        given_x = x_t[turn]
        seen = shared(given_x, plan.timesteps[step], **texts[turn])
        in_full = given_x * 2 + plan.timesteps[step]
        same_way = torch.equal(seen, alone[turn][step])
        if text:  # walks that can be told apart do not touch each other at all
            assert same_way
        else:
            assert same_way or torch.equal(seen, in_full)
        # go on as the undisturbed walk does, so that every turn can be compared with it
        x_t[turn] = given_x * 0.9 + alone[turn][step] * 1e-3
        at[turn] += 1


@given(steps=st.integers(1, 12), seed=SEEDS)
@settings(max_examples=20)
def test_where_every_step_is_full_nothing_changes(steps: int, seed: int):
    network, plan = Counted(), plan_of(list(range(steps)), seed=seed)
    walk, x_t = Walk(plan, network.full, network.shallow), torch.randn(2, 1, 2, 2)
    for t in plan.timesteps:
        seen = walk(x_t, t)
        assert torch.equal(seen, x_t * 2 + t)
        x_t = x_t * 0.9 + seen * 1e-3
    assert network.made == ["full"] * steps


@given(plan=PLANS, sizes=st.permutations([1, 2, 3]))
@settings(max_examples=30)
def test_a_picture_does_not_hang_on_how_the_batch_is_split(plan: CachePlan, sizes: list[int]):
    x_t = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    whole = walked(plan, x_t, {})
    split = [walked(plan, part, {}) for part in x_t.split(sizes)]
    for step, prediction in enumerate(whole):
        assert torch.equal(prediction, torch.cat([parts[step] for parts in split]))


class Smooth(Counted):
    """As a network is: the prediction is no sum of what was there before."""

    def full(self, x_t: Tensor, timesteps: Tensor, conditioning: dict) -> tuple[Tensor, Tensor]:
        self.made.append("full")
        return torch.tanh(x_t + timesteps[0] / 1000) * (1 + len(conditioning)), x_t.repeat(1, 2, 1, 1)

    def shallow(self, x_t, timesteps, conditioning, feature, scale, shift) -> Tensor:
        self.made.append("shallow")
        return torch.tanh(x_t + timesteps[0] / 1000) * 0.9


SOLVERS = {
    "DDIM": lambda: DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "DPM-Solver++ 2M": lambda: DPMSolverMultistepScheduler(),
    "DPM-Solver++ 3M": lambda: DPMSolverMultistepScheduler(solver_order=3),
    "UniPC": lambda: UniPCMultistepScheduler(),
    "Euler": lambda: EulerDiscreteScheduler(),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
}


def walked_by(solver: str, walk: Walk, plan: CachePlan, *, guided: bool = False, dtype=torch.float32, **given) -> None:
    """Sample as a pipeline does, under guidance with both halves in one batch."""
    scheduler: Any = SOLVERS[solver]()
    scheduler.set_timesteps(len(plan.timesteps))
    x_t = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_t = x_t * getattr(scheduler, "init_noise_sigma", 1.0)
    for known, t in zip(plan.timesteps, scheduler.timesteps, strict=True):
        scaled = scheduler.scale_model_input(x_t, t) if hasattr(scheduler, "scale_model_input") else x_t
        prediction = walk(torch.cat([scaled, scaled]) if guided else scaled, known)
        if guided:
            # no row is as the other half's: a network sees another prompt there
            negative, prompt = prediction.chunk(2)
            prediction = negative + 5 * (prompt * 0.7 - negative)
        x_t = scheduler.step(prediction.to(dtype), t, x_t, **given).prev_sample


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_of_solvers_are_seen_to_come_one_after_another(solver: str, guided: bool):
    plan, network = plan_of([0, 0, 0, 3, 3, 3, 6, 7]), Smooth()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        walked_by(solver, Walk(plan, network.full, network.shallow), plan, guided=guided)
    expected = ["full" if source == step else "shallow" for step, source in enumerate(plan.sources)]
    assert network.made == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_hide_a_step(dtype: torch.dtype):
    plan, network = plan_of([0, 0, 2, 2, 2]), Smooth()
    walked_by("DDIM", Walk(plan, network.full, network.shallow), plan, dtype=dtype)
    assert network.made.count("full") == 2


@pytest.mark.filterwarnings("ignore:what comes is not")
def test_a_step_that_draws_noise_is_computed_in_full_where_nobody_says_that_it_is_one_walk():
    plan = plan_of([0, 0, 2, 2])
    for declared, fulls in ((False, 4), (True, 2)):
        network = Smooth()
        walk = Walk(plan, network.full, network.shallow, declared=declared)
        walked_by("DDIM", walk, plan, eta=1.0, generator=torch.Generator().manual_seed(1))
        assert network.made.count("full") == fulls


@given(begun=st.integers(1, 7), seed=SEEDS, alike=st.floats(0, 0.9))
@settings(max_examples=40)
@pytest.mark.filterwarnings("ignore:what comes is not")
def test_a_walk_that_was_broken_off_leaves_nothing_to_one_that_begins_at_the_next_step(
    begun: int, seed: int, alike: float
):
    """Also where its pictures are partly those of the one before, as two of one seed are."""
    plan, network = plan_of([0] * 8), Smooth()
    walk, generator = Walk(plan, network.full, network.shallow), torch.Generator().manual_seed(seed)
    x_t = torch.randn(2, 3, 6, 6, generator=generator)
    for step in range(begun):
        x_t = x_t * 0.9 + walk(x_t, plan.timesteps[step]) * 0.05
    other = alike * x_t + (1 - alike) * torch.randn(x_t.shape, generator=generator)
    network.made.clear()
    walk(other, plan.timesteps[begun])
    assert network.made == ["full"]
