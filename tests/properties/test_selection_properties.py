"""Properties of the choice of calibration points by clusters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import quick
from torch import Tensor

from pqcad_ao import PQCADConfig
from pqcad_ao.denoiser import timestep_group
from pqcad_ao.diffusion.calibration import CalibrationSet, draw_steps, to_observe
from pqcad_ao.diffusion.selection import affinity, one_of_each

SEEDS = st.integers(0, 2**31)


def pictures(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def chosen(x_t: Tensor, timesteps: Tensor, count: int, alpha: float = 0.5, seed: int = 0) -> list[int]:
    return one_of_each(x_t, timesteps, count, alpha=alpha, bandwidth=10.0, seed=seed).tolist()


@given(count=st.integers(1, 60), groups=st.integers(1, 5), points=st.integers(1, 60), seed=SEEDS)
@settings(max_examples=6)
def test_every_group_has_as_many_points_as_before(count: int, groups: int, points: int, seed: int):
    timesteps = torch.randint(1000, (count,), generator=torch.Generator().manual_seed(seed))
    whole = CalibrationSet(pictures(count, seed), timesteps, {"number": torch.arange(count)})
    found = {}
    for how in ("first", "clusters"):
        config = quick(timestep_groups=groups, calibration_points=points, calibration_selection=how)
        found[how] = to_observe(whole, config, 1000)
    sizes = [torch.bincount(timestep_group(one.timesteps, groups, 1000), minlength=groups) for one in found.values()]
    assert torch.equal(*sizes)
    taken = found["clusters"]
    numbers = taken.conditioning["number"]
    assert len(numbers.unique()) == len(numbers)
    assert torch.equal(taken.x_t, whole.x_t[numbers])
    assert torch.equal(taken.timesteps, timesteps[numbers])


@given(count=st.integers(2, 40), share=st.floats(0.05, 1), alpha=st.floats(0, 1), seed=SEEDS)
@settings(max_examples=5)
def test_the_choice_is_the_same_on_any_number_of_threads(count: int, share: float, alpha: float, seed: int):
    x_t, timesteps = pictures(count, seed), torch.arange(count) % 50
    asked, before = max(1, int(share * count)), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(chosen(x_t, timesteps, asked, alpha, seed))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0] == found[1]
    assert len(found[0]) == asked


def apart(clusters: int, of_each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of clusters that cannot be taken for one another, cluster by cluster, and of which each is."""
    generator = torch.Generator().manual_seed(seed)
    centres, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    centres = centres - centres.mean(0)  # each column without its mean
    cluster = torch.arange(clusters).repeat_interleave(of_each)
    noise = 0.02 * torch.randn(len(cluster), 16, generator=generator)
    return (centres.T[cluster] + noise).view(-1, 1, 4, 4), cluster


@given(clusters=st.integers(2, 5), of_each=st.integers(2, 6), seed=SEEDS)
@settings(max_examples=6)
def test_each_of_separate_clusters_gives_one_in_whatever_order_they_come(clusters: int, of_each: int, seed: int):
    x_t, cluster = apart(clusters, of_each, seed)
    order = torch.randperm(len(x_t), generator=torch.Generator().manual_seed(seed))
    timesteps = torch.zeros(len(x_t), dtype=torch.int64)
    for rows in (torch.arange(len(x_t)), order):
        taken = rows[chosen(x_t[rows], timesteps, clusters, alpha=0.9)]
        assert sorted(cluster[taken].tolist()) == list(range(clusters))


@given(seed=SEEDS, count=st.integers(2, 20))
@settings(max_examples=5)
def test_alpha_one_looks_at_pictures_alone_and_zero_at_timesteps_alone(seed: int, count: int):
    generator = torch.Generator().manual_seed(seed)
    x_t, (one, other) = pictures(count, seed), torch.randint(1000, (2, count), generator=generator)
    asked = count // 2
    assert chosen(x_t, one, asked, alpha=1.0) == chosen(x_t, other, asked, alpha=1.0)
    A = affinity(x_t, one, 0.0, 10.0)
    assert torch.equal(A, affinity(pictures(count, seed + 1), one, 0.0, 10.0))
    assert torch.equal(A, A.T)
    assert (affinity(x_t, one, 0.5, 10.0).diag() - 1).abs().max() < 1e-9


@given(distinct=st.integers(1, 6), copies=st.integers(2, 5), asked=st.integers(1, 12), seed=SEEDS)
@settings(max_examples=8)
def test_duplicates_fill_no_place_while_distinct_points_are_left(distinct: int, copies: int, asked: int, seed: int):
    x_t = pictures(distinct, seed).repeat(copies, 1, 1, 1)
    taken = chosen(x_t, torch.zeros(len(x_t), dtype=torch.int64), min(asked, len(x_t)), seed=seed)
    kinds = {number % distinct for number in taken}
    assert len(kinds) == min(asked, distinct)
    assert len(taken) == len(set(taken)) == min(asked, len(x_t))


def test_without_learning_the_pool_is_walked_to_as_well():
    steps = [
        len(draw_steps(torch.arange(0, 1000, 250), 1000, config, torch.Generator().manual_seed(0))[0])
        for config in (quick(learning_points=70), quick(learning_points=70, calibration_selection="clusters"))
    ]
    assert steps == [16, 70]


@pytest.mark.parametrize(("option", "value"), [("calibration_selection", "best"), ("cluster_alpha", 1.5)])
def test_bad_options_are_errors(option: str, value: object):
    with pytest.raises(ValueError, match=option):
        PQCADConfig(**{option: value})
