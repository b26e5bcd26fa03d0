"""Corrections of a quantized network's sampling: fits in closed form, applied, saved, exported."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SHAPE, TINY_TEXT_UNET, cosine_scheduler, quick, sqnr
from torch import Tensor
from torch.nn import functional as F

from pqcad_ao import (
    CacheConfig,
    CachedUNet,
    CADConfig,
    Correction,
    PTESampler,
    cache_,
    correct_,
    distill_,
    export_pt2,
    export_pte,
    load_pt2,
    quantize_,
)
from pqcad_ao.correct import Moments, orbits, solved
from pqcad_ao.diffusion import trajectories
from pqcad_ao.diffusion.correction import CorrectionTable, filtered
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.state import quantized_state, state_from_dict

FITTED = ("debias", "variance", "regression")
KINDS = (*FITTED, "ptqd", "tac", "vc")


def textures(seed: int, n: int = 6, channels: int = 2, size: int = 12) -> Tensor:
    """Smooth pictures, of a power that falls with frequency as that of real ones."""
    noise = torch.randn(n, channels, size + 4, size + 4, generator=torch.Generator().manual_seed(seed))
    return 2 * F.avg_pool2d(noise, 5, stride=1)


def fit(e: Tensor, q: Tensor, config: Correction) -> tuple[Tensor, Tensor]:
    moments = Moments(config.width)
    moments.add(e, q)
    return solved(moments, config, e.shape[2:])


def corrected(q: Tensor, fitted: tuple[Tensor, Tensor]) -> Tensor:
    return filtered(q.double(), fitted[0], q.shape[1]) + fitted[1][:, None, None]


@settings(max_examples=10)
@given(st.integers(0, 2**16), st.sampled_from(KINDS))
def test_what_is_equal_is_left_as_it_is(seed, kind):
    e = textures(seed)
    filters, bias = fit(e, e, Correction(kind=kind, size=3 if kind in FITTED else None))
    assert (corrected(e, (filters, bias)) - e).abs().max() < 0.02 * e.abs().max()
    assert (filters.sum((1, 2)) - 1).abs().max() < 0.02


@settings(max_examples=10)
@given(st.integers(0, 2**16), st.sampled_from(KINDS))
def test_strength_zero_changes_no_bit(seed, kind):
    e = textures(seed)
    q = e + 0.3 * torch.randn(e.shape, generator=torch.Generator().manual_seed(seed + 1))
    filters, bias = fit(e, q, Correction(kind=kind, strength=0.0, size=3 if kind in FITTED else None))
    table = CorrectionTable(kind, "prediction", [9], filters[None].float(), bias[None].float())
    assert torch.equal(table.predicted(q, 0), q)


@settings(max_examples=10)
@given(st.integers(0, 2**16), st.sampled_from([1, 3, 5]))
def test_regression_never_raises_the_error_that_it_was_fitted_to(seed, size):
    e = textures(seed)
    q = 0.9 * e + 0.5 * torch.randn(e.shape, generator=torch.Generator().manual_seed(seed + 1)) + 0.1
    after = corrected(q, fit(e, q, Correction(kind="regression", size=size)))
    assert (after - e).square().mean() <= (q - e).square().mean() + 1e-12


@settings(max_examples=6)
@given(st.integers(0, 2**16))
def test_debias_undoes_a_known_blur_in_spite_of_noise(seed):
    """The mean of h ∗ q given e is e; regression, which is asked for the least error, keeps attenuating."""
    e = textures(seed, n=48, channels=1, size=16)
    blur = torch.tensor([[0.0, 0.05, 0.0], [0.05, 0.75, 0.05], [0.0, 0.05, 0.0]]).double()[None]
    noise = torch.randn(e.shape, generator=torch.Generator().manual_seed(seed + 1))
    q = filtered(e.double(), blur, 1) + 0.3 * noise
    debias, _ = fit(e, q, Correction(kind="debias", size=5))
    regression, _ = fit(e, q, Correction(kind="regression", size=5))

    def slope(filters: Tensor) -> float:
        """Of the corrected blur by e, noise left out."""
        kept = filtered(filtered(e.double(), blur, 1), filters, 1)
        return ((kept * e).sum() / (e.double() * e).sum()).item()

    assert slope(debias) == pytest.approx(1, abs=0.03)
    assert slope(regression) < slope(debias)


def test_variance_gives_back_the_power():
    e = textures(3, n=48, channels=1, size=16)
    q = 0.8 * e + 0.2 * torch.randn(e.shape, generator=torch.Generator().manual_seed(4))
    for size in (1, 5):
        after = corrected(q, fit(e, q, Correction(kind="variance", size=size)))
        assert (after.std() / e.std()).item() == pytest.approx(1, abs=0.05)


@settings(max_examples=8)
@given(st.integers(0, 2**16), st.sampled_from(FITTED), st.sampled_from([3, 7]))
def test_filters_are_symmetric_bounded_and_go_along_with_flips(seed, kind, size):
    e = textures(seed)
    q = 0.7 * e + 0.4 * torch.randn(e.shape, generator=torch.Generator().manual_seed(seed + 1))
    filters, bias = fit(e, q, Correction(kind=kind, size=size))
    for turned in (filters.flip(1), filters.flip(2), filters.transpose(1, 2)):
        torch.testing.assert_close(turned, filters)
    table = CorrectionTable(kind, "prediction", [9], filters[None].float(), bias[None].float())
    torch.testing.assert_close(table.predicted(q.flip(3), 0), table.predicted(q, 0).flip(3), rtol=1e-4, atol=1e-5)
    grid = torch.zeros(2, *e.shape[2:]).double()
    grid[:, :size, :size] = filters
    gain = torch.fft.fft2(grid).abs()
    assert gain.max() < 2.001
    assert gain.min() > 0.499


def test_orbits_cover_the_filter_once():
    assert torch.equal(orbits(7).sum(0), torch.ones(7, 7).double())
    assert len(orbits(7)) == 10


def test_published_formulas_are_what_they_say():
    e, noise = textures(5, n=40), torch.randn(40, 2, 12, 12, generator=torch.Generator().manual_seed(6))
    q = 1.1 * e + 0.05 * noise + 0.3
    filters, bias = fit(e, q, Correction(kind="ptqd"))
    n, centred = (q - e).double(), e.double() - e.double().mean((0, 2, 3), keepdim=True)
    k = (n * centred).sum() / centred.square().sum()
    torch.testing.assert_close(filters.flatten(), torch.full((2,), 1 / (1 + k.item())).double(), rtol=1e-6, atol=0)
    b = (n - k * e).mean((0, 2, 3))
    torch.testing.assert_close(bias, -b / (1 + k), rtol=1e-6, atol=1e-9)

    E, Q = e.double(), q.double()
    floored = torch.where(E.abs() < 0.1, 0.01 / E, E)  # E / floor², so that 1/floored is E over the floored square
    weight = 1 / E.abs().clamp_min(0.1)
    count = E[:, 0].numel()

    def total(value: Tensor) -> Tensor:
        return value.sum((0, 2, 3))

    above = 0.5 * total(Q * E) + 0.5 * count * total(Q / floored) + 0.1 * count
    below = 0.5 * total(Q * Q) + 0.5 * count * total((Q * weight).square()) + 0.1 * count
    torch.testing.assert_close(fit(e, q, Correction(kind="tac"))[0].flatten(), above / below)

    mu = E.mean((0, 2, 3), keepdim=True)
    left = Q - mu
    K = total((E - mu) * left * (1 + weight.square())) / total(left.square() + (left * weight).square())
    filters, bias = fit(e, q, Correction(kind="vc"))
    torch.testing.assert_close(filters.flatten(), K)
    torch.testing.assert_close(bias, mu.flatten() * (1 - K))


def a_table(seed: int, size: int, guidance: float | None = None) -> CorrectionTable:
    generator = torch.Generator().manual_seed(seed)
    filters, bias = (torch.randn(3, 2, *rest, generator=generator) for rest in ((size, size), ()))
    return CorrectionTable("debias", "prediction", [9, 5, 1], filters, bias, guidance=guidance)


@settings(max_examples=10)
@given(st.integers(0, 2**16), st.sampled_from([1, 3, 5]), st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_a_batch_of_several_steps_is_each_sample_alone(seed, size, steps):
    table, step = a_table(seed, size), torch.tensor(steps)
    value = torch.randn(len(steps), 2, 6, 6, generator=torch.Generator().manual_seed(seed + 1))
    alone = torch.cat([table.predicted(value[row : row + 1], int(step[row])) for row in range(len(steps))])
    torch.testing.assert_close(table.apply(value, step), alone)


@settings(max_examples=10)
@given(st.integers(0, 2**16), st.sampled_from([1, 3]), st.none() | st.floats(-20, 20), st.data())
def test_a_table_is_read_as_it_was_written_and_damage_is_refused(seed, size, guidance, data):
    table = a_table(seed, size, guidance)
    values = json.loads(json.dumps(table.to_dict()))
    read = CorrectionTable.from_dict(values)
    assert torch.equal(read.filters, table.filters)
    assert torch.equal(read.bias, table.bias)
    assert read.to_dict() == table.to_dict()
    name = data.draw(st.sampled_from(["kind", "where", "timesteps", "filters", "bias", "cached", "guidance"]))
    wrong = data.draw(st.sampled_from([[1], {}, [[1.0]], [float("nan")]]))
    with pytest.raises((ValueError, TypeError, KeyError)):
        CorrectionTable.from_dict({**values, name: wrong})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "wiener"}, "kind='wiener': allowed are 'debias', 'variance'"),
        ({"where": "weights"}, "where='weights': allowed are 'prediction', 'sample'"),
        ({"size": 4}, "size=4: allowed are odd numbers"),
        ({"size": 17}, "size=17"),
        ({"strength": 1.5}, "strength"),
        ({"points": 1}, "points"),
        ({"kind": "ptqd", "size": 7}, "published as one factor of the prediction"),
        ({"kind": "vc", "where": "prediction"}, "published as one factor of the sample"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Correction(**options)


# On a network


def correct(quantized, reference, **options) -> CorrectionTable:
    config = Correction(**{"points": 8, "batch_size": 4, **options})
    asked = {"scheduler": cosine_scheduler(), "num_inference_steps": 4, "progress": False}
    return correct_(quantized, config, reference=reference, **asked)


NOISE = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(8))


def test_a_correction_acts_where_it_was_fitted_and_nowhere_else(tiny_unet, quantized_unet, tmp_path):
    plain = sample(quantized_unet, cosine_scheduler(), NOISE, 4)
    table = correct(quantized_unet, tiny_unet, size=3)
    assert table.timesteps == [999, 749, 499, 249]
    by_it = sample(quantized_unet, cosine_scheduler(), NOISE, 4)
    assert not torch.equal(by_it, plain)
    assert torch.equal(sample(quantized_unet, cosine_scheduler(), NOISE, 4, correction=None), plain)
    assert torch.equal(sample(copy.deepcopy(quantized_unet), cosine_scheduler(), NOISE, 4), by_it)
    with pytest.raises(ValueError, match=r"fitted for the timesteps \[999, 749, 499, 249\], and this walk visits"):
        sample(quantized_unet, cosine_scheduler(), NOISE, 5)
    with pytest.raises(ValueError, match="fitted to a walk without guidance, and this one keeps features"):
        table.check(table.timesteps, {}, cached=True)
    with pytest.raises(ValueError, match="and this one is guided, with guidance_scale=5"):
        table.check(table.timesteps, {"guidance_scale": 5.0}, cached=False)
    with pytest.raises(ValueError, match="walk with guidance_scale=5, and this one is not guided"):
        replace(table, guidance=5.0).check(table.timesteps, {}, cached=False)
    save_model(quantized_unet, cosine_scheduler(), tmp_path)
    loaded, scheduler = load_model(tmp_path)
    assert torch.equal(quantized_state(loaded).correction.filters, table.filters)
    assert torch.equal(sample(loaded, scheduler, NOISE, 4), by_it)
    saved = quantized_state(quantized_unet).to_dict()
    for name, wrong in (("bias", [[0.0]]), ("where", "nowhere"), ("timesteps", [1]), ("filters", [[[[float("nan")]]]])):
        with pytest.raises(ValueError, match="config is damaged"):
            state_from_dict({**saved, "correction": {**saved["correction"], name: wrong}})


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"kind": kind} for kind in KINDS] + [{"kind": "variance", "where": "sample"}])
def test_every_kind_is_fitted_the_same_every_time(tiny_unet, quantized_unet, options):
    again = copy.deepcopy(quantized_unet)
    one, other = correct(quantized_unet, tiny_unet, **options), correct(again, tiny_unet, **options)
    assert torch.equal(one.filters, other.filters)
    assert torch.equal(one.bias, other.bias)
    assert one.filters.isfinite().all()
    assert sample(quantized_unet, cosine_scheduler(), NOISE, 4).isfinite().all()


@pytest.mark.slow
def test_features_that_are_kept_are_corrected_as_they_are_sampled(tiny_unet, quantized_unet):
    correct(quantized_unet, tiny_unet, size=3)
    asked = {"scheduler": cosine_scheduler(), "num_inference_steps": 4, "progress": False}
    with pytest.warns(UserWarning, match="was fitted to what it was before cache_: it is dropped"):
        cache_(quantized_unet, CacheConfig(points=4), **asked)
    cached = CachedUNet(quantized_unet)
    plain = sample(cached, cosine_scheduler(), NOISE, 4)
    correct(cached, tiny_unet, size=3)
    assert not torch.equal(sample(cached, cosine_scheduler(), NOISE, 4), plain)
    with pytest.raises(ValueError, match="with features kept, and this one computes all features"):
        sample(quantized_unet, cosine_scheduler(), NOISE, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
def test_under_guidance_the_guided_prediction_is_corrected(kept):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY_TEXT_UNET).eval()
    text, none = torch.randn(4, 5, 12), torch.zeros(4, 5, 12)
    guided = {"encoder_hidden_states": text, "guidance_scale": 3.0, "negative": {"encoder_hidden_states": none}}
    quantized = copy.deepcopy(unet)
    quantize_(quantized, quick(), scheduler=cosine_scheduler(), conditioning=guided, progress=False)
    asked = {"scheduler": cosine_scheduler(), "num_inference_steps": 4, "conditioning": guided, "progress": False}
    if kept:
        cache_(quantized, CacheConfig(points=4), reference=unet, **asked)
    walked = CachedUNet(quantized) if kept else quantized
    table = correct_(walked, Correction(points=8, batch_size=4, size=3), reference=unet, **asked)
    assert table.guidance == 3.0
    assert CorrectionTable.from_dict(table.to_dict()).guidance == 3.0
    noise = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    reference, scheduler = sample(unet, cosine_scheduler(), noise, 4, conditioning=guided), cosine_scheduler()
    drawn = sample(walked, scheduler, noise, 4, conditioning=guided)
    plain = sample(walked, scheduler, noise, 4, conditioning=guided, correction=None)
    assert not torch.equal(drawn, plain)
    assert sqnr(reference, drawn) > sqnr(reference, plain) - 3
    with pytest.raises(ValueError, match="and this one is not guided"):
        sample(walked, scheduler, noise, 4, conditioning={"encoder_hidden_states": text})
    with pytest.raises(ValueError, match="is guided, with guidance_scale=4"):
        sample(walked, scheduler, noise, 4, conditioning={**guided, "guidance_scale": 4.0})


@pytest.mark.slow
def test_distilling_drops_a_correction_and_says_so(tiny_unet, quantized_unet, monkeypatch):
    monkeypatch.setattr(trajectories, "FARTHEST", float("inf"))  # random weights denoise nothing
    correct(quantized_unet, tiny_unet, size=3)
    cad = CADConfig(steps=4, iterations=2, batch_size=4, points=4)
    with pytest.warns(UserWarning, match="it is dropped; call correct_ again"):
        sampler = distill_(quantized_unet, tiny_unet, cosine_scheduler(), cad, progress=False)
    assert quantized_state(quantized_unet).correction is None
    config = Correction(points=4, size=3)
    table = correct_(quantized_unet, config, reference=tiny_unet, scheduler=sampler, progress=False)
    assert table.timesteps == [999, 499]
    with pytest.raises(ValueError, match="the reference is quantized"):
        correct_(quantized_unet, config, reference=quantized_unet, scheduler=sampler)
    with pytest.raises(ValueError, match="a filter of size 9 corrects images at least as large"):
        correct_(quantized_unet, replace(config, size=9), reference=tiny_unet, scheduler=sampler)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"size": 5}, {"kind": "vc"}])
def test_the_step_of_a_program_corrects(tiny_unet, quantized_unet, tmp_path, options):
    pytest.importorskip("executorch", reason="a .pte needs executorch")
    table = correct(quantized_unet, tiny_unet, **options)
    asked = {"scheduler": cosine_scheduler(), "num_inference_steps": 4, "progress": False, "trajectories": 1}
    with pytest.raises(ValueError, match="the correction was fitted for the timesteps"):
        export_pte(quantized_unet, tmp_path / "unet.pte", **{**asked, "num_inference_steps": 5})
    export_pte(quantized_unet, tmp_path / "unet.pte", batch_size=3, min_sqnr_db=10.0, **asked)
    sampler, scheduler = PTESampler(tmp_path / "unet.pte"), cosine_scheduler()
    scheduler.set_timesteps(4)
    for index, timestep in enumerate(scheduler.timesteps):
        prediction = sampler.predict(NOISE, index)
        plain = scheduler.step(prediction, timestep, NOISE).prev_sample
        expected = scheduler.step(table.predicted(prediction, index), timestep, NOISE).prev_sample
        found = sampler.step(NOISE, index)
        torch.testing.assert_close(found, table.sampled(expected, index), rtol=1e-4, atol=1e-4)
        assert (found - plain).abs().max() > 1e-3


@pytest.mark.slow
def test_a_package_corrects_what_it_samples(tiny_unet, quantized_unet, tmp_path):
    correct(quantized_unet, tiny_unet, size=3)
    path = export_pt2(quantized_unet, tmp_path / "unet.pt2", scheduler=cosine_scheduler())
    package = load_pt2(path)
    corrected_by_it, plain = package.sample(NOISE, 4), package.sample(NOISE, 4, correction=None)
    expected = sample(quantized_unet, cosine_scheduler(), NOISE, 4)
    assert (corrected_by_it - expected).square().mean() < 0.1 * (plain - expected).square().mean()
