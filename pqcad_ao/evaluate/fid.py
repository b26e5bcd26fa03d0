"""How good images are: FID and KID, precision and recall, in the space of a feature network."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao.evaluate.features import RealFeatures, extract_features, moments

NEIGHBOURS = 3  # k of precision and recall (Kynkäänniemi et al. 2019, §4)


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
        values[draw] = distance(*moments(features, counts))
    low, high = (values - values.mean() + fid).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [max(0.0, low), high]


def fid_kid(features: Tensor, real: RealFeatures, *, seed: int = 0, bootstrap: int = 0) -> dict[str, Any]:
    """FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018) of generated images by torchmetrics, of their features.

    The values depend on the feature network and, for FID, on the number of images: compare only what shares both. Wants
    torchmetrics; checked against 1.9.0.

    Args:
        features: (N, d) of the images, of :func:`~pqcad_ao.evaluate.features.extract_features`.
        real: statistics of the real images under the same network.
        seed: of KID's subsets and of the bootstrap; the global random numbers are left as they are.
        bootstrap: number of resamples of the generated images behind ``fid_ci``; 0 for none.

    Returns:
        ``fid``; ``kid`` and ``kid_std``, mean and standard deviation over 100 subsets of up to 1,000 images (None where
        ``real`` holds no features); ``n``; and with ``bootstrap``, ``fid_ci``: [low, high], 95 %, percentiles of the
        resamples' FID less the resamples' bias.

    Raises:
        ImportError: no torchmetrics.
        ValueError: features or statistics that do not fit.
    """
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
    # of several processes each has all features, and torchmetrics would take the sum over processes for more of them
    frechet = FrechetInceptionDistance(feature=given, sync_on_compute=False)
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
            kernel = KernelInceptionDistance(feature=given, subset_size=subset, sync_on_compute=False)
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
    images: Tensor, network: nn.Module, real: RealFeatures, *, share: tuple[int, int] = (0, 1), **options: int
) -> dict[str, Any]:
    """Everything that is said of generated images: :func:`fid_kid` and :func:`precision_recall`, in one dictionary.

    ``precision`` and ``recall`` are None where ``real`` holds no features, as ``kid`` is, or there are too few images.

    Args:
        images, network, share: as for :func:`~pqcad_ao.evaluate.features.extract_features`.
        real, options: as for :func:`fid_kid`.
    """
    features = extract_features(images, network, share=share)
    quality = fid_kid(features, real, **options)
    if real.features is None or min(len(features), len(real.features)) <= NEIGHBOURS:
        return {**quality, "precision": None, "recall": None}
    return {**quality, **precision_recall(real.features, features)}
