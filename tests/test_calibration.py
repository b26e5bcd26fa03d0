"""C_QC: the law of its timesteps, and that every x_t really is a trajectory's at its timestep."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.configuration_utils import FrozenDict
from hypothesis import given
from hypothesis import strategies as st
from networks import SHAPE, Small, cosine_scheduler, quick
from torch import nn

from pqcad_ao.diffusion import calibration
from pqcad_ao.diffusion.calibration import SAMPLES, CalibrationSet, calibration_set, draw_timesteps, observed
from pqcad_ao.diffusion.process import find_scheduler, settings_of
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.graph.capture import Capture, capture
from pqcad_ao.graph.plan import resolve
from pqcad_ao.learn.ptq import calibrate, prepare
from pqcad_ao.prepare.observe import activation_quantizers

# The law


@given(
    st.integers(1, 300),
    st.integers(1, 2000),
    st.sampled_from(["normal", "uniform"]),
    st.floats(0, 1),
    st.floats(1e-3, 10),
    st.integers(0, 100),
)
def test_draws_are_whole_truncated_and_repeatable(count, num_train_timesteps, law, mean, std, seed):
    def draw():
        generator = torch.Generator().manual_seed(seed)
        return draw_timesteps(count, num_train_timesteps, law, mean=mean, std=std, generator=generator)

    drawn = draw()
    assert drawn.shape == (count,)
    assert drawn.dtype == torch.int64
    assert drawn.min() >= 0
    assert drawn.max() < num_train_timesteps
    assert torch.equal(draw(), drawn)


@pytest.mark.parametrize(("mean", "std"), [(0.4, 0.4), (0.5, 0.1), (1.0, 0.3), (0.0, 0.2)])
def test_the_normal_law_has_the_truncated_normals_histogram(mean, std):
    generator = torch.Generator().manual_seed(0)
    drawn = draw_timesteps(40_000, 1000, "normal", mean=mean, std=std, generator=generator)

    def cdf(x):
        return 0.5 * (1 + math.erf((x - mean) / (std * math.sqrt(2))))

    edges = [k / 10 for k in range(11)]
    expected = torch.tensor([cdf(b) - cdf(a) for a, b in pairwise(edges)]) / (cdf(1) - cdf(0))
    histogram = torch.histc(drawn.float(), 10, 0, 1000) / len(drawn)
    assert (histogram - expected).abs().max() < 0.01


def test_the_uniform_law_is_uniform():
    drawn = draw_timesteps(40_000, 1000, "uniform", mean=0.4, std=0.4, generator=torch.Generator().manual_seed(0))
    assert (torch.histc(drawn.float(), 10, 0, 1000) / len(drawn) - 0.1).abs().max() < 0.01


# The set


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_every_point_lies_on_a_trajectory_of_the_network(tiny_unet, scheduler, law):
    """Walked again from the same noise: each x_t is a trajectory's state at its timestep, and none is used twice."""
    config = quick(mode="fixed", learning_points=40, calibration_steps=5, calibration_timesteps=law)
    points = calibration_set(tiny_unet, scheduler, SHAPE, config)
    assert points.x_t.shape == (40, *SHAPE)
    assert points.timesteps.shape == (40,)
    states, first_noise = {}, []

    def keep(first, step, timestep, x_t):
        if step == 0:
            first_noise.append(x_t)
        states.setdefault(int(timestep), []).append(x_t)

    generator = torch.Generator().manual_seed(config.seed)
    drawn = draw_timesteps(40, 1000, law, mean=0.4, std=0.4, generator=generator)
    scheduler.set_timesteps(5)
    nearest = scheduler.timesteps[(drawn[:, None] - scheduler.timesteps[None]).abs().argmin(1)]
    assert torch.equal(points.timesteps, nearest)
    trajectories = int(torch.bincount(nearest).max())
    noise = torch.randn(trajectories, *SHAPE, generator=generator)
    sample(tiny_unet, scheduler, noise, 5, batch_size=config.calibration_batch_size, callback=keep)
    used = set()
    for x_t, timestep in zip(points.x_t, points.timesteps.tolist(), strict=True):
        walked = torch.cat(states[timestep])
        (matches,) = (walked == x_t).flatten(1).all(1).nonzero(as_tuple=True)
        assert len(matches) == 1
        used.add((timestep, int(matches)))
    assert len(used) == 40


@given(st.lists(st.integers(0, 99), min_size=1, max_size=200), st.integers(1, 12))
def test_the_first_of_each_group_are_observed(timesteps, groups):
    seen, expected = dict.fromkeys(range(groups), 0), []
    for timestep in timesteps:
        seen[timestep * groups // 100] += 1
        expected.append(seen[timestep * groups // 100] <= SAMPLES)
    assert observed(torch.tensor(timesteps), groups, 100).tolist() == expected


def test_what_is_not_observed_changes_no_grid(tiny_unet, scheduler):
    """Fitted to all points of a set that learns and to those that are observed alone, every grid is the same."""
    config = quick(mode="fixed", learning_points=200, calibration_points=200, calibration_steps=5)
    points = calibration_set(tiny_unet, scheduler, SHAPE, config)
    chosen = observed(points.timesteps, config.timestep_groups, 1000)
    assert chosen.sum() < 0.5 * len(points)
    captured = capture(tiny_unet, SHAPE, {})
    resolved = resolve(captured, tiny_unet, config)
    grids = []
    for some in (points, points[chosen]):
        again = Capture(copy.deepcopy(captured.graph), captured.x_t, captured.timesteps)
        graph = prepare(again, resolved, config, 1000)
        calibrate(graph, resolved, some, config, progress=False)
        grids.append(activation_quantizers(graph))
    for fqn, module in grids[0].items():
        assert torch.equal(module.low, grids[1][fqn].low)
        torch.testing.assert_close(module.scale, grids[1][fqn].scale, rtol=1e-4, atol=0)


def test_without_learning_nobody_walks_where_nothing_is_observed(tiny_unet, scheduler):
    sizes = {"calibration_steps": 5, "timestep_groups": 5, "calibration_timesteps": "uniform"}
    config, walked = quick(calibration_points=200, **sizes), []
    points = calibration_set(tiny_unet, scheduler, SHAPE, config, callback=lambda *done: walked.append(done))
    assert len(points) == 5 * SAMPLES
    assert walked[-1] == ("trajectories", SAMPLES, SAMPLES)
    learning = quick(mode="fixed", learning_points=200, **sizes)
    assert len(calibration_set(tiny_unet, scheduler, SHAPE, learning)) == 200


def test_the_set_is_decided_by_its_seed(tiny_unet, scheduler):
    first, again, other = (calibration_set(tiny_unet, scheduler, SHAPE, quick(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.x_t, again.x_t)
    assert torch.equal(first.timesteps, again.timesteps)
    assert not torch.equal(first.x_t, other.x_t)


def test_one_point(tiny_unet, scheduler):
    points = calibration_set(tiny_unet, scheduler, SHAPE, quick(calibration_points=1))
    assert len(points) == 1
    assert points.x_t.isfinite().all()


def test_the_network_is_walked_in_evaluation_mode_and_put_back(scheduler):
    model = Small().train()
    model.norm.eval()
    calls = []
    model.down.register_forward_hook(lambda module, *_: calls.append(module.training))
    calibration_set(model, scheduler, SHAPE, quick())
    assert calls
    assert not any(calls)
    assert (model.training, model.down.training, model.norm.training) == (True, True, False)


def test_batches_cover_every_point_once():
    x_t, timesteps = torch.randn(7, *SHAPE), torch.arange(7)
    points = CalibrationSet(x_t, timesteps, {"label": torch.arange(7), "nested": {"more": torch.arange(7)}})
    batches = list(points.batches(3))
    assert [len(x) for x, _, _ in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([x for x, _, _ in batches]), x_t)
    assert torch.cat([t for _, t, _ in batches]).tolist() == list(range(7))
    assert torch.cat([c["nested"]["more"] for _, _, c in batches]).tolist() == list(range(7))


def test_conditioning_belongs_to_its_trajectory(scheduler):
    """The network writes its label into the image, so a point's x_t tells which label walked there."""

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x, t, nested):
            return self.gain * nested["label"][:, None, None, None].expand_as(x)

    scheduler = DDIMScheduler(prediction_type="sample", timestep_spacing="trailing", clip_sample=False)
    nested = {"nested": {"label": torch.tensor([-30.0, 0.0, 30.0])}}
    config = quick(mode="fixed", learning_points=30, calibration_mean=0.0, calibration_std=0.2)
    points = calibration_set(Writing(), scheduler, SHAPE, config, nested)
    label = points.conditioning["nested"]["label"]
    assert label.unique().tolist() == [-30, 0, 30]
    late = points.timesteps < 300
    assert late.sum() > 10
    assert ((points.x_t.mean((1, 2, 3)) / 10).round().sign()[late] == label.sign()[late]).all()


def test_a_trajectory_that_explodes_is_an_error(tiny_unet, scheduler):
    with torch.no_grad():
        tiny_unet.conv_out.weight.fill_(1e38)
    with pytest.raises(FloatingPointError, match=r"left the finite numbers .* \(v_prediction, squaredcos_cap_v2\)"):
        calibration_set(tiny_unet, scheduler, SHAPE, quick())


def test_nan_inside_the_network_is_an_error_that_names_the_layer():
    model, config = Small(), quick()
    captured = capture(model, SHAPE, {})
    resolved = resolve(captured, model, config)
    graph = prepare(captured, resolved, config, 1000)
    x_t = torch.randn(8, *SHAPE)
    x_t[3, 0, 2, 2] = float("nan")
    points = CalibrationSet(x_t, torch.arange(8), {})
    with pytest.raises(FloatingPointError, match="NaN or infinite activations at the input of first while"):
        calibrate(graph, resolved, points, config, progress=False)


# Schedulers


def test_a_schedulers_settings_are_the_same_in_every_process():
    """diffusers keeps the names of defaults in the order of a set."""
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    other = DDIMScheduler.from_config(scheduler.config)
    assert other.config._use_default_values
    other._internal_dict = FrozenDict(
        {**other.config, "_use_default_values": sorted(other.config._use_default_values)[::-1]}
    )
    assert settings_of(scheduler) == settings_of(other)
    assert settings_of(scheduler) != settings_of(DDIMScheduler(beta_schedule="linear"))


def test_epsilon_from_no_signal_is_refused(tiny_unet):
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="at timestep 999 the schedule has no signal"):
        calibration_set(tiny_unet, scheduler, SHAPE, quick())


def test_finding_the_scheduler_beside_a_network(tiny_unet, tmp_path):
    assert find_scheduler(tiny_unet) is None
    assert find_scheduler(Small()) is None
    for unet_dir, scheduler_dir in (("a/unet", "a/scheduler"), ("b", "b/scheduler"), ("c", "c")):
        tiny_unet.save_pretrained(tmp_path / unet_dir)
        cosine_scheduler().save_pretrained(tmp_path / scheduler_dir)
        found = find_scheduler(UNet2DModel.from_pretrained(tmp_path / unet_dir))
        assert found is not None
        assert found.config.prediction_type == "v_prediction"
        assert torch.equal(found.alphas_cumprod, cosine_scheduler().alphas_cumprod)


# The cache


def _count_walks(monkeypatch) -> list:
    walks = []
    original = calibration.sample

    def counted(*args, **options):
        walks.append(len(args[2]))
        return original(*args, **options)

    monkeypatch.setattr(calibration, "sample", counted)
    return walks


def _points(folder, model=None, scheduler=None, **options):
    config = quick(mode="fixed", learning_points=64, calibration_batch_size=4, **options)
    return calibration_set(model or Small(), scheduler or cosine_scheduler(), SHAPE, config, folder=folder)


def test_what_was_walked_is_not_walked_again(tmp_path, monkeypatch):
    fresh = _points(None)
    first = _points(tmp_path)
    walks = _count_walks(monkeypatch)
    again = _points(tmp_path)
    assert walks == []
    for points in (first, again):
        assert torch.equal(points.x_t, fresh.x_t)
        assert torch.equal(points.timesteps, fresh.timesteps)


def test_whatever_the_points_depend_on_makes_a_file_of_its_own(tmp_path, monkeypatch):
    _points(tmp_path)
    walks = _count_walks(monkeypatch)
    others = [{"seed": 1}, {"calibration_steps": 5}, {"calibration_timesteps": "uniform"}, {"calibration_std": 0.3}]
    others += [{"model": Small(seed=1)}, {"scheduler": DDIMScheduler(prediction_type="v_prediction")}]
    for count, options in enumerate(others):
        walked = len(walks)
        _points(tmp_path, **options)
        assert len(walks) > walked, options
        assert len(list(tmp_path.glob("c_qc-*.safetensors"))) == count + 2
    walked = len(walks)
    _points(tmp_path, weight_bits=3)
    assert len(walks) == walked, "bits do not matter to the trajectories"


def test_several_processes_walk_what_one_does(tmp_path, monkeypatch):
    counted = _count_walks(monkeypatch)
    expected, parts = _points(None), []
    alone = sorted(counted)
    monkeypatch.setattr(calibration, "fill_in", lambda x_t: parts.append(x_t.clone()))
    monkeypatch.setattr(calibration, "wait_for_all", lambda: None)
    config = quick(mode="fixed", learning_points=64, calibration_batch_size=4)
    counted.clear()
    for rank in (2, 1, 0):
        found = calibration_set(Small(), cosine_scheduler(), SHAPE, config, folder=tmp_path, share=(rank, 3))
        assert torch.equal(found.timesteps, expected.timesteps)
    assert torch.equal(sum(parts), expected.x_t)
    assert all(part.any() for part in parts)
    assert sorted(counted) == alone  # each batch was walked by one of them
    # the first one leaves the file that a process alone looks for, and no parts
    assert [path.name.count(".") for path in tmp_path.iterdir()] == [1]


def test_a_process_that_was_killed_goes_on_with_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(calibration, "fill_in", lambda x_t: None)
    monkeypatch.setattr(calibration, "wait_for_all", lambda: None)
    config = quick(mode="fixed", learning_points=64, calibration_batch_size=2)
    given = (Small(), cosine_scheduler(), SHAPE, config)
    expected = calibration_set(*given, share=(1, 2))
    with monkeypatch.context() as patch:
        walks, original = [], calibration.sample

        def killed(*args, **options):
            if len(walks) == 2:
                raise KeyboardInterrupt
            walks.append(1)
            return original(*args, **options)

        patch.setattr(calibration, "sample", killed)
        with pytest.raises(KeyboardInterrupt):
            calibration_set(*given, share=(1, 2), folder=tmp_path)
    counted = _count_walks(monkeypatch)
    assert torch.equal(calibration_set(*given, share=(1, 2), folder=tmp_path).x_t, expected.x_t)
    again = len(counted)
    counted.clear()
    calibration_set(*given, share=(1, 2))
    assert len(counted) == again + 2


def test_a_walk_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    fresh = _points(None)
    monkeypatch.setattr(calibration, "SAVE_EVERY_S", -1.0)
    original, walks = calibration.sample, []

    def killed(*args, **options):
        if len(walks) == 2:
            raise KeyboardInterrupt
        walks.append(1)
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "sample", killed)
        with pytest.raises(KeyboardInterrupt):
            _points(tmp_path)
    later = _count_walks(monkeypatch)
    points = _points(tmp_path)
    whole = -(-int(torch.bincount(fresh.timesteps).max()) // 4)
    assert len(later) == whole - 2
    assert torch.equal(points.x_t, fresh.x_t)


def test_a_damaged_cache_is_named(tmp_path):
    _points(tmp_path)
    (file,) = tmp_path.glob("c_qc-*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is damaged .* delete it"):
        _points(tmp_path)
