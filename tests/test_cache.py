"""Feature caching end to end: measured, followed by samplers and pipelines, saved, compiled, and what is refused."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from networks import SHAPE, TINY_TEXT_UNET, TINY_UNET, Plain, Small, cosine_scheduler, quick, sqnr
from torch import Tensor, nn

from pqcad_ao import CacheConfig, CachedUNet, CachePlan, CADConfig, cache_, distill_, quantize_
from pqcad_ao.denoiser import predict
from pqcad_ao.diffusion import trajectories
from pqcad_ao.diffusion.cache_plan import attach_cache_plan, cache_plan
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.files import load_quantized, save_quantized

STEPS = 6
GIVEN: dict[str, Any] = {"scheduler": cosine_scheduler(), "num_inference_steps": STEPS, "progress": False}


def measured(unet: nn.Module, config: CacheConfig | None = None, **options: Any) -> CachePlan:
    return cache_(unet, config or CacheConfig(points=4), **{**GIVEN, **options})


def noise(count: int = 4, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


def drawn(unet: Any, **options: Any) -> Tensor:
    return sample(unet, cosine_scheduler(), noise(), STEPS, **options)


@pytest.fixture
def cached(small: Small) -> CachedUNet:
    measured(small, sample_shape=SHAPE)
    return CachedUNet(small)


def test_it_samples_what_it_did_before_where_every_step_is_full(small: Small):
    plan = measured(small, CacheConfig(interval=1, points=2), sample_shape=SHAPE)
    assert plan.refresh == plan.timesteps
    assert plan.mean_macs == plan.full_macs
    assert torch.equal(drawn(CachedUNet(small)), drawn(small))


def test_samplers_that_take_turns_and_batches_change_nothing(cached: CachedUNet):
    whole, others = drawn(cached), []

    def meanwhile(first: int, step: int, timestep: Tensor, x_t: Tensor) -> None:
        if step == 3:
            others.append(sample(cached, cosine_scheduler(), -noise(), STEPS))

    assert not torch.equal(whole, drawn(cached.unet))  # it does take features
    assert torch.equal(drawn(cached, callback=meanwhile, batch_size=2), whole)
    assert torch.equal(others[0], sample(cached, cosine_scheduler(), -noise(), STEPS))


def test_called_as_a_network_it_draws_the_same(cached: CachedUNet):
    """As a pipeline calls it, one timestep for all, and walk after walk."""
    for _ in range(2):
        x_t, scheduler = noise(), cosine_scheduler()
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            x_t = scheduler.step(cached(x_t, t), t, x_t).prev_sample
        torch.testing.assert_close(x_t, drawn(cached), rtol=0, atol=1e-5)  # other memory formats, other last bits


@pytest.mark.slow
def test_the_line_brings_features_nearer(small: Small):
    """In closed loop, on other noise than it was fitted on; a wrong table takes them away."""
    error = {}
    for correction in ("none", "channel"):
        measured(small, CacheConfig(points=32, correction=correction), sample_shape=SHAPE)
        plan, cached = cache_plan(small), CachedUNet(small)
        assert plan is not None
        error[correction] = (drawn(cached) - drawn(small)).square().mean()
    assert error["channel"] < error["none"]


def test_another_schedule_is_computed_in_full_and_said(cached: CachedUNet):
    with pytest.warns(UserWarning, match="measured for 6 timesteps, 999 to 166, and is asked for others"):
        images = sample(cached, cosine_scheduler(), noise(), 5)
    assert torch.equal(images, sample(cached.unet, cosine_scheduler(), noise(), 5))


def test_a_batch_of_several_timesteps_is_computed_in_full(cached: CachedUNet):
    x_t, t = noise(), torch.tensor([999, 832, 832, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(cached(x_t, t), cached.unet(x_t, t))


def test_a_walk_that_was_broken_off_spoils_none_after_it(cached: CachedUNet):
    timesteps = [999, 832, 666]
    cached(noise(), timesteps[0])
    with pytest.warns(UserWarning, match="another walk through the schedule begins .* call forget"):
        cached(-noise(), timesteps[0])
    assert torch.equal(cached(noise(), timesteps[1]), cached.unet(noise(), timesteps[1]))
    cached.forget()
    cached(noise(), timesteps[0])
    assert not torch.equal(cached(noise(), timesteps[1]), cached.unet(noise(), timesteps[1]))


def test_a_walk_that_begins_where_another_was_broken_off_takes_nothing_of_it(cached: CachedUNet):
    other = noise().flip(0)
    cached(noise(), 999)
    with pytest.warns(UserWarning, match="not what a sampler's step makes .* with cached.one_walk"):
        assert torch.equal(cached(other, 832), cached.unet(other, 832))
    cached.forget()
    with cached.one_walk():  # a user who says so is believed
        cached(noise(), 999)
        assert not torch.equal(cached(other, 832), cached.unet(other, 832))
    assert torch.equal(cached(other, 832), cached.unet(other, 832))


def test_a_copy_is_of_the_copied_network(cached: CachedUNet):
    before = drawn(cached)
    twin = copy.deepcopy(cached)
    with torch.no_grad():
        for buffer in twin.unet.buffers():
            buffer.zero_()
    assert torch.equal(drawn(cached), before)
    assert not torch.equal(drawn(twin), before)


def test_a_plan_is_saved_with_a_plain_module(cached: CachedUNet, tmp_path: Path):
    save_quantized(cached.unet, tmp_path / "net.safetensors")
    loaded = load_quantized(Small(), tmp_path / "net.safetensors")
    assert torch.equal(drawn(CachedUNet(loaded)), drawn(cached))


def test_what_cannot_be_cached_is_refused(small: Small, scheduler: DDIMScheduler):
    with pytest.raises(ValueError, match="Plain has no cache plan: call cache_"):
        CachedUNet(Plain())
    with pytest.raises(ValueError, match="the network has 0 skip concatenations"):
        measured(Plain(), sample_shape=SHAPE)
    with pytest.raises(ValueError, match="branch=2: the network has 1 skip concatenations"):
        measured(small, CacheConfig(branch=2), sample_shape=SHAPE)
    with pytest.raises(ValueError, match="no scheduler was given"):
        measured(small, scheduler=None, sample_shape=SHAPE)
    heun = HeunDiscreteScheduler(timestep_spacing="trailing", num_train_timesteps=1000)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler calls the network more than once at a timestep"):
        measured(small, scheduler=heun, num_inference_steps=10, sample_shape=SHAPE)
    with pytest.raises(ValueError, match="the reference is quantized"):
        measured(small, reference=copy.deepcopy(small), sample_shape=SHAPE)
    measured(small, sample_shape=SHAPE)
    with pytest.raises(TypeError, match="arguments by their names"):
        CachedUNet(small).compile("pqcad")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"interval": 0}, "interval=0: allowed are whole numbers from 1"),
        ({"branch": 1.5}, "branch=1.5: allowed are whole numbers"),
        ({"schedule": "odd"}, "schedule='odd': allowed are 'uniform', 'optimal'"),
        ({"correction": True}, "correction=True: allowed are 'channel', 'none'"),
        ({"batch_size": 64}, "batch_size=64: allowed are whole numbers from 1 to 63"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_configuration_out_of_range_is_refused(options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        CacheConfig(**options)


@pytest.mark.slow
def test_distances_choose_the_schedule(quantized_unet: UNet2DModel, tiny_unet: UNet2DModel):
    """With the reference's features as what is aimed at; the same seed gives the same plan."""
    config = CacheConfig(interval=3, schedule="optimal", points=6, batch_size=4)
    plan = measured(quantized_unet, config, num_inference_steps=8, reference=tiny_unet)
    assert len(plan.refresh) == 3
    assert plan.refresh[0] == plan.timesteps[0]
    assert plan.to_dict() == measured(quantized_unet, config, num_inference_steps=8, reference=tiny_unet).to_dict()
    assert "takes the feature of" in str(plan)


@pytest.mark.slow
def test_a_plan_is_saved_with_a_diffusers_model(
    quantized_unet: UNet2DModel, tiny_unet: UNet2DModel, scheduler: DDIMScheduler, tmp_path: Path
):
    for name, unet in (("float", tiny_unet), ("quantized", quantized_unet)):
        measured(unet)
        save_model(unet, scheduler, tmp_path / name)
        loaded, _ = load_model(tmp_path / name)
        assert torch.equal(drawn(CachedUNet(loaded)), drawn(CachedUNet(unet)))
        config = tmp_path / name / "unet" / "config.json"
        config.write_text(config.read_text().replace('"crc32": "', '"crc32": "0'))
        with pytest.raises(ValueError, match=r"the network's cache plan is damaged: .*by their checksum"):
            load_model(tmp_path / name)


@pytest.mark.slow
def test_what_changes_the_network_drops_its_plan(
    tiny_unet: UNet2DModel, scheduler: DDIMScheduler, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trajectories, "FARTHEST", float("inf"))  # random weights denoise nothing
    student = copy.deepcopy(tiny_unet)
    measured(student)
    with pytest.warns(UserWarning, match="quantize_ changes what the network's cache plan was measured on"):
        quantize_(student, quick(), scheduler=scheduler, progress=False)
    assert cache_plan(student) is None
    measured(student)
    cad = CADConfig(steps=4, iterations=2, batch_size=4, points=4, check_betas=False)
    with pytest.warns(UserWarning, match="distill_ changes what"):
        distill_(student, tiny_unet, scheduler, cad, progress=False)
    assert cache_plan(student) is None
    with pytest.raises(ValueError, match="this network was distilled for 2 steps"):
        measured(student)
    assert measured(student, num_inference_steps=None).timesteps == [999, 499]


@pytest.mark.slow
@pytest.mark.parametrize("interval", [2, 3])
def test_a_pipeline_draws_what_the_sampler_does(quantized_unet: UNet2DModel, interval: int):
    measured(quantized_unet, CacheConfig(interval=interval, points=4))
    cached = CachedUNet(quantized_unet)
    pipeline: Any = DDIMPipeline(quantized_unet, cosine_scheduler())
    pipeline.unet = cached
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        images = pipeline(2, generator, num_inference_steps=STEPS, output_type="np").images
        expected = sample(cached, cosine_scheduler(), start, STEPS).clamp(-1, 1) / 2 + 0.5
        torch.testing.assert_close(torch.tensor(images).permute(0, 3, 1, 2), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_text_and_guidance():
    """Of the sampler, which calls twice, and as pipelines do it, with a doubled batch and all they pass along."""
    torch.manual_seed(0)
    unet, scheduler = UNet2DConditionModel(**TINY_TEXT_UNET).eval(), cosine_scheduler()
    text, none = torch.randn(2, 5, 12), torch.zeros(2, 5, 12)
    conditioning = {"encoder_hidden_states": text, "guidance_scale": 5.0, "negative": {"encoder_hidden_states": none}}
    measured(unet, conditioning=conditioning)
    cached = CachedUNet(unet)
    expected = sample(cached, scheduler, noise(2), STEPS, conditioning=conditioning)
    assert not torch.equal(expected, sample(unet, scheduler, noise(2), STEPS, conditioning=conditioning))
    scheduler.set_timesteps(STEPS)
    x_t, both = noise(2), torch.cat([none, text])
    unused = {"timestep_cond": None, "cross_attention_kwargs": None, "added_cond_kwargs": None}
    assert cached.config.cross_attention_dim == 12
    for t in scheduler.timesteps:
        prediction = cached(torch.cat([x_t, x_t]), t, encoder_hidden_states=both, **unused, return_dict=False)[0]
        negative, prompt = prediction.chunk(2)
        x_t = scheduler.step(negative + 5.0 * (prompt - negative), t, x_t).prev_sample
    torch.testing.assert_close(x_t, expected, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "quantized", "text"])
def test_compiled_it_draws_the_same(kind: str, tiny_unet: UNet2DModel, quantized_unet: UNet2DModel):
    torch.compiler.reset()
    given: dict[str, Any] = {}
    unet: Any = {"float": tiny_unet, "quantized": quantized_unet}.get(kind)
    if kind == "text":
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**TINY_TEXT_UNET).eval()
        given = {"conditioning": {"encoder_hidden_states": torch.randn(4, 5, 12)}}
        quantize_(unet, quick(), scheduler=cosine_scheduler(), progress=False, **given)
    measured(unet, **given)
    cached = CachedUNet(unet)
    eager = drawn(cached, **given)
    cached.compile(backend="pqcad", dynamic=False, fullgraph=True)
    assert sqnr(eager, drawn(cached, **given)) > (60 if kind == "float" else 25)


@pytest.mark.slow
def test_other_processes_and_solvers():
    """A flow whose network is called with a time from 0 to 1, and a solver that walks timesteps of its own."""
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_UNET).eval()
    flow = FlowMatchEulerDiscreteScheduler()
    quantize_(unet, quick(), scheduler=flow, time_scale=1 / 1000, progress=False)
    plan = measured(unet, scheduler=flow)
    assert len(plan.refresh) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        images = sample(CachedUNet(unet), flow, noise(), STEPS)
    assert not torch.equal(images, sample(unet, flow, noise(), STEPS))

    unet, solver = UNet2DModel(**TINY_UNET).eval(), DPMSolverMultistepScheduler()
    solver.set_timesteps(STEPS)
    plan = measured(unet, scheduler=solver)
    assert plan.timesteps == solver.timesteps.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sample(CachedUNet(unet), solver, noise(), STEPS)


@pytest.mark.slow
def test_every_step_of_a_walk_is_what_the_plan_says(quantized_unet: UNet2DModel):
    """A shallow step with a table of ones and zeros, on the same x_t as the full one before it, is a full step."""
    plan = measured(quantized_unet)
    ones, zeros = torch.ones_like(plan.scale), torch.zeros_like(plan.shift)
    identity = CachePlan(
        1, plan.timesteps, plan.sources, ones, zeros, plan.staleness, plan.full_macs, plan.shallow_macs
    )
    attach_cache_plan(quantized_unet, identity)
    cached, x_t = CachedUNet(quantized_unet), noise()
    for t in plan.timesteps:
        seen, full = predict(cached, x_t, t), predict(quantized_unet, x_t, t)
        # the feature of the step before: another timestep embedding alone tells them apart
        assert torch.equal(seen, full) == (t in plan.refresh)
