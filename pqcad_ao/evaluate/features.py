"""The feature network that sees what images are like, and its statistics of real ones."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao.data import to_uint8, to_unit
from pqcad_ao.utils.assets import asset_path
from pqcad_ao.utils.checks import is_whole
from pqcad_ao.utils.processes import rows_of_all
from pqcad_ao.utils.tensor_files import read_tensors, write_tensors

CLASSIFIER_FORMAT = "pqcad_ao.FeatureClassifier"
FEATURES_FORMAT = "pqcad_ao.RealFeatures"


def _conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class _Residual(nn.Module):
    """x + two convolutions of x, the arrangement of the fast CIFAR-10 ResNets (Page 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class FeatureClassifier(nn.Module):
    """A small convolutional classifier whose pooled last feature map serves as the feature space of FID and KID.

    One stage per entry of ``channels``: convolution, 2x2 max-pooling and, from the second stage on, a residual pair.
    The mean over the last feature map's pixels is the feature vector; one linear layer makes logits of it.

    Args:
        in_channels: 1 (grey) or 3.
        image_size: height and width it is trained on; others are refused, for their statistics would not compare.
        channels: width of each stage; the last is the number of features.
        num_classes: number of logits.
    """

    def __init__(
        self, in_channels: int = 1, image_size: int = 32, channels: Sequence[int] = (32, 64, 64), num_classes: int = 10
    ) -> None:
        super().__init__()
        if image_size < 2 ** len(channels) or not channels:
            raise ValueError(f"{len(channels)} stages do not fit images of {image_size} pixels; each halves the size")
        self.architecture = {
            "in_channels": in_channels,
            "image_size": image_size,
            "channels": list(channels),
            "num_classes": num_classes,
        }
        self.stages = nn.Sequential()
        for stage, (before, width) in enumerate(itertools.pairwise((in_channels, *channels))):
            self.stages.append(nn.Sequential(_conv(before, width), nn.MaxPool2d(2)))
            if stage:
                self.stages.append(_Residual(width))
        self.head = nn.Linear(channels[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] to features (N, channels[-1]). Deterministic in ``eval`` mode."""
        size = self.architecture["image_size"]
        allowed = (self.architecture["in_channels"], size, size)
        if x.ndim != 4 or tuple(x.shape[1:]) != allowed:
            raise ValueError(f"images are {tuple(x.shape)}; this network takes (N, {', '.join(map(str, allowed))})")
        return self.stages(x).mean((-2, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] to logits (N, num_classes)."""
        return self.head(self.features(x))

    def save(self, path: str | Path, notes: dict[str, Any] | None = None) -> None:
        """Write the weights as safetensors; the architecture is in the header, next to ``notes`` (JSON values)."""
        _write_safetensors(
            path, self.state_dict(), CLASSIFIER_FORMAT, (notes or {}) | {"architecture": self.architecture}
        )


def _write_safetensors(path: str | Path, tensors: dict[str, Tensor], kind: str, header: dict[str, Any]) -> None:
    """Write tensors with ``header`` as one JSON entry named ``kind``: several entries would come in random order."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, contiguous, {kind: json.dumps(header, sort_keys=True)})


def _read_safetensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written as ``kind``; ValueError if it is anything else, or not finite."""
    tensors, header = read_tensors(path, kind)
    broken = [name for name, value in tensors.items() if value.is_complex() or not value.isfinite().all()]
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header is a {type(header).__name__}")
    if broken:
        raise ValueError(f"{path} is damaged: {', '.join(broken)} holds values that are not finite")
    return tensors, header


def load_classifier(path: str | Path) -> FeatureClassifier:
    """Read what ``FeatureClassifier.save`` wrote; the network comes frozen and in ``eval`` mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such network in it, or a damaged one.
    """
    tensors, header = _read_safetensors(path, CLASSIFIER_FORMAT)
    try:
        _check_architecture(header["architecture"])
        with torch.device("meta"):  # neither memory for a header that lies, nor a draw from the user's random numbers
            network = FeatureClassifier(**header["architecture"])
        for name, own in network.state_dict().items():
            if name in tensors and tensors[name].dtype != own.dtype:
                raise ValueError(f"{name} is {tensors[name].dtype}")
            if name.endswith("running_var") and (tensors[name] < 0).any():
                raise ValueError(f"{name} holds negative variances")
        network.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: weights and architecture do not belong together ({error})") from error
    return network.requires_grad_(False).eval()


def _check_architecture(values: Any) -> None:
    """Raises ValueError, TypeError: a header's numbers are not those of a network."""
    counts = [values[name] for name in ("in_channels", "image_size", "num_classes")]
    if not all(is_whole(count, most=2**16) for count in [*counts, *values["channels"]]) or counts[0] not in (1, 3):
        raise ValueError(f"its architecture is {values}")


@dataclass(frozen=True)
class RealFeatures:
    """What FID and KID need to know of the real images.

    Attributes:
        mean: (d,) float64. cov: (d, d) float64, the unbiased estimate. n: images behind both.
        features: (m, d) with m <= n, of any floating dtype, for KID and precision/recall; or None.
    """

    mean: Tensor
    cov: Tensor
    n: int
    features: Tensor | None = None

    def __post_init__(self) -> None:
        d = self.mean.shape[-1] if self.mean.ndim else 0
        if self.mean.shape != (d,) or self.cov.shape != (d, d) or not d:
            raise ValueError(
                f"mean is {tuple(self.mean.shape)}, cov {tuple(self.cov.shape)}; they must be (d,) and (d, d)"
            )
        if self.n < 2:
            raise ValueError(f"n is {self.n}; a covariance needs at least 2 images")
        if self.features is not None and (self.features.ndim != 2 or self.features.shape[1] != d):
            raise ValueError(f"features are {tuple(self.features.shape)}; with this mean they must be (m, {d})")

    @classmethod
    def from_features(cls, features: Tensor) -> "RealFeatures":
        """Statistics of (N, d) features, in float64."""
        if len(features) < 2:
            raise ValueError(f"{len(features)} images given; a covariance needs at least 2")
        mean, cov = moments(features.double())
        return cls(mean, cov, len(features), features)

    @classmethod
    def from_images(cls, images: Tensor, network: nn.Module) -> "RealFeatures":
        """Statistics of (N, C, H, W) images, uint8 [0, 255] or float [-1, 1], under ``network``."""
        return cls.from_features(extract_features(images, network))

    def save(self, path: str | Path, notes: dict[str, Any] | None = None) -> None:
        """Write safetensors; ``features`` keep their dtype; ``n`` is in the header, next to ``notes`` (JSON values)."""
        tensors = {"mean": self.mean, "cov": self.cov}
        if self.features is not None:
            tensors["features"] = self.features
        _write_safetensors(path, tensors, FEATURES_FORMAT, (notes or {}) | {"n": self.n})

    @classmethod
    def load(cls, path: str | Path) -> "RealFeatures":
        """Read what ``save`` wrote. FileNotFoundError: no such file. ValueError: something else in it, or damage."""
        tensors, header = _read_safetensors(path, FEATURES_FORMAT)
        try:
            if not all(value.is_floating_point() for value in tensors.values()) or not is_whole(header["n"], 2):
                raise ValueError(f"n is {header['n']!r}, or its statistics are no floating-point numbers")
            return cls(tensors["mean"], tensors["cov"], header["n"], tensors.get("features"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error


def features_in(folder: str | Path) -> tuple[nn.Module, RealFeatures]:
    """The feature network and its statistics of real images that ``pqcad_ao.recipes.train_classifier`` wrote.

    Raises:
        FileNotFoundError: they are not there. ValueError: damaged.
    """
    folder = Path(folder)
    return load_classifier(folder / "classifier.safetensors"), RealFeatures.load(folder / "features_test.safetensors")


def embedded_features() -> tuple[nn.Module, RealFeatures]:
    """The Fashion-MNIST feature network that is part of this package, and its statistics of the 10,000 test images."""
    return features_in(asset_path("fashion_mnist"))


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are {tuple(images.shape)}; allowed is (N, C, H, W) with C = 1 (grey) or 3 (RGB)")
    if len(images) < 2:
        raise ValueError(f"{len(images)} images given; a covariance needs at least 2")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; allowed are uint8 in [0, 255] and floating point in [-1, 1]")
    bad = len(images) - int(images.isfinite().flatten(1).all(1).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(images)} images hold NaN or infinite values; allowed are finite values in [-1, 1]"
        )
    low, high = images.min().item(), images.max().item()
    if low >= 0 and high > 2:
        raise ValueError(f"float images span [{low:g}, {high:g}]; allowed is [-1, 1]. Give images of [0, 255] as uint8")


@torch.no_grad()
def extract_features(
    images: Tensor, network: nn.Module, batch_size: int = 500, *, share: tuple[int, int] = (0, 1)
) -> Tensor:
    """Features of images, in one pass.

    Floating-point images are clipped and rounded to 256 levels first, as a saved picture would be: the same pictures
    give the same features in either form.

    Args:
        images: (N, C, H, W), uint8 in [0, 255] or floating point in [-1, 1]; C is 1 or 3; N at least 2.
        network: a ``FeatureClassifier``, or anything called as ``f(float images in [-1, 1])`` that returns (N, d). Put
            in ``eval`` mode for the call.
        share: (rank, world) of this process where several, that have all images, look at a part each and call this
            alike: all of them get all features.

    Returns:
        (N, d) on the CPU.

    Raises:
        ValueError: other images, or features that are not (N, d) or not finite.
    """
    _check_images(images)
    call = network.features if isinstance(network, FeatureClassifier) else network
    device = next((tensor.device for tensor in itertools.chain(network.parameters(), network.buffers())), images.device)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        chunks = []
        for chunk in images.split(batch_size)[share[0] :: share[1]]:
            pixels = chunk if chunk.dtype == torch.uint8 else to_uint8(chunk)
            chunks.append(call(to_unit(pixels.to(device))).cpu())
    finally:
        for module, mode in modes:
            module.training = mode
    features = torch.cat(chunks) if share[1] == 1 else rows_of_all(chunks, torch.device("cpu"))
    if features.ndim != 2 or len(features) != len(images):
        raise ValueError(
            f"the feature network made {tuple(features.shape)} of {len(images)} images; it must return (N, d)"
        )
    if not features.isfinite().all():
        raise ValueError("the feature network returned NaN or infinite features")
    return features


def moments(features: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance of (N, d) rows, each row taken ``counts`` times; the counts' sum is N."""
    weights = torch.ones(len(features), dtype=features.dtype) if counts is None else counts.to(features.dtype)
    mean = weights @ features / len(features)
    centred = features - mean
    return mean, (centred * weights[:, None]).T @ centred / (len(features) - 1)
