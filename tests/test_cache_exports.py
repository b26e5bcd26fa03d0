"""A network with a cache plan, deployed: a .pt2 and a .pte draw the pictures of the eager network that follows it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from networks import SHAPE, TINY_TEXT_UNET, Small, cosine_scheduler, quick, sqnr
from torch import Tensor, nn

from pqcad_ao import CacheConfig, CachedUNet, CachePlan, PTESampler, cache_, export_pt2, export_pte, load_pt2, quantize_
from pqcad_ao.compile import package
from pqcad_ao.config import Correction
from pqcad_ao.correct import correct_
from pqcad_ao.diffusion.cache_plan import are_sources, cache_plan
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.edge import export

STEPS = 5  # the last group has one step
GIVEN: dict[str, Any] = {"scheduler": cosine_scheduler(), "num_inference_steps": STEPS}


def noise(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count))


def planned(unet: nn.Module, **options: Any) -> nn.Module:
    cache_(unet, CacheConfig(points=4), **{**GIVEN, "sample_shape": SHAPE, "progress": False, **options})
    return unet


def drawn(unet: Any, count: int = 3, **options: Any) -> Tensor:
    return sample(unet, cosine_scheduler(), noise(count), STEPS, **options)


def exported(unet: nn.Module, path: Path, **options: Any) -> Any:
    given = {"scheduler": cosine_scheduler(), "batch_size": 2, "sample_shape": SHAPE, "progress": False}
    return export_pte(unet, path, **{**given, **options})


def test_a_plan_of_another_walk_or_network_is_refused_before_the_work(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("executorch.exir", reason="executorch is not installed: pip install pqcad_ao[edge]")
    monkeypatch.setattr(export, "record", lambda *args: pytest.fail("the work began"))
    timesteps, lines = [999, 799, 599, 399, 199], torch.ones(STEPS, 8)
    plan = CachePlan(1, timesteps, [0, 0, 2, 2, 4], lines, torch.zeros_like(lines), [0.0] * STEPS, 10, 1)
    said = r"measured for the timesteps \[999, 799, 599, 399, 199\], and this walk visits \[999, 749, 499, 249\]"
    for cache, network in ((plan, small), ("own", CachedUNet(small, plan))):
        with pytest.raises(ValueError, match=said):
            exported(network, tmp_path / "a.pte", num_inference_steps=4, cache=cache)
        with pytest.raises(ValueError, match=said):
            export_pt2(
                network,
                tmp_path / "a.pt2",
                scheduler=cosine_scheduler(),
                num_inference_steps=4,
                sample_shape=SHAPE,
                cache=cache,
            )
    with pytest.raises(ValueError, match="cache=True: allowed are 'own'"):
        exported(small, tmp_path / "a.pte", cache=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sources", [[], [1, 1], [0, 1, 0], [0, 0, 1], [0, 0.0, 0], [0, -1, 0]])
def test_a_step_takes_the_feature_of_the_last_full_one_or_the_plan_is_damaged(sources: list):
    assert not are_sources(sources, len(sources))
    assert are_sources([0, 0, 2], 3)
    assert not are_sources([0, 0, 2], 4)


@pytest.mark.slow
def test_a_plan_of_another_feature_is_refused(small: Small):
    lines = torch.ones(2, 3)
    other = CachePlan(1, [999, 499], [0, 0], lines, lines, [0.0, 0.0], 10, 1)
    with pytest.raises(ValueError, match="a feature of 3 channels, and this network's has 8: call cache_"):
        drawn(CachedUNet(small, other))


# --------------------------------------------------------------------------------------------------------- .pte


@pytest.mark.slow
def test_a_pte_follows_the_plan(small: Small, tmp_path: Path):
    pytest.importorskip("executorch.exir", reason="executorch is not installed: pip install pqcad_ao[edge]")
    plan = cache_plan(planned(small))
    assert plan is not None
    report = exported(small, tmp_path / "a.pte")
    assert "3 of 5, the others with a feature that is kept" in str(report)
    sampler = PTESampler(report.path)
    assert sampler.sources == plan.sources == [0, 0, 2, 2, 4]
    eager, images = drawn(CachedUNet(small)), sampler.sample(noise(3))  # two calls of two
    assert sqnr(eager, images) > 60
    assert sqnr(drawn(small), images) < 40

    walk, x_t = CachedUNet(small).begin_walk(), noise(2)
    x_1, feature = sampler.advance(x_t, 0)
    assert torch.equal(x_1, sampler.step(x_t, 0))
    walk(x_t, 999)
    scheduler = cosine_scheduler()
    scheduler.set_timesteps(STEPS)
    expected = scheduler.step(walk(x_1, 799), 799, x_1).prev_sample
    x_2, kept = sampler.advance(x_1, 1, feature)
    assert sqnr(expected, x_2) > 60
    assert kept is feature
    in_full, none = sampler.advance(x_1, 1)
    assert torch.equal(in_full, sampler.step(x_1, 1))
    assert none is None
    assert not torch.equal(in_full, x_2)


@pytest.mark.slow
def test_a_pte_of_another_format_or_with_other_sources_is_refused(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("executorch.exir")
    planned(small)
    metadata = export._metadata
    for change, said in (
        ({"pqcad_format": 3}, "it is of format 3; this pqcad_ao reads format 4"),
        ({"cache_sources": torch.tensor([0, 0, 1, 2, 4])}, "cache_sources says"),
        ({"cache_sources": torch.tensor([0, 0])}, "cache_sources says"),
    ):
        monkeypatch.setattr(export, "_metadata", lambda *args, change=change: metadata(*args) | change)
        exported(small, tmp_path / "a.pte")
        with pytest.raises(ValueError, match=rf"a\.pte is damaged: {said}"):
            PTESampler(tmp_path / "a.pte")


@pytest.mark.slow
def test_a_pte_without_the_plan_computes_in_full(small: Small, tmp_path: Path):
    pytest.importorskip("executorch.exir")
    planned(small)
    report = exported(small, tmp_path / "a.pte", cache=None, num_inference_steps=STEPS)
    sampler = PTESampler(report.path)
    assert sampler.sources is None
    assert "step_cached" not in sampler._program.method_names
    assert sqnr(drawn(small), sampler.sample(noise(3))) > 60


@pytest.mark.slow
def test_both_programs_of_a_pte_read_the_same_weights(tmp_path: Path):
    """In the file they are once: with the plan it grows by what the shallow program is besides its weights."""
    pytest.importorskip("executorch.exir")

    class Wide(Small):
        """With most of its weights in the outermost block, which both programs compute."""

        def build(self) -> None:
            super().build()
            self.join = nn.Sequential(nn.Conv2d(16, 512, 3, padding=1), nn.Conv2d(512, 8, 3, padding=1))

    unet = Wide()
    quantize_(unet, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    planned(unet)
    options = {"objective": "size", "num_inference_steps": STEPS}
    cached, whole = (exported(unet, tmp_path / "a.pte", cache=cache, **options) for cache in ("own", None))
    shared = sum(layer.bytes for layer in whole.plan.layers if layer.fqn.startswith("join"))
    assert shared > 60_000
    assert cached.bytes - whole.bytes < shared


@pytest.mark.slow
def test_a_pte_of_a_guided_network_and_its_correction(tmp_path: Path):
    """Guidance is one call of twice the pictures, whose feature is kept whole; a correction is fitted without it."""
    pytest.importorskip("executorch.exir")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY_TEXT_UNET).eval()
    text, none = torch.randn(3, 5, 12), torch.zeros(3, 5, 12)
    prompt = {"encoder_hidden_states": text}
    reference = copy.deepcopy(unet)
    quantize_(unet, quick(), scheduler=cosine_scheduler(), conditioning=prompt, progress=False)
    guided = {**prompt, "guidance_scale": 3.0, "negative": {"encoder_hidden_states": none}}
    planned(unet, conditioning=guided)
    exported(unet, tmp_path / "a.pte", conditioning=guided)
    images = PTESampler(tmp_path / "a.pte").sample(noise(3), guided)
    assert sqnr(drawn(CachedUNet(unet), conditioning=guided), images) > 40

    cached = CachedUNet(unet)
    options = {"reference": reference, "conditioning": prompt, "progress": False}
    correct_(cached, Correction(points=4, size=3), **GIVEN, **options)
    exported(cached, tmp_path / "b.pte", conditioning=prompt)
    images = PTESampler(tmp_path / "b.pte").sample(noise(3), prompt)
    assert sqnr(drawn(cached, conditioning=prompt), images) > 40
    with pytest.raises(ValueError, match="with features kept, and this one computes all features"):
        exported(unet, tmp_path / "c.pte", conditioning=prompt, cache=None, num_inference_steps=STEPS)


@pytest.mark.slow
def test_a_flow(tmp_path: Path):
    pytest.importorskip("executorch.exir")
    unet, flow = Small(), FlowMatchEulerDiscreteScheduler()
    quantize_(unet, quick(), scheduler=flow, sample_shape=SHAPE, progress=False)
    planned(unet, scheduler=flow)
    exported(unet, tmp_path / "a.pte", scheduler=flow)
    eager = sample(CachedUNet(unet), flow, noise(3), STEPS)
    assert sqnr(eager, PTESampler(tmp_path / "a.pte").sample(noise(3))) > 60
    assert sqnr(sample(unet, flow, noise(3), STEPS), eager) < 60


# --------------------------------------------------------------------------------------------------------- .pt2


@pytest.mark.slow
@pytest.mark.parametrize("bound", [False, True], ids=["any schedule", "one schedule"])
def test_a_pt2_follows_the_plan(bound: bool, small: Small, tmp_path: Path):
    planned(small)
    options = {"num_inference_steps": STEPS, "batch_size": 2} if bound else {}
    path = export_pt2(small, tmp_path / "a.pt2", scheduler=cosine_scheduler(), sample_shape=SHAPE, **options)
    package, count = load_pt2(path), 4
    eager = drawn(CachedUNet(small), count)
    images = package.sample(noise(count), STEPS)
    assert sqnr(eager, images) > 30
    assert sqnr(drawn(small, count), images) < sqnr(eager, images) - 10
    t = torch.full((2,), 799)
    assert sqnr(small(noise(2), t), package(noise(2), 799)) > 45  # a call by itself is computed in full

    walk = package.begin_walk()
    walk(noise(2), 999)
    assert sqnr(package(noise(2), 799), walk(noise(2), 799)) < 60
    if bound:
        with pytest.raises(ValueError, match=r"x_t has shape \(3, 1, 8, 8\): this package takes \(2, 1, 8, 8\)"):
            walk(noise(3), 599)
    else:  # other pictures in the middle of a walk, and timesteps that no plan knows
        walk(noise(2), 599)
        assert torch.equal(walk(noise(3), 399), package(noise(3), 399))
        with pytest.warns(UserWarning, match="is asked for others"):
            others = package.sample(noise(count), 3)
        assert sqnr(sample(small, cosine_scheduler(), noise(count), 3), others) > 30


@pytest.mark.slow
def test_a_pt2_without_the_plan_and_one_that_lost_a_program(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    planned(small)
    options: dict[str, Any] = {"scheduler": cosine_scheduler(), "sample_shape": SHAPE}
    whole = load_pt2(export_pt2(small, tmp_path / "a.pt2", cache=None, **options))
    assert whole.plan is whole.begin_walk() is None
    assert sqnr(drawn(small), whole.sample(noise(3), STEPS)) > 30
    build = package._build

    def one(programs: dict, *args: Any) -> None:
        build({"full": programs["full"]}, *args)

    monkeypatch.setattr(package, "_build", one)
    with pytest.raises(ValueError, match=r"or is damaged: [^\n]*'shallow'[^\n]*$"):
        export_pt2(small, tmp_path / "b.pt2", **options)
    assert not (tmp_path / "b.pt2").exists()
