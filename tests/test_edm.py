"""EDM's noise process: its walk, quantizing along it, and timestep groups over the range of c_noise."""

import copy
import warnings

import pytest
import torch
from diffusers import DiTPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler, UNet2DModel
from networks import LEAST_UNET, SHAPE, Small, cosine_scheduler, quick, sqnr
from pipelines import dit
from torch import Tensor

from pqcad_ao import (
    CADConfig,
    cache_,
    correct_,
    distill_,
    export_pt2,
    export_pte,
    load_quantized,
    quantize_,
    save_quantized,
)
from pqcad_ao.denoiser import timestep_group
from pqcad_ao.diffusion.calibration import draw_timesteps
from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.process import as_sampler, read_scheduler, settings_of, span_of
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.state import quantized_state, state_from_dict

EDM = EDMEulerScheduler()
SPAN = (-1.5537, 1.0955)  # ln(0.002) / 4, ln(80) / 4
EIGHT = quick(
    weight_bits=8, activation_bits=8, calibration_timesteps="uniform", calibration_steps=8, calibration_points=64
)


class LogTime(Small):
    """Called with c_noise, of which its activations are a steep function."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = torch.as_tensor(t).reshape(-1).clamp(-3, 3)
        strength = (2 * t).exp().view(-1, 1, 1, 1)
        return super().forward(x * strength, 300 * (t + 2)) / (1 + strength)


def _noise(count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def quantized() -> Small:
    network = LogTime()
    quantize_(network, EIGHT, scheduler=EDM, sample_shape=SHAPE, progress=False)
    return network


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sigma_schedule": "exponential", "prediction_type": "v_prediction", "sigma_max": 20.0},
        {"final_sigmas_type": "sigma_min", "sigma_data": 1.0, "rho": 3.0},
    ],
    ids=["Karras", "exponential, v", "ends in noise"],
)
def test_the_walk_is_diffusers_own_step_by_step(options):
    given, steps, network, seen = EDMEulerScheduler(**options), 6, LogTime(), []
    sampler = as_sampler(given)
    found = sample(network, sampler, _noise(), steps, callback=lambda *call: seen.append(call))
    given.set_timesteps(steps)
    schedule = DDIMSchedule.of(sampler, steps)
    expected, inside = _noise() * given.init_noise_sigma, None
    sign = 1 if given.config.prediction_type == "v_prediction" else -1
    with torch.no_grad():
        for (_, step, at, x_t), timestep in zip(seen, given.timesteps, strict=True):
            scaled = given.scale_model_input(expected, timestep)
            assert at == timestep == schedule.timesteps[step]
            torch.testing.assert_close(x_t, scaled, rtol=1e-5, atol=1e-5)
            inside = scaled if inside is None else inside
            # what the network is given is a walk that preserves variance, and is DDIM's
            torch.testing.assert_close(inside, scaled, rtol=1e-4, atol=1e-4)
            prediction = network(scaled, timestep.repeat(len(x_t)))
            expected = given.step(prediction, timestep, expected).prev_sample
            inside = schedule.ddim_step(sign * prediction, inside, torch.full((len(x_t),), step))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_multistep_scheduler_stands_for_its_process(tmp_path):
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.01, sigma_data=1.5, prediction_type="v_prediction")
    sampler = as_sampler(scheduler)
    scheduler.set_timesteps(5)
    sampler.set_timesteps(5)
    assert type(sampler) is EDMEulerScheduler
    torch.testing.assert_close(sampler.timesteps, scheduler.timesteps)
    assert (sampler.config.sigma_data, sampler.config.prediction_type) == (1.5, "v_prediction")
    assert span_of(scheduler) == span_of(sampler) == pytest.approx((-1.15129, 1.09550), abs=1e-4)
    scheduler.save_pretrained(tmp_path)
    assert dict(read_scheduler(tmp_path).config) == dict(sampler.config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_min": 0.0}, "sigma_min=0.0, sigma_max=80.0, sigma_data=0.5: allowed are numbers above 0"),
        ({"sigma_min": 90.0}, "sigma_min less than sigma_max"),
        ({"sigma_data": -1.0}, "sigma_data=-1.0"),
        ({"prediction_type": "sample"}, "has prediction_type='sample': allowed are epsilon, v_prediction"),
    ],
)
def test_numbers_that_are_no_process_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        as_sampler(EDMDPMSolverMultistepScheduler(**options))


@pytest.mark.parametrize("law", ["uniform", "normal"])
def test_groups_and_the_law_tile_the_span(law):
    drawn = draw_timesteps(4000, SPAN, law, mean=0.5, std=0.4, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert SPAN[0] <= drawn.min() < SPAN[0] + 0.01
    assert SPAN[1] - 0.01 < drawn.max() <= SPAN[1]
    ends = torch.linspace(*SPAN, 6)
    assert timestep_group((ends[:-1] + ends[1:]) / 2, 5, SPAN).tolist() == [0, 1, 2, 3, 4]
    assert timestep_group(torch.tensor([-9.0, *SPAN, 9.0]), 5, SPAN).tolist() == [0, 0, 4, 4]


def test_a_network_is_quantized_in_groups_of_c_noise(quantized):
    state = quantized_state(quantized)
    assert (state.timestep.bounds, state.timestep.process) == (span_of(EDM), "EDM's noise process")
    assert state.timestep.bounds == pytest.approx(SPAN, abs=1e-4)
    EDM.set_timesteps(EIGHT.calibration_steps)
    assert len(timestep_group(EDM.timesteps, 4, state.timestep.span).unique()) == 4
    scales = quantized.first.input_scale
    assert len(scales) == 4
    assert (scales.flatten(1).max(1).values.diff() > 0).all()  # as the activations grow
    reference = LogTime()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        found, expected = (sample(network, EDM, _noise(), 8) for network in (quantized, reference))
        assert sqnr(expected, found) > 25
        for timestep in EDM.timesteps:
            x_t = _noise()
            assert sqnr(reference(x_t, timestep), quantized(x_t, timestep)) > 20


def test_it_is_saved_and_loaded_bit_for_bit(quantized, tmp_path):
    save_quantized(quantized, tmp_path / "network.safetensors")
    again = LogTime()
    load_quantized(again, tmp_path / "network.safetensors")
    assert quantized_state(again).timestep.bounds == span_of(EDM)
    assert sample(again, EDM, _noise(), 5).equal(sample(quantized, EDM, _noise(), 5))
    values = quantized_state(again).to_dict()
    for bounds in ([1.0, -1.0], [0.0], "all", [float("nan"), 1.0], [1, 2]):
        with pytest.raises(ValueError, match="bounds is"):
            state_from_dict({**values, "bounds": bounds})


def test_another_walk_is_a_warning(quantized):
    with pytest.warns(UserWarning, match=r"from -1\.55 to 1\.1 and is called with 1\.73"):
        sample(quantized, EDMEulerScheduler(sigma_max=1000.0), _noise(), 2)
    with pytest.warns(UserWarning, match="quantized for EDM's noise process, and DDIMScheduler walks another"):
        sample(quantized, cosine_scheduler(), _noise(), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized(_noise(), torch.tensor(SPAN[1], dtype=torch.bfloat16))  # as a pipeline rounds it


@pytest.mark.parametrize(
    ("call", "doing"),
    [
        (lambda n, r, p: distill_(n, r, EDM, CADConfig(steps=4), sample_shape=SHAPE), "distillation"),
        (lambda n, r, p: cache_(n, scheduler=EDM, num_inference_steps=4, sample_shape=SHAPE), "cache_"),
        (lambda n, r, p: correct_(n, reference=r, scheduler=EDM, sample_shape=SHAPE), "correct_"),
        (lambda n, r, p: export_pt2(n, p / "n.pt2", sample_shape=SHAPE), "a package"),
        pytest.param(
            lambda n, r, p: export_pte(n, p / "n.pte", scheduler=EDM, sample_shape=SHAPE),
            "a program with the sampler",
            marks=pytest.mark.slow,  # ExecuTorch is imported
        ),
    ],
    ids=["distill_", "cache_", "correct_", "export_pt2", "export_pte"],
)
def test_what_is_not_made_for_it_is_said(quantized, call, doing, tmp_path):
    with pytest.raises(ValueError, match=f"^{doing}.* is not for networks of EDM's noise process, .*is quantized"):
        call(quantized, LogTime(), tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_folder_holds_network_and_scheduler(tmp_path):
    unet = UNet2DModel(**LEAST_UNET).eval()
    quantize_(unet, EIGHT, scheduler=EDM, progress=False)
    save_model(unet, EDM, tmp_path / "model")
    again, scheduler = load_model(tmp_path / "model")
    assert type(scheduler) is EDMEulerScheduler
    assert settings_of(scheduler) == settings_of(EDM)
    assert sample(again, scheduler, _noise(), 4).equal(sample(unet, EDM, _noise(), 4))


@pytest.mark.slow
def test_compiled_it_samples_the_same(quantized):
    compiled = torch.compile(copy.deepcopy(quantized), backend="pqcad")
    assert sqnr(sample(quantized, EDM, _noise(), 4), sample(compiled, EDM, _noise(), 4)) > 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "learning"),
    [
        (EDMEulerScheduler, {}),
        (
            EDMDPMSolverMultistepScheduler,
            {"mode": "fixed", "iterations": 2, "learning_points": 16, "sample_weights": "reach"},
        ),
    ],
)
def test_a_pipeline_is_quantized_along_its_own_walk(scheduler, learning):
    pipeline = dit()
    pipeline = DiTPipeline(pipeline.transformer, pipeline.vae, scheduler())
    config = quick(weight_bits=8, activation_bits=8, calibration_timesteps="uniform", **learning)
    call = {"class_labels": [1, 2], "guidance_scale": 1.0, "num_inference_steps": 4, "output_type": "np"}
    expected = _drawn(pipeline, call)
    quantize_(pipeline, config, call={"class_labels": [0, 1, 2, 3], "guidance_scale": 1.0}, progress=False)
    assert quantized_state(pipeline.transformer).timestep.bounds == span_of(EDM)
    assert sqnr(expected, _drawn(pipeline, call)) > 25


def _drawn(pipeline: DiTPipeline, call: dict) -> Tensor:
    return torch.from_numpy(pipeline(**call, generator=torch.Generator().manual_seed(0)).images)
