"""How good images and predictions are: a feature network, FID and KID, precision and recall, SQNR over trajectories."""

import itertools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pqcad_ao.data import to_uint8, to_unit
from pqcad_ao.sampling import predict

CLASSIFIER_FORMAT = "pqcad_ao.FeatureClassifier"
FEATURES_FORMAT = "pqcad_ao.RealFeatures"
NEIGHBOURS = 3  # k of precision and recall (Kynkäänniemi et al. 2019, §4)


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
    save_file(contiguous, path, {kind: json.dumps(header, sort_keys=True)})


def _read_safetensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written as ``kind``; ValueError if it is anything else."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file or is damaged ({error})") from error
    if kind not in metadata:
        raise ValueError(f"{path} holds no {kind}: its header names {', '.join(sorted(metadata)) or 'nothing'}")
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path} is damaged: {', '.join(broken)} holds values that are not finite")
    try:
        header = json.loads(metadata[kind])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its header is no JSON ({error})") from error
    return tensors, header


def load_classifier(path: str | Path) -> FeatureClassifier:
    """Read what ``FeatureClassifier.save`` wrote; the network comes frozen and in ``eval`` mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such network in it, or a damaged one.
    """
    tensors, header = _read_safetensors(path, CLASSIFIER_FORMAT)
    try:
        with torch.device("meta"):  # neither memory for a header that lies, nor a draw from the user's random numbers
            network = FeatureClassifier(**header["architecture"])
        network.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: weights and architecture do not belong together ({error})") from error
    return network.requires_grad_(False).eval()


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
        mean, cov = _moments(features.double())
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
            return cls(tensors["mean"], tensors["cov"], header["n"], tensors.get("features"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error


def embedded_features() -> tuple[nn.Module, RealFeatures]:
    """The Fashion-MNIST feature network that is part of this package, and its statistics of the 10,000 test images."""
    folder = resources.files("pqcad_ao") / "assets" / "fashion_mnist"
    with (
        resources.as_file(folder / "classifier.safetensors") as classifier,
        resources.as_file(folder / "features_test.safetensors") as features,
    ):
        return load_classifier(classifier), RealFeatures.load(features)


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
def extract_features(images: Tensor, network: nn.Module, batch_size: int = 500) -> Tensor:
    """Features of images, in one pass.

    Floating-point images are clipped and rounded to 256 levels first, as a saved picture would be: the same pictures
    give the same features in either form.

    Args:
        images: (N, C, H, W), uint8 in [0, 255] or floating point in [-1, 1]; C is 1 or 3; N at least 2.
        network: a ``FeatureClassifier``, or anything called as ``f(float images in [-1, 1])`` that returns (N, d). Put
            in ``eval`` mode for the call.

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
        for chunk in images.split(batch_size):
            pixels = chunk if chunk.dtype == torch.uint8 else to_uint8(chunk)
            chunks.append(call(to_unit(pixels.to(device))).cpu())
    finally:
        for module, mode in modes:
            module.training = mode
    features = torch.cat(chunks)
    if features.ndim != 2 or len(features) != len(images):
        raise ValueError(
            f"the feature network made {tuple(features.shape)} of {len(images)} images; it must return (N, d)"
        )
    if not features.isfinite().all():
        raise ValueError("the feature network returned NaN or infinite features")
    return features


def _moments(features: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance of (N, d) rows, each row taken ``counts`` times; the counts' sum is N."""
    weights = torch.ones(len(features), dtype=features.dtype) if counts is None else counts.to(features.dtype)
    mean = weights @ features / len(features)
    centred = features - mean
    return mean, (centred * weights[:, None]).T @ centred / (len(features) - 1)


def _frechet_to(mean: Tensor, cov: Tensor) -> Callable[[Tensor, Tensor], float]:
    """Squared Fréchet distance between N(mean, cov) and others (Dowson & Landau 1982), float64.

    The trace of (Σ Σ')^½ is taken from the symmetric Σ^½ Σ' Σ^½; Σ^½ is worked out once for all the others.
    """
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T

    def distance(other_mean: Tensor, other_cov: Tensor) -> float:
        cross = torch.linalg.eigvalsh(root @ other_cov @ root).clamp_min(0).sqrt().sum()
        return ((mean - other_mean).square().sum() + cov.trace() + other_cov.trace() - 2 * cross).item()

    return distance


def _frechet_interval(features: Tensor, real: RealFeatures, fid: float, seed: int, draws: int) -> list[float]:
    """95 % bootstrap interval of the FID of (N, d) float64 features, centred on ``fid``.

    FID grows as the number of images falls, and a resample holds fewer distinct images than the set it is drawn from:
    raw percentiles of a few hundred images can lie wholly above the FID itself. The draws' mean is therefore moved onto
    ``fid``, so that the interval speaks of the scatter of FID at this number of images. Close to FID's floor it is
    too wide.
    """
    generator = torch.Generator().manual_seed(seed)
    distance = _frechet_to(real.mean.double(), real.cov.double())
    n = len(features)
    values = torch.empty(draws, dtype=torch.float64)
    for draw in range(draws):
        counts = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n)
        values[draw] = distance(*_moments(features, counts))
    low, high = (values - values.mean() + fid).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [max(0.0, low), high]


def fid_kid(
    images: Tensor, network: nn.Module, real: RealFeatures, *, seed: int = 0, bootstrap: int = 0
) -> dict[str, Any]:
    """FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018) of generated images by torchmetrics.

    The values depend on the feature network and, for FID, on the number of images: compare only what shares both. Wants
    torchmetrics; checked against 1.9.0.

    Args:
        images: (N, C, H, W), uint8 in [0, 255] or floating point in [-1, 1] (see ``extract_features``).
        network: a ``FeatureClassifier``, or anything called as ``f(float images in [-1, 1])`` that returns (N, d).
        real: statistics of the real images under the same network.
        seed: of KID's subsets and of the bootstrap; the global random numbers are left as they are.
        bootstrap: number of resamples of the generated images behind ``fid_ci``; 0 for none.

    Returns:
        ``fid``; ``kid`` and ``kid_std``, mean and standard deviation over 100 subsets of up to 1,000 images (None where
        ``real`` holds no features); ``n``; and with ``bootstrap``, ``fid_ci``: [low, high], 95 %, percentiles of the
        resamples' FID less the resamples' bias.

    Raises:
        ImportError: no torchmetrics.
        ValueError: images or statistics that do not fit.
    """
    return _fid_kid(extract_features(images, network), real, seed, bootstrap)


def _fid_kid(features: Tensor, real: RealFeatures, seed: int, bootstrap: int) -> dict[str, Any]:
    """:func:`fid_kid` of (N, d) features."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise ImportError("FID and KID need torchmetrics: pip install pqcad_ao[eval]") from error
    if bootstrap < 0:
        raise ValueError(f"bootstrap is {bootstrap}; allowed are 0 (no interval) and positive numbers of resamples")
    features = features.double()
    n, d = features.shape
    if real.mean.shape != (d,):
        raise ValueError(
            f"the network has {d} features, the real statistics {len(real.mean)}: they are another network's"
        )

    given = nn.Identity()  # torchmetrics' feature network: the features are there already
    given.num_features = d  # type: ignore[assignment]
    mean, cov = real.mean.double().cpu(), real.cov.double().cpu()
    frechet = FrechetInceptionDistance(feature=given)
    frechet.real_features_sum = mean * real.n
    frechet.real_features_cov_sum = cov * (real.n - 1) + real.n * mean.outer(mean)
    frechet.real_features_num_samples = torch.tensor(real.n)
    frechet.update(features, real=False)
    fid = frechet.compute().item()

    kid = kid_std = None
    if real.features is not None:
        subset = min(1000, n, len(real.features))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", UserWarning)  # that features are kept in memory
            torch.manual_seed(seed)
            kernel = KernelInceptionDistance(feature=given, subset_size=subset)
            kernel.real_features = [real.features.double().cpu()]
            kernel.update(features, real=False)
            kid, kid_std = (value.item() for value in kernel.compute())
    result: dict[str, Any] = {"fid": fid, "kid": kid, "kid_std": kid_std, "n": n}
    if bootstrap:
        result["fid_ci"] = _frechet_interval(features, RealFeatures(mean, cov, real.n), fid, seed, bootstrap)
    return result


def precision_recall(real_features: Tensor, fake_features: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1-2).

    Each set's manifold is the union of the balls around its points that reach to their k-th nearest neighbour within
    the set. Distances are taken 1,000 rows at a time: 10,000 against 10,000 points need some 200 MB.

    Args:
        real_features: (N, d). fake_features: (M, d). k: at least 1, and below N and M.

    Returns:
        ``precision``: part of the fake points inside the real manifold; ``recall``: part of the real in the fake's.
    """
    if real_features.ndim != 2 or fake_features.ndim != 2 or real_features.shape[1] != fake_features.shape[1]:
        shapes = f"{tuple(real_features.shape)} and {tuple(fake_features.shape)}"
        raise ValueError(f"features are {shapes}; allowed are (N, d) and (M, d) of one network")
    if not 1 <= k < min(len(real_features), len(fake_features)):
        raise ValueError(
            f"k is {k} with {len(real_features)} real and {len(fake_features)} fake; allowed is 1 <= k < both"
        )
    if not (real_features.isfinite().all() and fake_features.isfinite().all()):
        raise ValueError("features hold NaN or infinite values")
    real, fake = real_features.double(), fake_features.double()  # in float32, cdist gives equal points a distance

    def radii(points: Tensor) -> Tensor:  # the point itself comes first, hence k + 1
        return torch.cat([torch.cdist(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(1000)])

    def covered(points: Tensor, centres: Tensor) -> float:
        reach = radii(centres)
        inside = [(torch.cdist(rows, centres) <= reach).any(1) for rows in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    return {"precision": covered(fake, real), "recall": covered(real, fake)}


def image_quality(
    images: Tensor, network: nn.Module, real: RealFeatures, *, seed: int = 0, bootstrap: int = 0
) -> dict[str, Any]:
    """Everything that is said of generated images: :func:`fid_kid` and :func:`precision_recall`, in one dictionary.

    ``precision`` and ``recall`` are None where ``real`` holds no features, as ``kid`` is, or there are too few images.
    """
    features = extract_features(images, network)
    found = _fid_kid(features, real, seed, bootstrap)
    if real.features is None or min(len(features), len(real.features)) <= NEIGHBOURS:
        return {**found, "precision": None, "recall": None}
    return {**found, **precision_recall(real.features, features)}


def _db(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _powers(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of the reference and of the difference, one per row, float64."""
    if reference.shape != other.shape:
        raise ValueError(f"reference is {tuple(reference.shape)}, other {tuple(other.shape)}; the shapes must be equal")
    if not (reference.isfinite().all() and other.isfinite().all()):
        raise ValueError("SQNR of NaN or infinite values is not defined; look for them in reference and other")
    reference, other = (tensor.detach().double().unsqueeze(-1).flatten(1) for tensor in (reference, other))
    return reference.square().sum(1), (reference - other).square().sum(1)


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization-noise ratio 10 log10(Σ ref² / Σ (ref − other)²) in dB; inf where both are equal.

    Args:
        reference, other: of one shape, any dtype; finite.
    """
    signal, noise = _powers(reference[None], other[None])
    return _db(signal.item(), noise.item())


@torch.no_grad()
def trajectory_sqnr(
    reference_fn: nn.Module, other_fn: nn.Module, inputs: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float | dict[float, float]]:
    """SQNR of one network's predictions against another's, on recorded points of sampling trajectories.

    Args:
        reference_fn, other_fn: called as ``f(x_t, timestep)``; whatever ``pqcad_ao.sampling.predict`` understands.
        inputs: pairs of x_t (B, C, H, W) and timestep, 0-d or (B,); a batch may mix timesteps.

    Returns:
        ``sqnr_db`` over everything, and ``per_step``: {timestep: dB}, noisiest timestep first. Powers are summed before
        the ratio is taken: a point with a large prediction weighs more.
    """
    if not inputs:
        raise ValueError("no inputs given; record at least one pair of x_t and timestep")
    totals: dict[float, list[float]] = {}
    for x_t, timestep in inputs:
        signal, noise = _powers(predict(reference_fn, x_t, timestep), predict(other_fn, x_t, timestep))
        steps = torch.as_tensor(timestep).cpu().expand(len(x_t)).tolist()
        for step, *power in zip(steps, signal.tolist(), noise.tolist(), strict=True):
            total = totals.setdefault(step, [0.0, 0.0])
            total[0] += power[0]
            total[1] += power[1]
    overall = _db(*(math.fsum(column) for column in zip(*totals.values(), strict=True)))
    return {"sqnr_db": overall, "per_step": {step: _db(*totals[step]) for step in sorted(totals, reverse=True)}}
