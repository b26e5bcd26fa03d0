"""Feature caching between sampling steps: the plan of a network that was cut."""

import base64
import binascii
import math
import warnings
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from tabulate import tabulate
from torch import Tensor, nn

from pqcad_ao.utils.checks import is_whole

KEY = "_pqcad_cache"  # of a network, or of its configuration: diffusers saves private entries and warns of no others
FORMAT = 1
MOST = 2**31 - 1  # that a timestep may be


@dataclass(frozen=True)
class CachePlan:
    """At which of a schedule's timesteps a network is computed in full, and what becomes of its feature in between.

    Attributes:
        branch: where the network is cut, as :class:`~pqcad_ao.config.CacheConfig` has it.
        timesteps: (S) of the schedule, falling. sources: (S) the number of the step whose feature each step takes; its
            own where it is computed in full.
        scale, shift: (S, C) float32, feature_s ≈ scale_s · feature_source + shift_s; 1 and 0 without correction.
        staleness: (S) measured: squared distance of the feature that is kept from the one that it stands for, over the
            squared length of that; 0 where a step is computed in full.
        full_macs, shallow_macs: multiply-adds of a sample in a step of each kind.

    Example:
        >>> config = CacheConfig(interval=4, points=4)  # of a length for an example
        >>> kept = cache_(unet, config, scheduler=scheduler, num_inference_steps=4, progress=False)
        >>> CachePlan.from_dict(kept.to_dict()).refresh
        [999]
    """

    branch: int
    timesteps: list
    sources: list[int]
    scale: Tensor
    shift: Tensor
    staleness: list[float]
    full_macs: int
    shallow_macs: int

    @property
    def refresh(self) -> list:
        """The timesteps that are computed in full."""
        return [t for number, t in enumerate(self.timesteps) if self.sources[number] == number]

    @property
    def source(self) -> dict[Any, Any]:
        """Each other timestep, and the one whose feature it takes."""
        taken = {t: self.timesteps[source] for t, source in zip(self.timesteps, self.sources, strict=True)}
        return {t: source for t, source in taken.items() if t != source}

    @property
    def mean_macs(self) -> float:
        """Multiply-adds of a sample in an average step."""
        full = len(self.refresh)
        return (full * self.full_macs + (len(self.timesteps) - full) * self.shallow_macs) / len(self.timesteps)

    def check(self, timesteps: list) -> None:
        """Raises ValueError: the plan was measured for another walk than one through ``timesteps``."""
        pairs = zip(self.timesteps, timesteps, strict=False)
        if len(timesteps) != len(self.timesteps) or not all(math.isclose(*pair, rel_tol=1e-6) for pair in pairs):
            raise ValueError(
                f"the cache plan was measured for the timesteps {self.timesteps}, and this walk visits {timesteps}: "
                f"use num_inference_steps={len(self.timesteps)} and the scheduler that cache_ was given, call cache_ "
                "again, or leave the plan out with cache=None"
            )

    def __str__(self) -> str:
        rows = [
            (t, self.timesteps[source] if source != number else "computed in full", f"{stale:.3f}" if stale else "")
            for number, (t, source, stale) in enumerate(zip(self.timesteps, self.sources, self.staleness, strict=True))
        ]
        share, mean = self.shallow_macs / self.full_macs, self.mean_macs / self.full_macs
        return (
            f"{tabulate(rows, ('timestep', 'takes the feature of', 'staleness'))}\n\n"
            f"{self.full_macs / 1e6:.4g} million multiply-adds in full, {share:.1%} of them with a feature that is "
            f"kept, {mean:.1%} in an average step"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the tables, little-endian float32, in base64."""
        tables = torch.stack([self.scale, self.shift]).numpy().astype("<f4").tobytes()
        return {
            "format": FORMAT,
            "branch": self.branch,
            "timesteps": self.timesteps,
            "sources": self.sources,
            "channels": self.scale.shape[1],
            "tables": base64.b64encode(tables).decode(),
            "crc32": f"{zlib.crc32(tables):08x}",
            "staleness": self.staleness,
            "macs": [self.full_macs, self.shallow_macs],
        }

    @classmethod
    def from_dict(cls, values: Any) -> "CachePlan":
        """Invert :meth:`to_dict`.

        Raises:
            ValueError: made by another version, incomplete, or with values out of range.
        """
        try:
            return cls._read(dict(values))
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, binascii.Error) as error:
            raise ValueError(f"the network's cache plan is damaged: {error!r}") from error

    @classmethod
    def _read(cls, values: dict[str, Any]) -> "CachePlan":
        if values["format"] != FORMAT:
            raise ValueError(f"it is of format {values['format']!r}; this pqcad_ao reads format {FORMAT}")
        timesteps, sources, staleness = (list(values[name]) for name in ("timesteps", "sources", "staleness"))
        tables = base64.b64decode(values["tables"], validate=True)
        if f"{zlib.crc32(tables):08x}" != values["crc32"]:
            raise ValueError("its tables are not those that were written, by their checksum")
        scale, shift = torch.frombuffer(bytearray(tables), dtype=torch.float32).view(2, len(timesteps), -1)
        macs = values["macs"]
        sound = (
            len(timesteps) == len(sources) == len(staleness)
            and all(is_whole(t, 0, MOST) or (isinstance(t, float) and 0 <= t <= MOST) for t in timesteps)
            and all(a > b for a, b in pairwise(timesteps))
            and are_sources(sources, len(timesteps))
            and all(isinstance(stale, float) and stale >= 0 for stale in staleness)
            and scale.shape[1] == values["channels"]
            and bool(scale.isfinite().all() and shift.isfinite().all())
            and len(macs) == 2
            and all(is_whole(count, most=2**62) for count in (values["branch"], *macs))
        )
        if not sound:
            raise ValueError("its values are out of range")
        return cls(values["branch"], timesteps, sources, scale.clone(), shift.clone(), staleness, *macs)


def cache_plan(model: Any) -> CachePlan | None:
    """What :func:`~pqcad_ao.cache.cache_` measured on a network, or None.

    Raises:
        ValueError: as :meth:`CachePlan.from_dict`, of a network that was loaded.
    """
    values = model.config.get(KEY) if isinstance(model, ConfigMixin) else getattr(model, KEY, None)
    return None if values is None else CachePlan.from_dict(values)


def attach_cache_plan(model: nn.Module, plan: CachePlan) -> None:
    """Let a network remember its plan; a diffusers model in its configuration, with which it is saved."""
    if isinstance(model, ConfigMixin):
        model.register_to_config(**{KEY: plan.to_dict()})
    else:
        setattr(model, KEY, plan.to_dict())


def drop_cache_plan(model: nn.Module, doing: str) -> None:
    """Let a network that changes forget its plan, which was measured on what it was before, and say so."""
    if cache_plan(model) is None:
        return
    warnings.warn(
        f"{doing} changes what the network's cache plan was measured on: the plan is dropped, call cache_ again",
        stacklevel=3,
    )
    if isinstance(model, ConfigMixin):
        model._internal_dict = FrozenDict({name: value for name, value in model.config.items() if name != KEY})
    else:
        delattr(model, KEY)


def uniform_starts(steps: int, interval: int) -> list[int]:
    """The steps that are computed in full, every ``interval``-th from the first on."""
    return list(range(0, steps, interval))


def group_costs(distance: Tensor, weight: Tensor) -> Tensor:
    """What a group of steps costs that all take the feature of its first.

    Args:
        distance: (S, S) of the feature of step i from that of step s > i. weight: (S,) of an error at each step.

    Returns:
        (S, S) float64: of the group from step i to step j.
    """
    return (distance.double() * weight.double()).triu(1).cumsum(1)


def optimal_starts(costs: Tensor, interval: int) -> list[int]:
    """The steps to compute in full, as many as :func:`uniform_starts` has, at the least sum of their groups' costs.

    A dynamic programme (Liu et al. 2025, CacheQuant's DPS): groups of consecutive steps, up to 2·interval long.

    Args:
        costs: (S, S), see :func:`group_costs`.
    """
    steps = len(costs)
    table, groups = costs.tolist(), -(-steps // interval)
    best = {0: (0.0, list[int]())}  # of so many groups: steps that they cover to their cost and starts
    for _ in range(groups):
        longer: dict[int, tuple[float, list[int]]] = {}
        for start, (cost, starts) in best.items():
            for end in range(start + 1, min(start + 2 * interval, steps) + 1):
                whole = cost + table[start][end - 1]
                if end not in longer or whole < longer[end][0]:
                    longer[end] = (whole, [*starts, start])
        best = longer
    return best[steps][1]


def sources_of(starts: list[int], steps: int) -> list[int]:
    """For every step the one whose feature it takes."""
    return [max(start for start in starts if start <= step) for step in range(steps)]


def are_sources(sources: list[Any], steps: int) -> bool:
    """Whether these are :func:`sources_of` so many steps."""
    if len(sources) != steps or not all(is_whole(source, 0) for source in sources):
        return False
    starts = [number for number, source in enumerate(sources) if source == number]
    return starts[:1] == [0] and sources == sources_of(starts, steps)


def corrected_feature(feature: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """A feature that was kept, as it is to be taken: scale and shift (1, C, 1, 1) float32."""
    return (feature * scale + shift).to(feature.dtype)
