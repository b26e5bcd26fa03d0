"""How the family's options compose: every allowed combination in its order, and what a later stage makes invalid."""

import copy
import warnings
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from networks import SHAPE, TINY_UNET, cosine_scheduler, quick, sqnr
from pipelines import CALLS, PROMPTS, TEXT
from torch import nn

from pqcad_ao import (
    CacheConfig,
    CachedUNet,
    CachePlan,
    CADConfig,
    Correction,
    PQCADConfig,
    PTESampler,
    cache_,
    correct_,
    distill_,
    export_pt2,
    export_pte,
    load_pt2,
    quantize_,
)
from pqcad_ao.diffusion.cache_plan import attach_cache_plan, cache_plan
from pqcad_ao.diffusion.correction import CorrectionTable, correction_of
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.models import load_model, save_model
from pqcad_ao.pipeline import conditioning_of

STEPS = 4
NOISE = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(8))
LEARNING: dict[str, Any] = {
    "activation_bits": 4,
    "timestep_groups": 4,
    "calibration_points": 16,
    "calibration_steps": 4,
    "learning_points": 32,
    "batch_size": 4,
    "iterations": 8,
    "window": 1,
    "weight_ladder": [],
    "activation_ladder": [],
}
QUANTIZED = {
    "ptq": quick(),
    "ptq, clusters": quick(calibration_selection="clusters", learning_points=64),
    "quest": PQCADConfig.quest(**LEARNING),
    "weights": PQCADConfig(**LEARNING, sample_weights="groups", weight_every=4),
    "quest, weights, clusters": PQCADConfig.quest(
        **LEARNING, sample_weights="aligned", weight_every=4, calibration_selection="clusters"
    ),
}
CAD = CADConfig(steps=STEPS, iterations=2, batch_size=4, points=4, check_betas=False)
DISTILLED = {"whole": CAD, "part": replace(CAD, trainable=["up_blocks.*"], sample_weights="groups")}


@cache
def teacher() -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**TINY_UNET).eval()


@cache
def taught(quantized: str, distilled: str | None) -> tuple[UNet2DModel, Any]:
    """A network that was quantized and distilled so, and its sampler."""
    if distilled is None:
        unet = copy.deepcopy(teacher())
        quantize_(unet, QUANTIZED[quantized], scheduler=cosine_scheduler(), progress=False)
        return unet, cosine_scheduler()
    unet = copy.deepcopy(taught(quantized, None)[0])
    return unet, distill_(unet, teacher(), cosine_scheduler(), DISTILLED[distilled], progress=False)


def composed(
    quantized: str, distilled: str | None, cached: bool, corrected: str | None
) -> tuple[UNet2DModel, nn.Module, Any, int]:
    """A network, the one that is sampled from, its sampler, and the steps."""
    unet, scheduler = taught(quantized, distilled)
    return finished(copy.deepcopy(unet), scheduler, STEPS if distilled is None else STEPS // 2, cached, corrected)


def finished(
    unet: UNet2DModel, scheduler: Any, steps: int, cached: bool, corrected: str | None
) -> tuple[UNet2DModel, nn.Module, Any, int]:
    given: dict[str, Any] = {"scheduler": scheduler, "num_inference_steps": steps, "progress": False}
    if cached:
        cache_(unet, CacheConfig(points=4), reference=teacher(), **given)
    walked = CachedUNet(unet) if cached else unet
    if corrected is not None:
        config = Correction(kind=corrected, size=3 if corrected == "debias" else None, points=4)
        correct_(walked, config, reference=teacher(), **given)
    return unet, walked, scheduler, steps


def comes_back(unet: UNet2DModel, walked: nn.Module, scheduler: Any, steps: int, folder: Path) -> None:
    """What is saved and loaded has all of it, and draws the same bits."""
    images = sample(walked, scheduler, NOISE, steps)
    save_model(unet, scheduler, folder)
    loaded, sampler = load_model(folder)
    for of in (cache_plan, correction_of):
        before, after = of(unet), of(loaded)
        assert (before is None) == (after is None)
        assert before is None or after.to_dict() == before.to_dict()
    again = CachedUNet(loaded) if isinstance(walked, CachedUNet) else loaded
    assert torch.equal(sample(again, sampler, NOISE, steps), images)


def test_kept_features_and_a_correction_compose(quantized_unet: UNet2DModel, tmp_path: Path):
    unet, walked, scheduler, steps = finished(quantized_unet, cosine_scheduler(), STEPS, True, "debias")
    assert correction_of(unet).cached
    comes_back(unet, walked, scheduler, steps, tmp_path)
    assert not torch.equal(
        sample(walked, scheduler, NOISE, steps), sample(walked, scheduler, NOISE, steps, correction=None)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantized", "distilled", "cached", "corrected"),
    product(QUANTIZED, [None, *DISTILLED], [False, True], [None, "debias", "vc"]),
)
def test_every_combination_samples_and_comes_back(
    quantized: str, distilled: str | None, cached: bool, corrected: str | None, tmp_path: Path
):
    unet, walked, scheduler, steps = composed(quantized, distilled, cached, corrected)
    assert (cache_plan(unet) is not None) == cached
    assert (correction_of(unet) is not None) == (corrected is not None)
    comes_back(unet, walked, scheduler, steps, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["compiled", ".pt2", ".pte"])
@pytest.mark.parametrize(("distilled", "cached", "corrected"), product([None, "part"], [False, True], [None, "vc"]))
def test_every_combination_runs_as_a_program(
    program: str, distilled: str | None, cached: bool, corrected: str | None, tmp_path: Path
):
    torch.compiler.reset()
    unet, walked, scheduler, steps = composed("ptq", distilled, cached, corrected)
    expected = sample(walked, scheduler, NOISE, steps)
    if program == "compiled":
        if isinstance(walked, CachedUNet):
            walked.compile(backend="pqcad", dynamic=False)
        else:
            walked = torch.compile(walked, backend="pqcad", dynamic=False)
        found = sample(walked, scheduler, NOISE, steps, correction=correction_of(unet))
    elif program == ".pt2":
        path = export_pt2(unet, tmp_path / "unet.pt2", scheduler=scheduler, num_inference_steps=steps)
        found = load_pt2(path).sample(NOISE)
    else:
        pytest.importorskip("executorch", reason="a .pte needs executorch")
        given: dict[str, Any] = {"scheduler": scheduler, "num_inference_steps": steps, "progress": False}
        export_pte(unet, tmp_path / "unet.pte", batch_size=3, min_sqnr_db=10.0, trajectories=1, **given)
        found = PTESampler(tmp_path / "unet.pte").sample(NOISE)
    assert sqnr(expected, found) > 15


# What a stage makes invalid


def plan() -> CachePlan:
    ones = torch.ones(STEPS, 8)
    return CachePlan(1, [999, 749, 499, 249], [0, 0, 2, 2], ones, 0 * ones, [0.0, 0.1, 0.0, 0.1], 1000, 100)


def table() -> CorrectionTable:
    return CorrectionTable("debias", "prediction", [999, 749, 499, 249], torch.ones(STEPS, 1, 1, 1), torch.zeros(4, 1))


@pytest.mark.slow
def test_quantizing_drops_a_cache_plan_and_says_so():
    unet = copy.deepcopy(teacher())
    attach_cache_plan(unet, plan())
    with pytest.warns(UserWarning, match="quantize_ changes what the network's cache plan .* call cache_ again"):
        quantize_(unet, quick(), scheduler=cosine_scheduler(), progress=False)
    assert cache_plan(unet) is None


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
def test_distilling_drops_both_and_says_so_of_each(quantized_unet: UNet2DModel, quantized: bool):
    unet = quantized_unet if quantized else copy.deepcopy(teacher())
    attach_cache_plan(unet, plan())
    if quantized:
        quantized_unet._pqcad_state.correction = table()
    with pytest.warns(UserWarning, match="it is dropped|the plan is dropped") as said:
        distill_(unet, teacher(), cosine_scheduler(), CAD, progress=False)
    messages = " ".join(str(warning.message) for warning in said)
    assert "distill_ changes what the network's cache plan was measured on: the plan is dropped" in messages
    assert ("fitted to what it was before distill_: it is dropped; call correct_ again" in messages) == quantized
    assert cache_plan(unet) is None
    assert correction_of(unet) is None


def test_measuring_a_cache_plan_drops_a_correction_and_says_so(quantized_unet: UNet2DModel):
    quantized_unet._pqcad_state.correction = table()
    given: dict[str, Any] = {"scheduler": cosine_scheduler(), "num_inference_steps": 2, "progress": False}
    with pytest.warns(UserWarning, match="fitted to what it was before cache_: it is dropped; call correct_ again"):
        cache_(quantized_unet, CacheConfig(points=2), **given)
    assert correction_of(quantized_unet) is None
    assert cache_plan(quantized_unet) is not None


@pytest.mark.slow
def test_correcting_keeps_the_cache_plan_and_takes_the_place_of_the_correction_before(quantized_unet: UNet2DModel):
    attach_cache_plan(quantized_unet, plan())
    quantized_unet._pqcad_state.correction = table()
    finished(quantized_unet, cosine_scheduler(), STEPS, False, "vc")
    assert cache_plan(quantized_unet).to_dict() == plan().to_dict()
    assert correction_of(quantized_unet).kind == "vc"


@pytest.mark.parametrize("wrapped", [True, False], ids=["cached", "pipeline"])
def test_what_a_network_is_in_is_handed_over_to_no_stage(quantized_unet: UNet2DModel, wrapped: bool):
    attach_cache_plan(quantized_unet, plan())
    attach_cache_plan(unet := copy.deepcopy(teacher()), plan())
    pipeline: Any = DDIMPipeline(quantized_unet, cosine_scheduler())
    given: Any = CachedUNet(quantized_unet) if wrapped else pipeline
    says = "wrapped in a CachedUNet: hand over model.unet" if wrapped else "hand over the network in it"
    with pytest.raises(ValueError, match=says):
        cache_(given)
    with pytest.raises(ValueError, match=says):
        cache_(quantized_unet, reference=given, scheduler=cosine_scheduler())
    with pytest.raises(ValueError, match=says):
        correct_(quantized_unet, reference=given)
    with pytest.raises(ValueError, match=says):
        distill_(given, unet, cosine_scheduler(), CAD, progress=False)
    with pytest.raises(ValueError, match="wrapped in a CachedUNet"):
        quantize_(CachedUNet(unet), quick(), scheduler=cosine_scheduler())
    if not wrapped:
        with pytest.raises(ValueError, match=says):
            correct_(given, reference=unet)
    with pytest.raises(ValueError, match="quantize_"):
        correct_(unet, reference=unet, scheduler=cosine_scheduler())


# In pipelines with text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_text_pipeline_keeps_features_under_guidance(kind: str, tmp_path: Path):
    """Quantized by its prompts, measured and fitted under its guidance; then its network is the one that keeps them."""
    pytest.importorskip("transformers", reason="its text encoder")
    pipeline: Any = TEXT[kind](tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 4.0, **CALLS[kind]}
    full = copy.deepcopy(pipeline.unet)
    quantize_(pipeline, quick(), prompts=PROMPTS, call=call, progress=False)
    given: dict[str, Any] = {
        "scheduler": pipeline.scheduler,
        "num_inference_steps": STEPS,
        "conditioning": conditioning_of(pipeline, PROMPTS, call),
        "progress": False,
    }
    found = cache_(pipeline.unet, CacheConfig(points=4), reference=full, **given)
    asked = {"prompt": PROMPTS[:2], "num_inference_steps": STEPS, "output_type": "latent", **call}

    def drawn() -> torch.Tensor:
        return pipeline(**asked, generator=torch.Generator().manual_seed(0)).images

    in_full = drawn()
    pipeline.unet = CachedUNet(pipeline.unet)
    made: list[int] = []
    original = CachedUNet._run

    def run(self: CachedUNet, which: int, *rest: Any) -> Any:
        made.append(which)
        return original(self, which, *rest)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", "the cache plan|another walk", UserWarning)
        patch.setattr(CachedUNet, "_run", run)
        kept = drawn()
    assert made == [int(t not in found.refresh) for t in found.timesteps]
    assert not torch.equal(kept, in_full)
    assert sqnr(in_full, kept) > 3
