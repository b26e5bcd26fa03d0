"""What must hold for every grid: the fake quantizers, the least-squares fit behind them, and the timestep groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pqcad_ao.diffusion.layer_inputs import highest, stratified
from pqcad_ao.nn.timestep import timestep_group
from pqcad_ao.prepare.fake_quant import (
    ActivationFakeQuantize,
    WeightFakeQuantize,
    expand_grid,
    fake_quantize,
    quantize,
)
from pqcad_ao.prepare.grids import SortedRows, activation_lows, fit_activation_grid, fit_weight_scale, weight_range

BITS = st.integers(2, 8)
SCALES = st.floats(1e-4, 1e3)
# What weights and activations look like, and what they should not: long tails, constants, nothing at all.
SHAPES = ("normal", "uniform", "tails", "positive", "constant", "zero", "one", "sparse")


@st.composite
def grids(draw):
    """A bit width's lowest and highest integer with zero among them, as weights or as activations have them."""
    bits = draw(BITS)
    if draw(st.booleans()):
        return weight_range(bits)
    low = int(draw(st.sampled_from(activation_lows(bits).tolist())))
    return low, low + 2**bits - 1


@st.composite
def rows(draw, most_rows: int = 4, most_values: int = 40, magnitude=SCALES):
    """(R, N) float32 values of one of the ``SHAPES``, a different magnitude in each row."""
    count, length = draw(st.integers(1, most_rows)), draw(st.integers(1, most_values))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(count, length, generator=generator)
    shape = draw(st.sampled_from(SHAPES))
    if shape == "uniform":
        values = torch.rand(count, length, generator=generator) * 2 - 1
    elif shape == "tails":
        values = values**3
    elif shape == "positive":
        values = torch.nn.functional.silu(values * 3)
    elif shape == "constant":
        values = values[:, :1].expand(count, length).clone()
    elif shape == "zero":
        values = torch.zeros(count, length)
    elif shape == "one":
        values = values[:, :1].clone()
    elif shape == "sparse":
        values = values * (torch.rand(count, length, generator=generator) < 0.2)
    return values * torch.tensor([draw(magnitude) for _ in range(count)])[:, None]


@st.composite
def tensors(draw, scale: float):
    """Values in and around a grid of this scale, its own points and the ties between them included."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    wide = torch.randn(32, generator=generator) * scale * draw(st.sampled_from([0.3, 4.0, 300.0]))
    halves = torch.randint(-300, 300, (32,), generator=generator) * (scale / 2)
    return torch.cat([wide, halves, torch.zeros(1)])


# fake_quantize


@given(st.data(), grids(), SCALES)
def test_fake_quantize_is_idempotent(data, grid, scale):
    x, s = data.draw(tensors(scale)), torch.tensor(scale)
    once = fake_quantize(x, s, *grid)
    assert torch.equal(fake_quantize(once, s, *grid), once)


@given(st.data(), grids(), SCALES)
def test_fake_quantize_is_the_integers_times_the_scale(data, grid, scale):
    x, s = data.draw(tensors(scale)), torch.tensor(scale)
    integers = quantize(x, s, *grid)
    assert torch.equal(integers, integers.round())
    assert integers.min() >= grid[0]
    assert integers.max() <= grid[1]
    assert torch.equal(fake_quantize(x, s, *grid), integers * s)


@given(st.data(), grids(), SCALES)
def test_error_is_at_most_half_a_scale_inside_the_range(data, grid, scale):
    x, s = data.draw(tensors(scale)), torch.tensor(scale)
    inside = (x >= grid[0] * s) & (x <= grid[1] * s)
    error = (fake_quantize(x, s, *grid) - x).abs()[inside]
    assert (error <= s * (0.5 + 1e-4)).all()


@given(st.data(), grids(), SCALES)
def test_fake_quantize_is_monotone(data, grid, scale):
    x = data.draw(tensors(scale)).sort().values
    assert (fake_quantize(x, torch.tensor(scale), *grid).diff() >= 0).all()


@given(st.data(), grids(), SCALES, st.integers(-20, 20))
def test_fake_quantize_follows_a_power_of_two_exactly(data, grid, scale, exponent):
    x, s, factor = data.draw(tensors(scale)), torch.tensor(scale), 2.0**exponent
    assert torch.equal(fake_quantize(x * factor, s * factor, *grid), fake_quantize(x, s, *grid) * factor)


@given(st.data(), grids(), SCALES, st.floats(1e-3, 1e3))
def test_fake_quantize_follows_any_factor_away_from_ties(data, grid, scale, factor):
    x, s = data.draw(tensors(scale)), torch.tensor(scale)
    v = x.double() / s.double()
    away = ((v - v.floor() - 0.5).abs() > 1e-3) | (v < grid[0]) | (v > grid[1])
    scaled, plain = fake_quantize(x * factor, s * factor, *grid), fake_quantize(x, s, *grid) * factor
    torch.testing.assert_close(scaled[away], plain[away], rtol=1e-5, atol=0)


@given(grids(), SCALES)
def test_zero_is_exact(grid, scale):
    assert fake_quantize(torch.zeros(3), torch.tensor(scale), *grid).tolist() == [0, 0, 0]


@given(st.data(), grids(), SCALES)
def test_gradient_to_x_is_one_inside_and_zero_outside(data, grid, scale):
    x, s = data.draw(tensors(scale)).requires_grad_(), torch.tensor(scale)
    (gradient,) = torch.autograd.grad(fake_quantize(x, s, *grid).sum(), x)
    v = (x * s.reciprocal()).detach()
    expected = ((v >= grid[0]) & (v <= grid[1])).float()
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


@given(st.data(), grids(), SCALES)
def test_gradient_to_the_scale_is_learned_step_sizes(data, grid, scale):
    """LSQ (Esser et al. 2020), eq. 3: round(v) - v inside, the bound outside."""
    x, s = data.draw(tensors(scale)), torch.tensor(scale, requires_grad=True)
    weights = torch.linspace(-1, 1, len(x))
    (gradient,) = torch.autograd.grad((fake_quantize(x, s, *grid) * weights).sum(), s)
    v = (x * s.detach().reciprocal()).double()
    inside = torch.where(v < grid[0], grid[0], torch.where(v > grid[1], grid[1], v.round() - v))
    expected = (inside * weights).sum()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-3)


def test_both_quantizers_scale_that_gradient_as_published():
    """LSQ, §2.2: g = 1/√(values · largest integer), values being those of a channel, or of a sample."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator) for shape in ((3, 5, 2, 2), (2, 6, 4, 4)))
    weights, activations = WeightFakeQuantize(4, 3), ActivationFakeQuantize(4, [6], groups=1, channel_dim=1)
    weights.fit(weight, weights.bits)
    activations.scale.data.fill_(0.3)
    activations.low.fill_(-8)
    for module, inputs, grid, values, largest in (
        (weights, (weight,), (-8, 7), 20, 7),
        (activations, (x, torch.zeros(2, dtype=torch.int64)), (-8, 7), 96, 15),
    ):
        module.enable_fake_quant()
        (found,) = torch.autograd.grad((module(*inputs) ** 2).sum(), module.scale)
        plain = module.scale.detach().clone().requires_grad_()
        shape = (-1, 1, 1, 1)
        (expected,) = torch.autograd.grad((fake_quantize(inputs[0], plain.view(shape), *grid) ** 2).sum(), plain)
        torch.testing.assert_close(found.flatten(), expected.flatten() / (values * largest) ** 0.5)


# The least-squares fit


@settings(max_examples=20)
@given(rows(), BITS)
def test_weight_scales_are_positive_and_integers_within_limits(weight, bits):
    scale = fit_weight_scale(weight, bits)
    assert scale.shape == weight.shape[:1]
    assert scale.dtype == torch.float32
    assert (scale > 0).all()
    integers = quantize(weight, scale[:, None], *weight_range(bits))
    assert integers.min() >= -(2 ** (bits - 1))
    assert integers.max() <= 2 ** (bits - 1) - 1


@settings(max_examples=20)
@given(rows(), BITS)
def test_activation_grids_hold_zero_and_fit_into_int8(values, bits):
    scale, low = fit_activation_grid(values, bits)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert (low <= 0).all()
    assert (low + 2**bits - 1 >= 0).all()
    assert (low >= -128).all()
    assert (low + 2**bits - 1 <= 127 if bits == 8 else low + 2**bits - 1 <= 2**bits - 1).all()


def squared_error(values: Tensor, scale: Tensor, low, high) -> Tensor:
    """Σ (values - scale·clamp(round(values/scale), low, high))² over each row; scale, low and high are (..., R)."""
    low, high = (bound[..., None] if isinstance(bound, Tensor) else bound for bound in (low, high))
    return (values - scale[..., None] * quantize(values, scale[..., None], low, high)).square().sum(-1)


@settings(max_examples=40)
@given(rows(), grids(), st.lists(st.floats(0.1, 1.0), min_size=1, max_size=3))
def test_running_sums_give_the_squared_error_of_every_value(values, grid, parts):
    low, high = grid
    scale = torch.stack([values.abs().amax(1).clamp_min(1e-8) * part / max(high, -low) for part in parts])
    weights = torch.arange(1.0, values.shape[1] + 1).expand_as(values)  # as if values were there several times
    counted = torch.repeat_interleave(values.double(), torch.arange(1, values.shape[1] + 1), 1)
    error = SortedRows(values, weights).squared_error(scale, low, high - low + 1)
    bound = 1e-6 * counted.square().sum(1)  # borders are compared in float32
    assert ((error - squared_error(counted, scale.double(), low, high)).abs() <= bound).all()


def _weight_error(weight: Tensor, bits: int) -> Tensor:
    return squared_error(weight.double(), fit_weight_scale(weight, bits).double(), *weight_range(bits))


@settings(max_examples=20)
@given(rows())
def test_more_weight_bits_never_fit_worse(weight):
    errors = torch.stack([_weight_error(weight, bits) for bits in range(2, 9)])
    tolerance = 1e-6 * weight.double().square().sum(1)
    assert (errors.diff(dim=0) <= tolerance).all()


@settings(max_examples=5)
@given(rows(most_rows=2, most_values=24))
def test_more_activation_bits_never_fit_worse(values):
    errors = []
    for bits in range(2, 9):
        scale, low = fit_activation_grid(values, bits)
        errors.append(squared_error(values.double(), scale.double(), low, low + 2**bits - 1))
    tolerance = 1e-6 * values.double().square().sum(1)
    assert (torch.stack(errors).diff(dim=0) <= tolerance).all()


@settings(max_examples=20)
@given(rows(), BITS)
def test_the_fit_is_no_worse_than_reaching_the_largest_value(weight, bits):
    low, high = weight_range(bits)
    reaching = weight.double().abs().amax(1).clamp_min(1e-8) / (high + 0.5)
    naive = squared_error(weight.double(), reaching, low, high)
    assert (_weight_error(weight, bits) <= naive + 1e-6 * weight.double().square().sum(1)).all()


@settings(max_examples=15)
@given(rows(magnitude=st.floats(1e-2, 1e2)), BITS, st.integers(-8, 8))
def test_the_fit_follows_a_power_of_two_exactly(values, bits, exponent):
    values = values[values.abs().amax(1) > 0]  # a row of zeros has one scale whatever it is multiplied by
    if not len(values):
        return
    factor = 2.0**exponent
    assert torch.equal(fit_weight_scale(values * factor, bits), fit_weight_scale(values, bits) * factor)
    scale, low = fit_activation_grid(values, min(bits, 4))
    scaled, scaled_low = fit_activation_grid(values * factor, min(bits, 4))
    assert torch.equal(scaled, scale * factor)
    assert torch.equal(scaled_low, low)


@settings(max_examples=8)
@given(rows(most_rows=4), st.integers(2, 4))
def test_rows_are_fitted_independently(values, bits):
    together = fit_weight_scale(values, bits)
    scale, low = fit_activation_grid(values, bits)
    for row in range(len(values)):
        assert torch.equal(fit_weight_scale(values[row : row + 1], bits), together[row : row + 1])
        alone = fit_activation_grid(values[row : row + 1], bits)
        assert torch.equal(alone[0], scale[row : row + 1])
        assert torch.equal(alone[1], low[row : row + 1])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_any_magnitude_gives_finite_grids(magnitude, bits):
    values = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0, 0, 0, 0], [1, 1, 1, 1], [-1, -1, -1, -1]]) * magnitude
    scale, (grid_scale, low) = fit_weight_scale(values, bits), fit_activation_grid(values, bits)
    for fitted in (scale, grid_scale):
        assert fitted.isfinite().all()
        assert (fitted > 0).all()
    assert fake_quantize(values, scale[:, None], *weight_range(bits)).isfinite().all()
    assert fake_quantize(values, grid_scale[:, None], low[:, None], low[:, None] + 2**bits - 1).isfinite().all()
    assert not quantize(values, scale[:, None], *weight_range(bits))[1].any()


@pytest.mark.parametrize("bits", [3, 4])
def test_the_fit_finds_what_a_dense_search_finds(bits):
    weight = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    scales = torch.linspace(0.01, 1.5, 600, dtype=torch.float64)[:, None].expand(-1, 3)
    dense = squared_error(weight.double(), scales, *weight_range(bits)).amin(0)
    assert (_weight_error(weight, bits) <= 1.003 * dense).all()


# The modules


@settings(max_examples=20)
@given(rows(), BITS)
def test_weight_fake_quantizer_equals_channel_by_channel(weight, bits):
    together = WeightFakeQuantize(bits, len(weight))
    together.fit(weight, together.bits)
    for row in range(len(weight)):
        alone = WeightFakeQuantize(bits, 1)
        alone.fit(weight[row : row + 1], alone.bits)
        assert torch.equal(alone(weight[row : row + 1]), together(weight)[row : row + 1])


@given(
    st.integers(1, 6), st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.sampled_from([2, 4])
)
def test_expanded_grids_are_the_tables_entries(batch, groups, segments, rank):
    generator = torch.Generator().manual_seed(batch * 100 + groups)
    scale = torch.rand(groups, len(segments), generator=generator)
    low = torch.randint(-8, 1, scale.shape, generator=generator)
    group = torch.randint(groups, (batch,), generator=generator)
    dim = -1 if rank == 2 else 1
    shape = [batch, sum(segments)] + [1] * (rank - 2)
    for table, expanded in zip((scale, low), expand_grid(scale, low, group, segments, rank, dim), strict=True):
        expanded = expanded.expand(shape)
        for sample in range(batch):
            by_channel = [table[group[sample], s] for s, count in enumerate(segments) for _ in range(count)]
            assert expanded[sample].flatten().tolist() == [value.item() for value in by_channel]


def _fitted(bits: int = 2, segments=(3, 2), groups: int = 4, **options) -> ActivationFakeQuantize:
    module = ActivationFakeQuantize(bits, list(segments), groups, 1)
    generator = torch.Generator().manual_seed(1)
    module.enable_observer()
    module.disable_fake_quant()
    for group in options.get("seen", range(groups)):
        x = torch.randn(6, sum(segments), 4, 4, generator=generator) * (1 + group)
        assert torch.equal(module(x, torch.full((6,), group)), x)  # while it observes it lets everything pass
    module.fit(module.bits)
    module.enable_observer(False)
    module.enable_fake_quant()
    return module


@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_a_stratified_sample_holds_every_extreme_and_stands_for_all_values(count, seed):
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(seed)) ** 3
    kept, weights = stratified(values)
    assert kept.shape == (3, 216)
    assert weights.sum().item() == pytest.approx(count, rel=1e-5)
    ends = min(24, count)
    for row, sample in zip(values, kept, strict=True):
        there = sample[weights > 0].sort().values
        assert torch.equal(there[:ends], row.sort().values[:ends])
        assert torch.equal(there[-ends:], row.sort().values[-ends:])
    assert (weights[(kept == values.amax(1, keepdim=True)).any(0)] == 1).all()


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(0, 8000), st.sampled_from([1, 3, 1000]), st.integers(0, 2**31))
def test_the_highest_are_those_that_topk_finds(count, more, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(kinds, (2, count + more), generator=generator) + torch.rand(1, generator=generator)
    if more > count:
        values[1, more] = torch.inf
    assert torch.equal(highest(values, count), values.topk(count).values)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [3, 30, 200])  # kept whole; ends looked for at once; and block by block
def test_one_value_that_is_not_finite_is_an_error(value, size):
    module = ActivationFakeQuantize(4, [2], 1, 1)
    module.enable_observer()
    x = torch.randn(3, 2, size, size)
    x[1, 1, -1, 1] = value
    module.observe(x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(FloatingPointError, match="NaN or infinite activations"):
        module.fit(4)


def test_a_wide_grid_reaches_what_few_values_reach():
    """One value in two thousand decides how far eight bits should go; a draw of so many may miss it."""
    x = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    x.view(8, -1)[:, 17] = 12.0
    module = ActivationFakeQuantize(8, [4], 1, 1)
    module.enable_observer()
    module(x, torch.zeros(8, dtype=torch.int64))
    module.fit(module.bits)
    assert 127 * module.scale.item() > 10
    module.fit(2)
    assert module.scale.item() < 4  # and what few values reach is nothing to two bits


def test_the_first_samples_of_each_group_are_kept_and_no_more():
    module = ActivationFakeQuantize(4, [3, 2], 2, 1)
    module.enable_observer()
    for level in range(1, 5):
        module(torch.full((6, 5, 2, 2), float(level)), torch.tensor([0, 0, 0, 0, 0, 1]))
    sampled, groups = (torch.cat(part) for part in zip(*module.observed, strict=True))
    values = sampled[:, :, 0]
    assert groups.bincount().tolist() == [8, 4]
    assert values[groups == 0].amax((1, 2)).tolist() == [1.0] * 5 + [2.0] * 3
    assert values[groups == 1].amax((1, 2)).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_batch_may_mix_timestep_groups():
    module, x, group = _fitted(), torch.randn(7, 5, 4, 4), torch.tensor([3, 0, 1, 1, 2, 0, 3])
    mixed = module(x, group)
    for row in range(7):
        assert torch.equal(module(x[row : row + 1], group[row : row + 1]), mixed[row : row + 1])


def test_segments_are_fitted_and_applied_separately():
    module = ActivationFakeQuantize(2, [3, 2], 1, 1)
    x = torch.cat([torch.randn(64, 3, 4, 4), torch.rand(64, 2, 4, 4) * 100], 1)
    module.enable_observer()
    module(x, torch.zeros(64, dtype=torch.int64))
    module.fit(module.bits)
    assert module.scale[0, 1] > 10 * module.scale[0, 0]
    module.enable_observer(False)
    y = module(x, torch.zeros(64, dtype=torch.int64))
    for part, fitted, s in zip(x.split([3, 2], 1), y.split([3, 2], 1), (0, 1), strict=True):
        low = int(module.low[0, s])
        assert torch.equal(fitted, fake_quantize(part, module.scale[0, s], low, low + 3))


def test_a_group_that_saw_nothing_takes_its_nearest_neighbours_grid():
    module = _fitted(groups=6, seen=(1, 4))
    for group, nearest in ((0, 1), (2, 1), (3, 4), (5, 4)):
        assert torch.equal(module.scale[group], module.scale[nearest])
        assert torch.equal(module.low[group], module.low[nearest])
    assert not torch.equal(module.scale[1], module.scale[4])


def test_nan_and_nothing_are_errors():
    module = ActivationFakeQuantize(4, [2], 2, 1)
    with pytest.raises(RuntimeError, match="no activation was observed"):
        module.fit(module.bits)
    module.enable_observer()
    module.disable_fake_quant()
    module(torch.full((1, 2, 2, 2), float("nan")), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        module.fit(module.bits)


# Timestep groups


@given(st.integers(1, 2000), st.integers(1, 64))
def test_timestep_groups_tile_the_training_timesteps(num_train_timesteps, groups):
    group = timestep_group(torch.arange(num_train_timesteps), groups, num_train_timesteps)
    assert (group >= 0).all()
    assert (group < groups).all()
    assert (group.diff() >= 0).all()
    sizes = torch.bincount(group, minlength=groups)
    assert sizes.sum() == num_train_timesteps
    assert sizes.max() - sizes.min() <= 1


@given(st.integers(1, 2000), st.integers(1, 64), st.integers(-5000, 5000))
def test_timesteps_outside_belong_to_the_nearest_group(num_train_timesteps, groups, timestep):
    nearest = min(max(timestep, 0), num_train_timesteps - 1)
    given_group, nearest_group = (
        timestep_group(torch.tensor([t]), groups, num_train_timesteps) for t in (timestep, nearest)
    )
    assert torch.equal(given_group, nearest_group)
    assert torch.equal(timestep_group(torch.tensor([float(nearest)]), groups, num_train_timesteps), nearest_group)
