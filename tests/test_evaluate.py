"""FID, KID, precision/recall and SQNR against direct computation, known values, and what must not change them."""

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from pqcad_ao.data import load_images, to_uint8, to_unit
from pqcad_ao.evaluate import fid
from pqcad_ao.evaluate.features import (
    FeatureClassifier,
    RealFeatures,
    embedded_features,
    extract_features,
    load_classifier,
)
from pqcad_ao.evaluate.fid import _frechet_to, image_quality, precision_recall
from pqcad_ao.evaluate.power import BORDERS, power_by_band
from pqcad_ao.evaluate.sqnr import decibels, sqnr_db, trajectory_sqnr

DATA = Path(os.environ.get("PQCAD_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")) / "fashion_mnist"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no Fashion-MNIST in {DATA}; set PQCAD_DATA")


class Project(nn.Module):
    """A fixed random projection of the pixels to ``d`` features, as float64."""

    def __init__(self, pixels: int = 64, d: int = 5, offset: float = 0.0) -> None:
        super().__init__()
        weight = torch.randn(pixels, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / pixels**0.5
        self.register_buffer("weight", weight)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).double() @ self.weight + self.offset


def pictures(n: int, seed: int = 0, size: int = 8, channels: int = 1) -> Tensor:
    """Random uint8 images whose grey level differs from image to image."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(40, 215, (n, 1, 1, 1), generator=generator)
    noise = torch.randint(-40, 41, (n, channels, size, size), generator=generator)
    return (level + noise).to(torch.uint8)


# FID and KID


def fid_kid(images: Tensor, network: nn.Module, real: RealFeatures, **options: int) -> dict[str, Any]:
    return fid.fid_kid(extract_features(images, network), real, **options)


@pytest.mark.filterwarnings("error")
def test_fid_of_a_set_with_itself_is_zero():
    network = Project()
    images = pictures(200)
    result = fid_kid(images, network, RealFeatures.from_images(images, network))
    assert abs(result["fid"]) < 1e-6
    assert abs(result["kid"]) < 0.05
    assert result["n"] == 200
    assert set(result) == {"fid", "kid", "kid_std", "n"}


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_injected_statistics_equal_real_images_fed_to_torchmetrics():
    """The states written are those of torchmetrics 1.9.0; a release that renames them fails here."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    network = Project()
    real, fake = pictures(150, seed=1), pictures(120, seed=2) // 2
    result = fid_kid(fake, network, RealFeatures.from_images(real, network), seed=7)
    frechet = FrechetInceptionDistance(feature=network, normalize=True, input_img_size=(1, 8, 8))
    kernel = KernelInceptionDistance(feature=network, subset_size=120)
    for metric in (frechet, kernel):
        metric.update(to_unit(real), real=True)
        metric.update(to_unit(fake), real=False)
    torch.manual_seed(7)
    kid, kid_std = kernel.compute()
    assert result["fid"] == pytest.approx(frechet.compute().item(), rel=1e-9)
    assert result["kid"] == pytest.approx(kid.item(), rel=1e-9)
    assert result["kid_std"] == pytest.approx(kid_std.item(), rel=1e-9)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_fid_of_gaussians_is_the_analytic_value(factor, shift):
    """N(µ, Σ) against N(µ + v, s²Σ): |v|² + (1 − s)² tr Σ, whatever Σ is."""
    network, images = Project(), pictures(300)
    fake = RealFeatures.from_images(images, network)
    real = RealFeatures(fake.mean + shift, factor**2 * fake.cov, 1000)
    expected = 5 * shift**2 + (1 - factor) ** 2 * fake.cov.trace().item()
    result = fid_kid(images, network, real)
    assert result["fid"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert result["kid"] is None
    assert result["kid_std"] is None


def test_frechet_helper_equals_torchmetrics_for_covariances_that_do_not_commute():
    generator = torch.Generator().manual_seed(0)
    a, b = (RealFeatures.from_features(torch.randn(40, 6, generator=generator) @ torch.randn(6, 6)) for _ in range(2))
    from torchmetrics.image.fid import _compute_fid

    expected = _compute_fid(a.mean, a.cov, b.mean, b.cov).item()
    assert _frechet_to(a.mean, a.cov)(b.mean, b.cov) == pytest.approx(expected, rel=1e-9)
    assert _frechet_to(b.mean, b.cov)(a.mean, a.cov) == pytest.approx(expected, rel=1e-9)


def test_fid_ignores_order_and_a_common_shift_of_the_features():
    real, fake = pictures(150, seed=1), pictures(130, seed=2) // 2
    plain = fid_kid(fake, Project(), RealFeatures.from_images(real, Project()))["fid"]
    shifted = Project(offset=4.0)
    assert fid_kid(fake, shifted, RealFeatures.from_images(real, shifted))["fid"] == pytest.approx(plain, rel=1e-6)
    assert fid_kid(fake.flip(0), Project(), RealFeatures.from_images(real, Project()))["fid"] == pytest.approx(plain)


def test_bytes_and_floats_of_the_same_pictures_agree():
    network, images = Project(), pictures(60)
    real = RealFeatures.from_images(pictures(60, seed=5), network)
    assert fid_kid(images, network, real) == fid_kid(to_unit(images), network, real)
    overshooting = to_unit(images) * 1.3
    assert fid_kid(overshooting, network, real) == fid_kid(to_uint8(overshooting), network, real)


def test_colour_images():
    network = Project(pixels=192)
    real = RealFeatures.from_images(pictures(60, channels=3), network)
    assert fid_kid(pictures(60, seed=1, channels=3), network, real)["fid"] > 0


def test_seed_repeats_and_leaves_the_global_generator_alone():
    network, images = Project(), pictures(200)
    real = RealFeatures.from_images(pictures(60, seed=5), network)
    state = torch.get_rng_state()
    first = fid_kid(images, network, real, seed=1, bootstrap=5)
    assert torch.equal(state, torch.get_rng_state())
    assert fid_kid(images, network, real, seed=1, bootstrap=5) == first
    assert fid_kid(images, network, real, seed=2, bootstrap=5)["kid"] != first["kid"]


def test_bootstrap_interval_holds_the_fid_and_shrinks_with_more_images():
    network = Project(d=16)
    real = dataclasses.replace(RealFeatures.from_images(pictures(3000, seed=5), network), features=None)
    widths = []
    for n in (100, 1600):
        result = fid_kid(pictures(n, seed=1), network, real, bootstrap=100)
        low, high = result["fid_ci"]
        assert 0 <= low <= result["fid"] <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_bootstrap_interval_covers_what_other_draws_of_this_size_give():
    network = Project()
    real = dataclasses.replace(RealFeatures.from_images(pictures(3000, seed=5), network), features=None)
    results = [fid_kid(pictures(200, seed=seed) // 2, network, real, bootstrap=60) for seed in range(20)]
    mean = sum(result["fid"] for result in results) / len(results)
    assert sum(result["fid_ci"][0] <= mean <= result["fid_ci"][1] for result in results) >= 16


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((4, 1, 8, 8), math.nan), "4 of 4 images hold NaN"),
        (torch.zeros(4, 1, 8, 8).index_fill_(0, torch.tensor(2), math.inf), "1 of 4"),
        (pictures(1), "1 images given"),
        (pictures(0), "0 images given"),
        (torch.zeros(4, 2, 8, 8), "C = 1"),
        (torch.zeros(4, 8, 8), "allowed is"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.int64), "int64"),
        (pictures(4).float(), "uint8"),
    ],
    ids=["nan", "inf", "one", "none", "two-channels", "three-dims", "int64", "0-255-floats"],
)
def test_images_that_are_refused(images, message):
    network = Project()
    real = RealFeatures.from_images(pictures(10), network)
    with pytest.raises(ValueError, match=message):
        fid_kid(images, network, real)


def test_other_wrong_arguments():
    images, network = pictures(10), Project()
    real = RealFeatures.from_images(images, network)
    with pytest.raises(ValueError, match="another network"):
        fid_kid(images, Project(d=3), real)
    with pytest.raises(ValueError, match="bootstrap is -1"):
        fid_kid(images, network, real, bootstrap=-1)
    with pytest.raises(ValueError, match=r"must return \(N, d\)"):
        fid_kid(images, nn.Identity(), real)
    with pytest.raises(ValueError, match="NaN or infinite features"):
        fid_kid(images, Project(offset=math.nan), real)


def test_missing_torchmetrics_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    images = pictures(10)
    with pytest.raises(ImportError, match=r"pip install pqcad_ao\[eval\]"):
        fid_kid(images, Project(), RealFeatures.from_images(images, Project()))


def test_feature_extraction_restores_each_modules_mode():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten())
    network.train()
    network[1].eval()
    first = extract_features(pictures(7), network, batch_size=3)
    assert torch.equal(first, extract_features(pictures(7), network, batch_size=3))
    assert [module.training for module in network] == [True, False, True, True]
    assert first.shape == (7, 72)


# files


def test_real_features_round_trip(tmp_path):
    real = RealFeatures.from_images(pictures(20), Project())
    real = dataclasses.replace(real, features=real.features[:5].half())
    real.save(tmp_path / "a.safetensors", {"accuracy": 0.5})
    real.save(tmp_path / "b.safetensors", {"accuracy": 0.5})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = RealFeatures.load(tmp_path / "a.safetensors")
    assert again.n == 20
    assert all(torch.equal(getattr(real, name), getattr(again, name)) for name in ("mean", "cov", "features"))
    assert again.features.dtype == torch.float16
    dataclasses.replace(real, features=None).save(tmp_path / "c.safetensors")
    assert RealFeatures.load(tmp_path / "c.safetensors").features is None


def test_classifier_round_trip(tmp_path):
    network = FeatureClassifier(3, 16, (4, 6), 7)
    network(torch.randn(8, 3, 16, 16))  # moves the batch statistics
    network.save(tmp_path / "net.safetensors", {"seed": 0})
    state = torch.get_rng_state()
    again = load_classifier(tmp_path / "net.safetensors")
    assert torch.equal(state, torch.get_rng_state())
    x = torch.randn(5, 3, 16, 16)
    assert torch.equal(again(x), network.eval()(x))
    assert again.features(x).shape == (5, 6)
    assert again(x).shape == (5, 7)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("load", [load_classifier, RealFeatures.load], ids=["classifier", "features"])
def test_damaged_and_foreign_files(tmp_path, load):
    path = tmp_path / "file.safetensors"
    with pytest.raises(FileNotFoundError):
        load(path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="no safetensors file or is damaged"):
        load(path)
    save_file({"mean": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"holds no pqcad_ao\.\w+: its header names nothing"):
        load(path)
    kind = "pqcad_ao.FeatureClassifier" if load is load_classifier else "pqcad_ao.RealFeatures"
    save_file({"mean": torch.zeros(2)}, path, {kind: "{"})
    with pytest.raises(ValueError, match="no JSON"):
        load(path)
    for header in ("{}", "[]", '{"n": "many", "architecture": {"depth": 3}}'):
        save_file({"mean": torch.zeros(2), "cov": torch.zeros(2, 2)}, path, {kind: header})
        with pytest.raises(ValueError, match=r"damaged|do not belong together"):
            load(path)


def test_truncated_or_altered_files(tmp_path):
    path = tmp_path / "net.safetensors"
    FeatureClassifier(1, 8, (4,)).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        load_classifier(path)
    network = FeatureClassifier(1, 8, (4,))
    network.architecture["channels"] = [8]
    network.save(path)
    with pytest.raises(ValueError, match="do not belong together"):
        load_classifier(path)
    network = FeatureClassifier(1, 8, (4,))
    network.head.bias.data[0] = math.nan
    network.save(path)
    with pytest.raises(ValueError, match=r"head\.bias holds values that are not finite"):
        load_classifier(path)


def test_statistics_that_do_not_fit_together():
    with pytest.raises(ValueError, match="mean is"):
        RealFeatures(torch.zeros(3), torch.zeros(2, 2), 10)
    with pytest.raises(ValueError, match="n is 1"):
        RealFeatures(torch.zeros(2), torch.zeros(2, 2), 1)
    with pytest.raises(ValueError, match=r"must be \(m, 2\)"):
        RealFeatures(torch.zeros(2), torch.zeros(2, 2), 10, torch.zeros(5, 3))


def test_classifier_refuses_other_image_sizes():
    network = FeatureClassifier(1, 16, (4,))
    for shape in ((2, 1, 28, 28), (2, 3, 16, 16), (1, 16, 16)):
        with pytest.raises(ValueError, match=r"this network takes \(N, 1, 16, 16\)"):
            network(torch.zeros(shape))
    with pytest.raises(ValueError, match="3 stages do not fit"):
        FeatureClassifier(1, 4, (4, 4, 4))


# what ships


def test_shipped_network_and_statistics():
    network, real = embedded_features()
    assert isinstance(network, FeatureClassifier)
    assert not network.training
    assert real.n == 10_000
    assert real.features.shape == (10_000, 64)
    recomputed = RealFeatures.from_features(real.features)  # float16 rounding is all that may differ
    torch.testing.assert_close(recomputed.mean, real.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(recomputed.cov, real.cov, rtol=0, atol=2e-3)
    x = torch.rand(3, 1, 32, 32) * 2 - 1
    assert torch.equal(network(x), network(x))


def test_train_statistics_are_near_the_shipped_ones():
    real = RealFeatures.load(Path(__file__).parent / "data" / "features_train.safetensors")
    assert real.n == 60_000
    assert real.features.shape == (10_000, 64)
    _, test = embedded_features()
    assert 0 < _frechet_to(test.mean, test.cov)(real.mean, real.cov) < 0.1  # the floor of every FID: CLASSIFIER.md


@needs_data
def test_shipped_statistics_are_those_of_the_data():
    network, real = embedded_features()
    images, labels = load_images(DATA, "test")
    features = extract_features(images[:1000], network)
    torch.testing.assert_close(features, real.features[:1000].float(), rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        every = network.head(real.features.float()).argmax(1)
        first = network(to_unit(images[:1000])).argmax(1)
    assert (every == labels).double().mean() >= 0.92
    assert (first == every[:1000]).double().mean() >= 0.998
    without_kid = dataclasses.replace(real, features=None)
    assert fid_kid(images[:1000], network, without_kid)["fid"] < 0.5
    assert fid_kid(images[:1000].flip(-1), network, without_kid)["fid"] > 10  # shoes face one way


# precision and recall


def _inside(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    between = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    radii = np.sort(between, axis=1)[:, k]
    distance = np.linalg.norm(points[:, None] - centres[None], axis=-1)
    return float((distance <= radii).any(1).mean())


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k):
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(1200, 4, generator=generator)
    fake = torch.randn(1100, 4, generator=generator) * 0.5 + 0.8
    result = precision_recall(real, fake, k)
    assert result["precision"] == pytest.approx(_inside(fake.double().numpy(), real.double().numpy(), k))
    assert result["recall"] == pytest.approx(_inside(real.double().numpy(), fake.double().numpy(), k))
    assert result["precision"] > result["recall"]  # the narrower set covers less


def test_image_quality_holds_both_measures():
    network = Project()
    real, fake = RealFeatures.from_images(pictures(60), network), pictures(40, seed=1)
    found = image_quality(fake, network, real, seed=3, bootstrap=5)
    apart = {**fid_kid(fake, network, real, seed=3, bootstrap=5)}
    assert found == {**apart, **precision_recall(real.features, extract_features(fake, network))}
    bare = image_quality(fake, network, RealFeatures(real.mean, real.cov, real.n))
    assert bare["fid"] == apart["fid"]
    assert bare["kid"] is bare["precision"] is bare["recall"] is None
    assert image_quality(fake[:3], network, real)["recall"] is None  # no third neighbour


def test_precision_and_recall_at_the_ends():
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(points, points) == {"precision": 1.0, "recall": 1.0}
    assert precision_recall(points, points + 100) == {"precision": 0.0, "recall": 0.0}
    with pytest.raises(ValueError, match="k is 50"):
        precision_recall(points, points, 50)
    with pytest.raises(ValueError, match="one network"):
        precision_recall(points, points[:, :2])
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(points, points * math.nan)


# SQNR


def _tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


vectors = st.lists(st.floats(-1e3, 1e3).map(lambda x: x + 0.01 if abs(x) < 0.01 else x), min_size=1, max_size=20)


@settings(deadline=None)
@given(vectors, st.floats(0.01, 10), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_sqnr_properties(values, noise, factor, seed):
    reference = _tensor(values)
    error = noise * torch.rand(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    value = sqnr_db(reference, reference + error)
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(factor * reference, factor * (reference + error)) == pytest.approx(value, abs=1e-6)
    assert sqnr_db(reference.flip(0), (reference + error).flip(0)) == pytest.approx(value, abs=1e-6)
    assert sqnr_db(reference, reference - error) == pytest.approx(value, abs=1e-6)
    assert sqnr_db(reference, reference + 10 * error) == pytest.approx(value - 20, abs=1e-6)


def test_sqnr_by_hand():
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])) == pytest.approx(20)
    assert sqnr_db(torch.tensor(2.0), torch.tensor(1.0)) == pytest.approx(10 * math.log10(4))
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf
    with pytest.raises(ValueError, match="shapes must be equal"):
        sqnr_db(torch.zeros(3), torch.zeros(1))
    with pytest.raises(ValueError, match="NaN"):
        sqnr_db(torch.zeros(3), torch.tensor([0.0, math.nan, 0.0]))


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [
        (100.0, 1.0, 20.0),
        (1.0, 100.0, -20.0),
        (1.0, 0.0, math.inf),
        (0.0, 0.0, math.inf),
        (0.0, 1.0, -math.inf),
        (1.0, math.nan, -math.inf),
        (1.0, math.inf, -math.inf),
    ],
)
def test_decibels_of_two_powers_zero_power_included(signal: float, noise: float, expected: float):
    assert decibels(signal, noise) == pytest.approx(expected)


class Ramp(nn.Module):
    """Predicts x_t plus ``error`` where the timestep is at least 500, wrapped in a tuple as diffusers does."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def forward(self, x_t: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (x_t + self.error * (timestep.expand(len(x_t)) >= 500).to(x_t).view(-1, 1, 1, 1),)


def test_trajectory_sqnr_by_timestep():
    ones = torch.ones(4, 1, 2, 2)
    inputs = [
        (ones, torch.tensor(900)),
        (ones, torch.tensor([900, 100, 500, 500])),
        (3 * ones, torch.tensor(100)),
    ]
    result = trajectory_sqnr(Ramp(0.0), Ramp(0.1), inputs)
    assert list(result["per_step"]) == [900, 500, 100]
    assert result["per_step"][900] == pytest.approx(20, abs=1e-5)
    assert result["per_step"][500] == pytest.approx(20, abs=1e-5)
    assert result["per_step"][100] == math.inf
    assert result["sqnr_db"] == pytest.approx(10 * math.log10((4 + 4 + 36) / (7 * 0.01)), abs=1e-5)
    assert all(isinstance(step, int) for step in result["per_step"])
    assert trajectory_sqnr(Ramp(0.1), Ramp(0.1), inputs)["sqnr_db"] == math.inf
    with pytest.raises(ValueError, match="no inputs"):
        trajectory_sqnr(Ramp(0.0), Ramp(0.1), [])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 3), st.integers(1, 33), st.integers(1, 33))
def test_the_bands_share_out_an_images_variance(seed, count, channels, height, width):
    images = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed)) + seed
    power = power_by_band(images)
    assert sum(power) == pytest.approx(images.double().var((2, 3), correction=0).mean().item(), rel=1e-9, abs=1e-12)
    assert power == pytest.approx(power_by_band(images.flip(3)), rel=1e-9, abs=1e-12)
    assert power == pytest.approx(power_by_band(images.transpose(2, 3)), rel=1e-9, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 16), st.integers(0, 16), st.floats(0.1, 3))
def test_a_wave_is_in_the_band_of_its_frequency(down, right, height):
    angle = 2 * math.pi * (down * torch.arange(32.0, dtype=torch.float64)[:, None] + right * torch.arange(32.0)) / 32
    wave = height * torch.cos(angle).expand(2, 1, 32, 32)
    band = sum(math.hypot(down, right) / 32 > border for border in BORDERS)
    expected = [0.0] * 4
    if (down, right) != (0, 0):
        expected[band] = wave[0].square().mean().item()
    assert power_by_band(wave) == pytest.approx(expected, abs=1e-9)
