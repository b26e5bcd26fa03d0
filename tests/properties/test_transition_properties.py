"""What must hold for every sequence of losses that the momentum policy may be given."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqcad_ao.learn.transition import MomentumTransition

LADDERS = st.lists(st.integers(2, 16), min_size=1, max_size=5, unique=True).map(lambda bits: sorted(bits, reverse=True))
LOSSES = st.one_of(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=60),
    st.floats(0, 1e300).map(lambda value: [value]),  # constant
    st.just([1.0, 1e-9]),  # oscillating
    st.just([1.5**k for k in range(200)]),  # exploding
    st.just([0.99**k for k in range(400)]),  # always a little better
    st.just([0.0]),
)


@st.composite
def policies(draw):
    ladder, beta = draw(LADDERS), draw(st.floats(0.05, 0.97))
    least = MomentumTransition.minimum_budget(len(ladder), beta)
    return MomentumTransition(
        ladder,
        budget=least + draw(st.integers(0, 150)),
        beta=beta,
        tau=draw(st.floats(0, 0.5)),
        window=draw(st.integers(1, 30)),
        patience=draw(st.integers(1, 8)),
    )


def previous_bits(policy):
    """The width that is blending out; the same as ``bits`` when none is."""
    return policy.ladder[policy.rung - 1] if policy.alpha < 1 else policy.bits


def walk(policy, losses):
    """(bits, previous bits, alpha) after each update of the whole budget, the losses repeated as needed."""
    seen = []
    for step in range(policy.budget):
        policy.update(losses[step % len(losses)])
        seen.append((policy.bits, previous_bits(policy), policy.alpha))
    return seen


@given(policies(), LOSSES)
def test_walks_the_ladder_within_the_budget(policy, losses):
    seen = walk(policy, losses)
    bits = [row[0] for row in seen]
    assert bits == sorted(bits, reverse=True), "bits never rise"
    assert policy.done
    assert seen[-1] == (policy.ladder[-1], policy.ladder[-1], 1.0), "the target is reached, blended in whole"
    assert [row.to_bits for row in policy.transitions] == policy.ladder[1:]
    assert all(0 <= alpha <= 1 for _, _, alpha in seen)


@given(policies(), LOSSES)
def test_one_update_moves_alpha_by_at_most_one_minus_beta(policy, losses):
    before = policy.alpha
    for _, _, alpha in walk(policy, losses):
        if before < 1:
            assert alpha - before <= 1 - policy.beta + 1e-12
        before = alpha


@given(policies(), LOSSES, st.integers(-40, 40))
def test_a_constant_factor_changes_nothing(policy, losses, power):
    losses = [loss for loss in losses if loss == 0 or 1e-200 < loss < 1e200] or [1.0]
    other = MomentumTransition.from_state_dict(policy.state_dict())
    # powers of two scale a float without rounding, so that even ties fall alike
    assert walk(policy, losses) == walk(other, [loss * 2.0**power for loss in losses])


@given(policies(), st.sampled_from([[1.0], [1.0, 1e-9], [0.99**k for k in range(400)]]), st.floats(0.1, 10))
def test_a_factor_that_rounds_changes_nothing_either(policy, losses, factor):
    other = MomentumTransition.from_state_dict(policy.state_dict())
    assert walk(policy, losses) == walk(other, [loss * factor for loss in losses])


@pytest.mark.parametrize("factor", [1.0, 1.7, 3.0])
def test_a_flat_loss_settles_at_once_where_no_progress_is_asked_for(factor):
    policy = MomentumTransition([8, 6, 4], budget=300, tau=0.0, window=5, patience=2)
    for _ in range(300):
        policy.update(factor)
    assert [row.step for row in policy.transitions] == [7, 37]


@given(policies(), LOSSES, st.integers(0, 200))
def test_goes_on_from_its_state(policy, losses, stop):
    whole = MomentumTransition.from_state_dict(policy.state_dict())
    expected = walk(whole, losses)
    stop = min(stop, policy.budget)
    for step in range(stop):
        policy.update(losses[step % len(losses)])
    resumed = MomentumTransition.from_state_dict(json.loads(json.dumps(policy.state_dict())))
    got = []
    for step in range(stop, policy.budget):
        resumed.update(losses[step % len(losses)])
        got.append((resumed.bits, previous_bits(resumed), resumed.alpha))
    assert got == expected[stop:]
    assert resumed.transitions == whole.transitions


@given(policies(), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_loss_that_is_no_number_is_refused_and_changes_nothing(policy, loss):
    policy.update(1.0) if policy.budget > 1 else None
    before = policy.state_dict()
    with pytest.raises(FloatingPointError, match="bits"):
        policy.update(loss)
    assert policy.state_dict() == before


def test_settles_when_the_loss_does_not_fall():
    policy = MomentumTransition([8, 4], budget=1000, window=10, patience=3)
    for _ in range(20):
        policy.update(1.0)
    assert [row.step for row in policy.transitions] == [13]
    assert "progress" in policy.transitions[0].reason


def test_waits_while_the_loss_falls():
    policy = MomentumTransition([8, 4], budget=1000, window=10, patience=3)
    for step in range(500):
        policy.update(0.98**step)
    assert [row.step for row in policy.transitions] == [500]
    assert "budget" in policy.transitions[0].reason


@pytest.mark.parametrize("ladder", [[], [4, 8], [8, 8, 4], [8, 4.0], [True, 0]])
def test_a_ladder_that_does_not_fall_is_refused(ladder):
    with pytest.raises(ValueError, match="ladder"):
        MomentumTransition(ladder, budget=1000)


def test_a_budget_too_small_is_refused_and_says_what_it_takes():
    least = MomentumTransition.minimum_budget(4, 0.9)
    with pytest.raises(ValueError, match=f"it takes {least}"):
        MomentumTransition([8, 6, 5, 4], budget=least - 1)
    MomentumTransition([8, 6, 5, 4], budget=least)
