"""Weights of samples: probes, alignment, bounds, resuming, and what they do for points that help or harm."""

import copy
import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SHAPE, Small, cosine_scheduler, interrupted
from test_progressive import config, learned, prepared
from torch import nn

from pqcad_ao import CADConfig, PQCADConfig, distill_
from pqcad_ao.diffusion import trajectories
from pqcad_ao.diffusion.calibration import CalibrationSet
from pqcad_ao.diffusion.ddim import DDIMSchedule, reach_of
from pqcad_ao.graph.capture import capture
from pqcad_ao.learn import halving as distilling
from pqcad_ao.learn import progressive as engine
from pqcad_ao.learn import training
from pqcad_ao.learn.reweighing import Reweighing, _finite, held_out
from pqcad_ao.learn.sensitivity import perturbation_loss
from pqcad_ao.learn.weights import LARGEST, LEAST, SampleWeights, agreement, alignment, bounded
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.passes.probes import Probe, insert_probes, take_gradients

SHORT = {"iterations": 12, "window": 1, "weight_ladder": [], "activation_ladder": [], "weight_every": 4}


def samples(count: int, tasks: int = 2, rate: float = 0.5) -> SampleWeights:
    return SampleWeights(torch.arange(count), tasks, rate, 1.0, 0.5)


# The numbers


@settings(max_examples=25)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=200), st.floats(0.05, 20))
def test_weights_are_bounded_and_one_on_average(logits, temperature):
    omega = bounded(torch.tensor(logits), temperature)
    assert omega.min() >= LEAST
    assert omega.max() <= LARGEST
    assert omega.mean().item() == pytest.approx(1, abs=1e-9)
    order = torch.tensor(logits, dtype=torch.float64).argsort()
    assert (omega[order].diff() >= -1e-12).all()


def test_equal_logits_weigh_exactly_one():
    assert torch.equal(bounded(torch.zeros(37), 1.0).float(), torch.ones(37))


@settings(max_examples=15)
@given(st.integers(0, 2**16), st.floats(1e-3, 1e3))
def test_the_loss_unit_moves_no_weight_and_the_order_of_points_follows_them(seed, unit):
    generator = torch.Generator().manual_seed(seed)
    P, G = (torch.randn(n, 6, generator=generator) for n in (8, 2))
    rows, order = torch.arange(8), torch.randperm(8, generator=generator)
    plain, scaled, permuted = samples(8), samples(8), samples(8)
    for weights, of_rows, factor in ((plain, rows, 1.0), (scaled, rows, unit), (permuted, order, 1.0)):
        for task in range(2):
            weights.remember(task, factor * G[task : task + 1], 0.5)
        weights.move(rows, factor * P[of_rows])
    torch.testing.assert_close(scaled.omega, plain.omega, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(permuted.omega, plain.omega[order])


def test_who_serves_both_of_two_opposed_tasks_gains():
    against, both = torch.tensor([[1.0, 0.2], [-1.0, 0.2]]), torch.tensor([[0.0, 1.0]])
    weights = samples(3)
    for task in range(2):
        weights.remember(task, against[task : task + 1], 0.5)
    for _ in range(20):
        weights.move(torch.arange(3), torch.cat([against, both]))
    omega = weights.omega
    assert omega[2] > 1 > omega[0]
    assert omega[0] == pytest.approx(omega[1].item())
    # a product would reward who harms both, too
    assert alignment(-both, against, 1.0) < 0


@settings(max_examples=6)
@given(st.integers(0, 2**16), st.integers(2, 5))
def test_tasks_that_agree_gain_over_the_one_that_is_against_them(seed, agreeing):
    generator = torch.Generator().manual_seed(seed)
    shared, tasks = torch.randn(6, generator=generator), agreeing + 1
    signs = torch.tensor([1.0] * agreeing + [-1.0])[:, None]
    G = signs * shared + 0.1 * torch.randn(tasks, 6, generator=generator)
    slot = torch.arange(tasks).repeat_interleave(4)
    weights = SampleWeights(slot, tasks, 0.5, 1.0, 0.5)
    for task in range(tasks):
        weights.remember(task, G[task : task + 1], 0.5)
    for _ in range(3):
        weights.move(torch.arange(len(slot)), G[slot])
        omega = weights.omega[::4]
        assert omega[:agreeing].min() > 1 > omega[-1]


def test_weights_of_points_turn_the_tasks_gradients_towards_each_other():
    """Half of either task's points pull both to one side, half apart: the cosine rises from 0 with every look."""
    shared, apart = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    P = torch.cat([shared, apart, shared, -apart])  # the first two are of one task, the last two of the other
    weights = SampleWeights(torch.arange(4), 2, 0.5, 1.0, 0.5)
    weights.remember(0, P[:2], 0.5)
    weights.remember(1, P[2:], 0.5)
    cosines = [weights.agreement]
    for _ in range(8):
        weights.move(torch.arange(4), P)
        weighted = weights.omega[:, None] * P
        cosines.append(agreement(torch.stack([weighted[:2].mean(0), weighted[2:].mean(0)])))
    assert cosines[0] == pytest.approx(0, abs=1e-9)
    assert all(later >= earlier for earlier, later in itertools.pairwise(cosines))
    assert cosines[-1] > 0.5


@settings(max_examples=15)
@given(st.integers(0, 2**16), st.integers(2, 6))
def test_learning_itself_ends_where_the_gradients_point_apart(seed, tasks):
    """At the minimum of Σ ω_k L_k the gradients, times their weights, sum to zero, whatever the weights are: they point
    apart, and of equal lengths their mean cosine is -1 / (K - 1)."""
    minima = torch.randn(tasks, tasks + 2, generator=torch.Generator().manual_seed(seed)).double()
    omega = torch.rand(tasks, 1, generator=torch.Generator().manual_seed(seed)).double() + 0.25
    start = minima.mean(0) + 100 * torch.ones(tasks + 2).double()
    end = (omega * minima).sum(0) / omega.sum()  # of the losses ω_k |θ - θ_k|² / 2
    assert agreement(start - minima) > 0.9
    assert agreement(omega * (end - minima)) < 0.1
    corners = torch.eye(tasks).double()
    assert agreement(corners - corners.mean(0)) == pytest.approx(-1 / (tasks - 1))


@settings(max_examples=10)
@given(st.integers(0, 2**16), st.integers(2, 12))
def test_at_rate_zero_every_weight_stays_one(seed, count):
    generator = torch.Generator().manual_seed(seed)
    weights = samples(count, rate=0.0)
    for task in range(2):
        weights.remember(task, torch.randn(3, 6, generator=generator), 0.5)
    weights.move(torch.arange(count), torch.randn(count, 6, generator=generator))
    assert torch.equal(weights.omega, torch.ones(count))


@settings(max_examples=8)
@given(st.integers(0, 2**16))
def test_a_point_whose_gradient_is_noise_falls_below_the_mean(seed):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(40, generator=generator)
    P = shared + 0.5 * torch.randn(8, 40, generator=generator)
    P[3] = 5 * torch.randn(40, generator=generator)
    weights = samples(8)
    for task in range(2):
        weights.remember(task, shared + 0.3 * torch.randn(6, 40, generator=generator), 0.5)
    for _ in range(3):
        weights.move(torch.arange(8), P)
    assert weights.omega.argmin() == 3
    assert weights.omega[3] < 1


@settings(max_examples=8)
@given(st.integers(0, 2**16), st.integers(1, 4))
def test_what_is_kept_of_weights_goes_on_as_they_do(seed, killed_at):
    generator = torch.Generator().manual_seed(seed)
    whole, again = samples(5), samples(5)
    for number in range(5):
        gradients = [torch.randn(5, width, generator=generator) for width in (3, 4)]
        for weights in (whole, again):
            P = weights.joined(gradients, follow=True)
            weights.remember(number % 2, P[:2], 0.5)
            weights.move(torch.arange(5), P)
        if number == killed_at:
            state, again = {name: value.clone() for name, value in again.state().items()}, samples(5)
            again.load(state)
    assert torch.equal(again.omega, whole.omega)
    assert torch.equal(again.gradients, whole.gradients)
    assert torch.equal(again.squares, whole.squares)


@settings(max_examples=10)
@given(st.lists(st.sampled_from([0.0, float("nan"), float("inf")]), min_size=1, max_size=6))
def test_the_first_sample_whose_gradient_is_not_finite_is_named_by_its_timestep(added):
    P, timesteps = torch.ones(len(added), 3), torch.arange(len(added)) * 10
    P[:, 1] += torch.tensor(added)
    batch = CalibrationSet(P, timesteps, {})
    wrong = [row for row, value in enumerate(added) if value != 0]
    if not wrong:
        assert _finite(P, batch) is P
        return
    with pytest.raises(FloatingPointError, match=f"gradient of a sample at timestep {10 * wrong[0]}:"):
        _finite(P, batch)


class Probed(nn.Module):
    """Two layers with probes behind them, of very different gradients at either end of the timesteps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 3)])
        self.probes = nn.ModuleList([Probe(1), Probe(1)])

    def forward(self, x_t: torch.Tensor) -> torch.Tensor:
        for layer, probe in zip(self.layers, self.probes, strict=True):
            x_t = probe(layer(x_t).tanh())
        return x_t


@settings(max_examples=8)
@given(st.integers(0, 2**16), st.integers(1, 5))
def test_a_samples_gradient_is_its_own_whoever_is_beside_it(seed, count):
    graph, x_t = Probed(), torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    plain = x_t
    for layer in graph.layers:
        plain = layer(plain).tanh()

    def gradients(rows: torch.Tensor) -> list[torch.Tensor]:
        graph(rows).square().sum().backward()
        return take_gradients(graph)

    assert torch.equal(graph(x_t), plain)
    take_gradients(graph)
    alone = [torch.cat(parts) for parts in zip(*(gradients(row[None]) for row in x_t), strict=True)]
    for together, one in zip(gradients(x_t), alone, strict=True):
        torch.testing.assert_close(together, one, rtol=1e-4, atol=1e-6)


class Attending(nn.Module):
    """A norm that takes out its shift, and attention, which takes out what is added to every key."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        names = ("to_shift", "to_q", "to_k", "to_v", "to_out")
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
        self.probes = nn.ModuleDict({name: Probe(-1) for name in names})

    def forward(self, x_t: torch.Tensor) -> torch.Tensor:
        layer = {name: nn.Sequential(layer, self.probes[name]) for name, layer in self.layers.items()}
        shifted = x_t + layer["to_shift"](x_t.mean(1))[:, None]
        normed = nn.functional.instance_norm(shifted.transpose(1, 2)).transpose(1, 2)
        attention = nn.functional.scaled_dot_product_attention
        mixed = attention(*(layer[name](normed)[:, None] for name in ("to_q", "to_k", "to_v")))
        return layer["to_out"](mixed[:, 0])


@settings(max_examples=5)
@given(st.integers(0, 2**16), st.sampled_from([({"to_shift", "to_k"}, False), ({"to_k"}, True)]))
def test_layers_that_change_nothing_leave_the_cosines_as_they_are(seed, case):
    """Their gradients are zero but for rounding, which as large as the others' would draw every cosine to zero."""
    (idle, bfloat16), graph = case, Attending(seed)
    if "to_shift" not in idle:
        graph.probes["to_shift"] = nn.Identity()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        y = graph(torch.randn(12, 9, 4, generator=torch.Generator().manual_seed(seed)))
    (y.float() - 1).square().sum().backward()
    names = [name for name, probe in graph.probes.items() if isinstance(probe, Probe)]
    gradients = take_gradients(graph)
    of_all = samples(12).joined(gradients, follow=True)
    of_others = [gradient for name, gradient in zip(names, gradients, strict=True) if name not in idle]
    without = samples(12).joined(of_others, follow=True)
    assert agreement(of_all) == pytest.approx(agreement(without), abs=0.005)
    rows = torch.arange(12) % 2
    tasks = [torch.stack([P[rows == task].mean(0) for task in range(2)]) for P in (of_all, without)]
    torch.testing.assert_close(alignment(of_all, tasks[0], 0.5), alignment(without, tasks[1], 0.5), rtol=0, atol=0.005)


def test_no_task_decides_by_which_measure_gradients_are_compared():
    """The first look: with tasks in the other order, the same cosine."""
    torch.manual_seed(1)
    timesteps = torch.arange(80) * 12
    x_t = torch.randn(80, 3) * (1 + timesteps[:, None] / 100)
    found = []
    for times in (timesteps, 999 - timesteps):
        chosen, graph = PQCADConfig(sample_weights="groups", weight_tasks=2, weight_validation=0.5), Probed()
        reweighing = Reweighing(CalibrationSet(x_t, times, {}), x_t.sin(), chosen, 1000)
        loss = partial(lambda graph, batch, targets: perturbation_loss(graph(batch.x_t), targets), graph)
        found.append(reweighing.look(graph, loss))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_agreement_is_the_mean_cosine_over_pairs():
    G = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    assert agreement(G) == pytest.approx(1 / 3)
    assert agreement(G[:1]) is None


@settings(max_examples=25)
@given(st.integers(2, 500), st.floats(0.01, 0.99), st.integers(0, 99))
def test_some_points_are_held_out_and_never_all(count, share, seed):
    mask = held_out(count, share, seed)
    assert 1 <= mask.sum() < count
    assert torch.equal(mask, held_out(count, share, seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sample_weights": "learned"},
            "sample_weights='learned': allowed are 'uniform', 'groups', 'aligned', 'reach'",
        ),
        ({"weight_temperature": 0}, "weight_temperature"),
        ({"weight_pairs": 1.5}, "weight_pairs"),
        ({"weight_validation": 1}, "weight_validation"),
        ({"weight_tasks": 1}, "weight_tasks"),
        ({"weight_every": 0}, "weight_every"),
        ({"mode": "ptq", "sample_weights": "reach"}, "sample_weights: mode='ptq' learns nothing"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        PQCADConfig(**options)


def test_distillation_takes_groups_alone():
    with pytest.raises(ValueError, match="sample_weights='aligned': allowed are 'uniform', 'groups'"):
        CADConfig(sample_weights="aligned")


def test_reach_is_how_far_a_unit_of_the_prediction_carries():
    schedule = DDIMSchedule.of(cosine_scheduler(), 5)
    x_t, step = torch.randn(5, 1, 2, 2), torch.arange(5)
    moved = schedule.ddim_step(torch.ones_like(x_t), x_t, step) - schedule.ddim_step(torch.zeros_like(x_t), x_t, step)
    torch.testing.assert_close(schedule.reach(step), moved[:, 0, 0, 0], rtol=1e-4, atol=1e-5)
    assert torch.equal(reach_of(cosine_scheduler(), 5, schedule.timesteps[:-1].flip(0)), schedule.reach(step).flip(0))


# Probes


@pytest.mark.slow
def test_probes_change_no_bit_and_tell_samples_apart():
    graph = capture(Small(), SHAPE, {}).graph
    probed = insert_probes(graph)
    x_t, timesteps = torch.randn(3, *SHAPE), torch.tensor([7, 400, 999])

    def by_sample(rows: torch.Tensor) -> torch.Tensor:
        prediction = probed(x_t[rows], timesteps[rows], {})
        assert torch.equal(prediction, graph(x_t[rows], timesteps[rows], {}))
        prediction.square().flatten(1).sum(1).sum().backward()
        return torch.cat(take_gradients(probed), 1)

    together = by_sample(torch.arange(3))
    alone = torch.cat([by_sample(torch.tensor([row])) for row in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert take_gradients(probed) == []
    bias = nn.Parameter(torch.zeros(8))
    model = Small()
    model.join.register_forward_hook(lambda *args: args[2] + bias[:, None, None])
    model(x_t[:1], timesteps[:1]).square().sum().backward()
    assert any(
        torch.allclose(together[0, first : first + 8], bias.grad, rtol=1e-4, atol=1e-5)
        for first in range(together.shape[1] - 7)
    )


# Learning


@pytest.mark.slow
def test_weights_that_do_not_move_leave_the_run_as_it_is():
    chosen = config(**SHORT, sample_weights="aligned", weight_rate=0.0)
    graph, resolved, points = prepared(Small(), chosen)
    still = engine.learn(copy.deepcopy(graph), resolved, points, chosen, 1000)
    kept = points[~held_out(len(points), chosen.weight_validation, chosen.seed)]
    uniform = engine.learn(graph, resolved, kept, config(**SHORT), 1000)
    assert [update.loss for update in still.log] == [update.loss for update in uniform.log]
    state = uniform.graph.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in still.graph.state_dict().items())
    assert all(update.weights == [1.0, 1.0, 1.0] for update in still.log)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aligned", "groups"])
@pytest.mark.parametrize("killed_at", [4, 10])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, kind, killed_at):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 3)
    chosen = config(**SHORT, sample_weights=kind, trainable=["join", "time"], local_weight=0.5)
    whole, _, _ = learned(Small(), chosen)
    with interrupted(engine._Run, killed_at):
        learned(Small(), chosen, folder=tmp_path)
    again, _, _ = learned(Small(), chosen, folder=tmp_path)
    assert again.log == whole.log
    state = whole.graph.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.graph.state_dict().items())
    begun, ended = whole.facts["task_cosine"]
    assert max(abs(begun), abs(ended)) <= 1
    assert whole.log[-1].cosine == ended
    assert any(update.weights[0] < 1 < update.weights[2] for update in whole.log)


@pytest.mark.slow
def test_a_corrupted_point_loses_weight():
    chosen = config(
        **{**SHORT, "iterations": 100, "batch_size": 8}, sample_weights="aligned", mode="fixed", weight_rate=2.0
    )
    graph, resolved, points = prepared(Small(), chosen)
    run = engine._Run(graph, resolved, points, chosen, 1000)
    wrong = torch.tensor([1, 5, 9])
    run.targets[wrong] = 3 * run.targets.std() * torch.randn(run.targets[wrong].shape)
    while len(run.log) < 100:
        run.update()
    assert (run.omega[wrong] < 1).all()


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_names_the_timestep(monkeypatch):
    chosen = config(**SHORT, sample_weights="groups")
    graph, resolved, points = prepared(Small(), chosen)
    run = engine._Run(graph, resolved, points, chosen, 1000)
    original = engine.Reweighing.follow

    def spoiled(self, graph, rows):
        for module in graph.modules():
            if getattr(module, "gradient", None) is not None:
                module.gradient[0] = float("nan")
        return original(self, graph, rows)

    monkeypatch.setattr(engine.Reweighing, "follow", spoiled)
    with pytest.raises(FloatingPointError, match=r"gradient of a sample at timestep \d+"):
        run.update()


@pytest.mark.slow
def test_points_that_reach_far_count_more():
    chosen = config(**SHORT, sample_weights="reach")
    graph, resolved, points = prepared(Small(), chosen)
    reach = reach_of(cosine_scheduler(), chosen.calibration_steps, points.timesteps)
    run = engine._Run(graph, resolved, points, chosen, 1000, reach)
    assert run.omega.mean().item() == pytest.approx(1, abs=1e-5)
    assert (run.omega.argsort() == reach.square().argsort()).float().mean() > 0.5
    entry = run.update()
    assert entry.weights[0] < 1 < entry.weights[2]
    assert entry.cosine is None


def test_a_weighted_loss_is_the_sum_over_the_unweighted_power():
    prediction, reference, omega = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.5, 2.0, 0.5])
    expected = (omega[:, None] * (prediction - reference).square()).sum() / reference.square().sum()
    assert perturbation_loss(prediction, reference, omega) == pytest.approx(expected.item(), rel=1e-5)
    assert perturbation_loss(prediction, reference, torch.ones(3)) == perturbation_loss(prediction, reference)


@pytest.mark.slow
def test_a_students_steps_are_weighted_and_a_killed_run_goes_on(tiny_unet, quantized_unet, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "FARTHEST", float("inf"))  # random weights denoise nothing
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    cad = CADConfig(steps=4, iterations=6, batch_size=4, points=4, sample_weights="groups", weight_rate=5.0)
    whole, again = copy.deepcopy(quantized_unet), quantized_unet
    options = {"progress": False}
    distill_(whole, tiny_unet, cosine_scheduler(), cad, **options)
    original = distilling._Halving.update

    def update(self):
        if len(self.log) == 3:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(distilling._Halving, "update", update)
        with pytest.raises(KeyboardInterrupt):
            distill_(again, tiny_unet, cosine_scheduler(), cad, folder=tmp_path, **options)
    distill_(again, tiny_unet, cosine_scheduler(), cad, folder=tmp_path, **options)
    log = quantized_state(again).distilled
    assert log == quantized_state(whole).distilled
    assert log[-1].weights[0] < 1 < log[-1].weights[2]
    assert log[-1].cosine is not None
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())
