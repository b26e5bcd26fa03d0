"""The classifier recipe: the same losses at the same seed, and the files it leaves."""

import gzip
import struct
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from pqcad_ao.evaluate.features import RealFeatures, extract_features, load_classifier
from pqcad_ao.recipes import train_classifier
from pqcad_ao.recipes.settings import load_settings

# ten steps in fp32, torch 2.13.0 on x86
GOLDEN = [2.754577, 2.624662, 2.660607, 2.435675, 2.38837, 2.375971, 2.505437, 2.357609, 2.40061, 2.478584]


def tiny_config(**options) -> DictConfig:
    config = load_settings("classifier_fashion_mnist")
    config.network = {"in_channels": 1, "image_size": 8, "channels": [4, 8], "num_classes": 10}
    config.train.update({"epochs": 2, "batch_size": 32, "bf16": False} | options)
    return config


def random_set(n: int = 170) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    images = torch.randint(256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.randint(10, (n,), generator=generator)


def test_golden_losses():
    network, losses = train_classifier.train(tiny_config(), *random_set())
    assert losses == pytest.approx(GOLDEN, rel=1e-4)
    assert not network.training


def test_bf16_stays_near_and_repeats():
    _, losses = train_classifier.train(tiny_config(bf16=True), *random_set())
    assert losses == pytest.approx(GOLDEN, rel=0.03)
    assert train_classifier.train(tiny_config(bf16=True), *random_set())[1] == losses


def test_learning_rate_rises_then_falls():
    rates = [train_classifier.lr_at(step, 20, tiny_config().train) for step in range(20)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(4e-3)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < min(rates) < 4e-3 / 10


def test_fewer_images_than_a_batch():
    with pytest.raises(ValueError, match=r"lower train\.batch_size \(now 32\)"):
        train_classifier.train(tiny_config(), *random_set(20))


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(FloatingPointError, match=r"lower train\.lr"):
        train_classifier.train(tiny_config(lr=1e30), *random_set())


def write_idx(path: Path, values: Tensor) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
    path.write_bytes(gzip.compress(header + values.to(torch.uint8).numpy().tobytes()))


def test_command_writes_network_and_statistics(tmp_path, capsys):
    images, labels = random_set()
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images[:, 0])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    overrides = ["network.image_size=8", "network.channels=[4,8]", "train.epochs=1", "train.batch_size=32"]
    train_classifier.main(
        ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu", *overrides, "features.subset=50"]
    )
    network = load_classifier(tmp_path / "out" / "classifier.safetensors")
    test = RealFeatures.load(tmp_path / "out" / "features_test.safetensors")
    train = RealFeatures.load(tmp_path / "out" / "features_train.safetensors")
    assert (test.n, train.n) == (170, 170)
    assert (test.features.shape, train.features.shape) == ((170, 8), (50, 8))
    features = extract_features(images, network)
    torch.testing.assert_close(test.mean, features.double().mean(0))
    torch.testing.assert_close(test.cov, features.double().T.cov())
    assert torch.equal(test.features, features.half())
    with torch.no_grad():
        right = (network(images / 127.5 - 1).argmax(1) == labels).double().mean().item()
    assert f"test_accuracy {right:.4f}" in capsys.readouterr().out


def test_images_without_labels_are_refused(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no labels"):
        train_classifier.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "network.image_size=8"])
