"""Properties of feature caching: schedules, the correction's line, the plan's file, and walks that mix."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pqcad_ao.cache import _Sums
from pqcad_ao.diffusion.cache_plan import CachePlan, Walk, group_costs, optimal_starts, sources_of, uniform_starts

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
    walk, seen = Walk(plan, network.full, network.shallow), []
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
