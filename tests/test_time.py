"""What a quantized network knows of its time: its process, the scale it is called with, and the sampler's clipping."""

import copy
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
from networks import SHAPE, Plain, Small, cosine_scheduler, quick, sqnr
from torch import Tensor

from pqcad_ao import (
    CADConfig,
    PQCADConfig,
    PTESampler,
    distill_,
    export_pt2,
    export_pte,
    load_pt2,
    load_quantized,
    plan,
    quantize_,
    save_quantized,
)
from pqcad_ao.denoiser import predict, set_time_scale
from pqcad_ao.diffusion.process import as_sampler
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.nn.state import quantized_state, state_from_dict

FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
EIGHT = quick(weight_bits=8, activation_bits=8)


class UnitTime(Small):
    """Called with a time from 0 to 1, on which its activations hang."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = torch.as_tensor(t).reshape(-1)
        return super().forward(x * (1 + 20 * t.view(-1, 1, 1, 1)), 1000 * t) / 20


def _noise(count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def _equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def _again(network: torch.nn.Module, fresh: torch.nn.Module, tmp_path) -> torch.nn.Module:
    save_quantized(network, tmp_path / "network.safetensors")
    load_quantized(fresh, tmp_path / "network.safetensors")
    return fresh


@pytest.fixture(scope="module")
def values_of_a_flow() -> dict[str, Any]:
    network = Plain()
    quantize_(network, quick(), scheduler=FLOW, sample_shape=SHAPE, progress=False)
    return quantized_state(network).to_dict()


# Schedulers


@pytest.mark.parametrize(
    "kind",
    [
        EulerDiscreteScheduler,
        pytest.param(UniPCMultistepScheduler, marks=pytest.mark.slow),
        pytest.param(DPMSolverMultistepScheduler, marks=pytest.mark.slow),
    ],
)
def test_a_pipelines_scheduler_calibrates_on_its_process(kind):
    scheduler = kind(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    first, second = Small(), Small()
    quantize_(first, quick(), scheduler=scheduler, sample_shape=SHAPE, progress=False)
    quantize_(second, quick(), scheduler=as_sampler(scheduler), sample_shape=SHAPE, progress=False)
    assert _equal(first, second)
    assert sample(first, scheduler, _noise(), 4).isfinite().all()  # at fractions of timesteps, too


def test_a_sampler_that_clips_otherwise_is_named(tmp_path):
    """Clipped images are others, and so are the activations."""
    network, clips = Small(), DDIMScheduler(clip_sample=True)
    quantize_(network, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    fresh = _again(network, Small(), tmp_path)
    for each in (network, fresh):
        with pytest.warns(UserWarning, match=r"this sampler clips x_0 to ±1, .* calibrated on does not clip x_0"):
            sample(each, clips, _noise(), 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            sample(each, cosine_scheduler(), _noise(), 2)
            sample(each, EulerDiscreteScheduler(), _noise(), 2)
    clipped = Small()
    quantize_(clipped, quick(), scheduler=clips, sample_shape=SHAPE, progress=False)
    with pytest.warns(UserWarning, match=r"this sampler does not clip x_0, .* clips x_0 to ±1"):
        sample(clipped, UniPCMultistepScheduler(), _noise(), 2)


# Flows


def test_a_flow_is_quantized_saved_and_sampled(tmp_path):
    network, reference = Small(), Small()
    quantize_(network, EIGHT, scheduler=FLOW, sample_shape=SHAPE, progress=False)
    noise = _noise()
    expected, found = (sample(each, FLOW, noise, 6) for each in (reference, network))
    assert sqnr(expected, found) > 30
    fresh = _again(network, Small(), tmp_path)
    assert torch.equal(sample(fresh, FLOW, noise, 6), found)
    with torch.no_grad():
        assert network(noise, torch.tensor(1000.0)).isfinite().all()  # where a flow begins
    with pytest.raises(ValueError, match="timestep 1001: this network takes those from 0 to 1000"):
        network(noise, torch.tensor(1001.0))
    with pytest.raises(
        ValueError, match="quantized for a rectified flow, and DDIMScheduler walks a DDPM noise process"
    ):
        export_pt2(network, tmp_path / "network.pt2", scheduler=DDIMScheduler(), sample_shape=SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [{}, {"num_inference_steps": 6, "batch_size": 2}], ids=["any steps", "bound"])
def test_a_package_of_a_flow(bound, tmp_path):
    network = Small()
    quantize_(network, quick(), scheduler=FLOW, sample_shape=SHAPE, progress=False)
    package = load_pt2(export_pt2(network, tmp_path / "network.pt2", scheduler=FLOW, sample_shape=SHAPE, **bound))
    assert package.scheduler.config.shift == 3
    assert sqnr(sample(network, FLOW, _noise(), 6), package.sample(_noise(), 6)) > 60
    with pytest.raises(ValueError, match="timestep 1001"):
        package(_noise(2), 1001.0)


@pytest.mark.parametrize("renoised", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_flow_learns_to_halve_its_steps(renoised, tmp_path):
    student, reference = Small(), Small()
    quantize_(student, EIGHT, scheduler=FLOW, sample_shape=SHAPE, progress=False)
    config = CADConfig(
        steps=8, iterations=40, batch_size=8, points=8, check_betas=False, learning_rate=2e-3, renoised=renoised
    )
    noise = _noise(16)
    goal = sample(reference, FLOW, noise, 64)
    before = sqnr(goal, sample(student, FLOW, noise, 4))
    sampler = distill_(student, reference, FLOW, config, sample_shape=SHAPE, progress=False)
    assert sqnr(goal, sample(student, sampler, noise, 4)) > before
    fresh = _again(student, Small(), tmp_path)
    known = quantized_state(fresh).timestep.schedule
    assert known == quantized_state(student).timestep.schedule
    sampler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # as a pipeline walks, with its own rounding
    assert known == sampler.timesteps.tolist()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        sample(fresh, sampler, noise, 4)
        for timestep in sampler.timesteps.to(torch.bfloat16):
            fresh(noise, timestep)
    with pytest.warns(UserWarning, match="was distilled for the timesteps"):
        sample(fresh, sampler, noise, 5)
    with pytest.warns(UserWarning, match="is asked for 800"), torch.no_grad():
        fresh(noise, torch.tensor(800.0))


def test_another_process_is_named():
    network = Plain()
    quantize_(network, quick(), scheduler=FLOW, sample_shape=SHAPE, progress=False)
    with pytest.warns(UserWarning, match="was quantized for a rectified flow, and DDIMScheduler walks another"):
        sample(network, DDIMScheduler(), _noise(), 2)
    with pytest.raises(ValueError, match="the student was quantized for a rectified flow"):
        distill_(network, Plain(), cosine_scheduler(), CADConfig(steps=2), sample_shape=SHAPE)


# The scale of time


@pytest.mark.parametrize(
    "scheduler", [cosine_scheduler(), pytest.param(FLOW, marks=pytest.mark.slow)], ids=["DDPM", "flow"]
)
def test_a_network_whose_time_is_from_0_to_1_has_scales_for_each_group(scheduler, tmp_path):
    network, reference = UnitTime(), UnitTime()
    quantize_(network, EIGHT, scheduler=scheduler, sample_shape=SHAPE, time_scale=1 / 1000, progress=False)
    t, x = torch.tensor([0.02, 0.3, 0.6, 0.95]), _noise()
    with torch.no_grad():
        found = network(x, t)
        assert sqnr(reference(x, t), found) > 25
        assert torch.equal(predict(network, x, (1000 * t).round()), found)  # our calls are in the scheduler's timesteps
        assert torch.equal(_again(network, UnitTime(), tmp_path)(x, t), found)
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, t), found)
    with pytest.raises(ValueError, match="timestep 7: this network takes those from 0 to 1, which"):
        network(x, torch.tensor(7.0))


def test_whole_timesteps_are_found_again_in_their_fractions():
    """k / 1000 · 1000 is now and then just below k, and in another group."""
    network, seen = UnitTime(), []
    quantize_(network, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, time_scale=1 / 1000, progress=False)
    state = quantized_state(network).timestep
    network.first.register_forward_pre_hook(lambda *_: seen.append(state.call.group))
    with torch.no_grad():
        network(_noise(1).expand(1000, -1, -1, -1), torch.arange(1000) / 1000)
    assert torch.equal(seen[0], torch.arange(1000) * state.groups // 1000)


@pytest.mark.slow
def test_a_student_tells_its_reference_the_scale_of_time():
    student, reference = UnitTime(), UnitTime()
    quantize_(student, EIGHT, scheduler=FLOW, sample_shape=SHAPE, time_scale=1 / 1000, progress=False)
    config = CADConfig(steps=2, iterations=1, batch_size=2, points=2, check_betas=False)
    distill_(student, reference, FLOW, config, sample_shape=SHAPE, progress=False)
    assert quantized_state(student).timestep.time_scale == 1 / 1000


@pytest.mark.parametrize("wrong", [0, -1, 1000, "1", True, float("nan")])
def test_a_wrong_scale_is_an_error(wrong):
    with pytest.raises(ValueError, match=r"time_scale=.*: allowed are numbers above 0, up to 1"):
        plan(Small(), quick(), sample_shape=SHAPE, time_scale=wrong)


def test_fractions_from_the_start_are_warned_of_once():
    network, x = Plain(), _noise(2)
    quantize_(network, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    late = copy.deepcopy(network)
    with torch.no_grad():
        network(x, torch.tensor(0.9))
        with pytest.warns(UserWarning, match=r"called with 0.8: .* write quantize_\(..., time_scale=1 / 1000\)"):
            network(x, torch.tensor([0.8, 0.4]))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            network(x, torch.tensor(0.7))
            for timestep in (500.5, 0.5, 0.25):  # the end of a walk
                late(x, torch.tensor(timestep))
            late(x, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"continuous": 1},
        {"time_scale": 0.0},
        {"time_scale": "1"},
        {"time_scale": 2.0},
        {"clip": -1.0},
        {"clip": float("inf")},
        {"clip": "1"},
        {"schedule": [1000.0, 500.0, 0.0]},
        {"schedule": [500.0, 1000.0]},
        {"schedule": [1001.0]},
        {"schedule": []},
    ],
    ids=str,
)
def test_a_damaged_time_is_named(change, values_of_a_flow):
    assert state_from_dict(values_of_a_flow).timestep.continuous
    with pytest.raises(ValueError, match="the checkpoint's quantization config is damaged"):
        state_from_dict({**values_of_a_flow, **change})


@pytest.mark.slow
def test_a_flow_learns_its_bits():
    network, reference = UnitTime(), UnitTime()
    config = PQCADConfig.fast(iterations=40, batch_size=4, learning_points=16, calibration_steps=4, timestep_groups=4)
    quantize_(network, config, scheduler=FLOW, sample_shape=SHAPE, time_scale=1 / 1000, progress=False)
    set_time_scale(reference, 1 / 1000)
    assert sqnr(sample(reference, FLOW, _noise(), 4), sample(network, FLOW, _noise(), 4)) > 5


@pytest.mark.slow
def test_programs_are_called_with_the_schedulers_timesteps(tmp_path):
    network, scheduler = UnitTime(), cosine_scheduler()
    quantize_(network, EIGHT, scheduler=scheduler, sample_shape=SHAPE, time_scale=1 / 1000, progress=False)
    expected = sample(network, scheduler, _noise(2), 4)
    given = {"scheduler": scheduler, "num_inference_steps": 4, "batch_size": 2, "sample_shape": SHAPE}
    export_pte(network, tmp_path / "network.pte", **given, progress=False)
    assert sqnr(expected, PTESampler(tmp_path / "network.pte").sample(_noise(2))) > 60
    export_pt2(network, tmp_path / "network.pt2", **given)
    assert sqnr(expected, load_pt2(tmp_path / "network.pt2").sample(_noise(2))) > 60
    export_pt2(network, tmp_path / "any.pt2", sample_shape=SHAPE)
    with torch.no_grad():
        found = load_pt2(tmp_path / "any.pt2")(_noise(2), torch.tensor([500, 20]))
        assert sqnr(network(_noise(2), torch.tensor([0.5, 0.02])), found) > 60
