"""Feature caching between sampling steps: the walk that follows a plan."""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pqcad_ao.diffusion.cache_plan import CachePlan

FOLLOWS = 1e-3  # relative, what rounding may leave of a sampler's step that is looked for
MEMORY = 4  # calls that a solver of several steps makes one of
ROUNDING = 2**-7  # relative, of timesteps that are fractions, or are handed over scaled and in bfloat16

Full = Callable[[Tensor, Tensor, dict[str, Any]], tuple[Tensor, Tensor]]
Shallow = Callable[[Tensor, Tensor, dict[str, Any], Tensor, Tensor, Tensor], Tensor]


@dataclass
class _Way:
    """How far pictures under one conditioning have come.

    Attributes:
        x_t: of the last call. next: the number of the step that must follow. feature: that is kept, or None.
        walks: that are under way; of more than one nothing is kept, for their calls cannot be told apart.
        calls: x_t and prediction of the last ones, on the CPU.
    """

    x_t: Tensor
    conditioning: dict[str, Any]
    next: int
    feature: Tensor | None = None
    walks: int = 1
    calls: list[tuple[Tensor, ...]] = field(default_factory=list)

    def leads_to(self, x_t: Tensor) -> bool:
        """Whether a sampler's step made ``x_t`` of these calls: it is a sum of their x_t and predictions then.

        Every deterministic solver's step is one, of the last call or, with several steps, of up to ``MEMORY``. Under
        guidance predictions are those of each part of a batch that holds the pictures twice or three times.
        """
        columns: list[Tensor] = []
        for given, predicted in reversed(self.calls):
            times = next(n for n in (3, 2, 1) if _repeats(given, n))
            predicted = predicted[:, : given.shape[1]]
            parts = predicted.chunk(times) if predicted.shape == given.shape else ()
            more = [given, *(part.repeat(times, *[1] * (part.dim() - 1)) for part in parts)]
            if len(columns) + len(more) > x_t.numel() // 4:  # of which anything could be a sum
                break
            columns += more
        if not columns:
            return False
        known = torch.stack([column.flatten().double() for column in columns], 1)
        known = known / known.norm(dim=0).clamp_min(1e-30)
        made = x_t.detach().cpu().flatten().double()
        products = torch.linalg.pinv(known.T @ known, rtol=1e-12, hermitian=True)
        left = made - known @ (products @ (known.T @ made))
        return bool(left.norm() <= (FOLLOWS + 4 * torch.finfo(x_t.dtype).eps) * made.norm())


class Walk:
    """A network on its way through a schedule, called as ``f(x_t, timestep, **conditioning) -> prediction``.

    It is computed in full at the plan's refresh timesteps. At others it is computed in its outermost blocks alone,
    with the feature of the timestep that the plan says, where the steps since then came one after the other, for as
    many pictures of one size and under equal conditioning. Everything else is computed in full: timesteps that the plan
    does not know, a batch of several timesteps, and walks of pictures alike that take turns.

    A walk that was broken off leaves its feature behind. Unless ``declared``, a call takes it only where its x_t is
    what a sampler's step makes of the calls before; after a step that clips, or draws noise, that cannot be seen.

    Args:
        full: ``f(x_t, timesteps, conditioning) -> (prediction, feature)`` with (B,) timesteps of the scheduler.
        shallow: ``f(x_t, timesteps, conditioning, feature, scale, shift) -> prediction`` with (1, C, 1, 1) tables.
        time_scale: what the walk is called with, a timestep of the scheduler times this.
        declared: that all calls are of one walk, from its first step on.
    """

    def __init__(
        self, plan: CachePlan, full: Full, shallow: Shallow, time_scale: float = 1.0, *, declared: bool = False
    ) -> None:
        self.plan, self.full, self.shallow, self.time_scale = plan, full, shallow, time_scale
        self.declared = declared
        self.scaled = time_scale != 1 or any(isinstance(t, float) for t in plan.timesteps)
        self._ways: list[_Way] = []

    def __call__(self, sample: Tensor, timestep: Tensor | float, **conditioning: Any) -> Tensor:
        timesteps = torch.as_tensor(timestep).reshape(-1)
        if self.time_scale != 1:
            timesteps = timesteps * (1 / self.time_scale)
        step = self._step_of(timesteps)
        if step is None:
            return self.full(sample, timesteps.to(sample.device).expand(len(sample)), conditioning)[0]
        known = torch.full((len(sample),), self.plan.timesteps[step], device=sample.device)
        way, last = self._way(step, sample, conditioning), step == len(self.plan.timesteps) - 1
        refreshes = self.plan.sources[step] == step
        if refreshes or way.feature is None:
            prediction, feature = self.full(sample, known, conditioning)
            way.feature = feature if refreshes and way.walks == 1 else None
        else:
            line = (_row(table, step, way.feature) for table in (self.plan.scale, self.plan.shift))
            prediction = self.shallow(sample, known, conditioning, way.feature, *line)
        if not self.declared:
            both = (way.x_t, prediction)
            way.calls = [*way.calls[1 - MEMORY :], tuple(value.detach().to("cpu", copy=True) for value in both)]
        if last:
            way.walks -= 1
            self._ways = [other for other in self._ways if other.walks]
        return prediction

    def _step_of(self, timesteps: Tensor) -> int | None:
        """The number of the step that all of a batch are at; None where they differ, or the plan does not know it."""
        values = set(timesteps.tolist())
        if len(values) > 1:
            return None
        value, known = values.pop(), self.plan.timesteps
        nearest = min(range(len(known)), key=lambda number: abs(known[number] - value))
        if abs(known[nearest] - value) <= (ROUNDING * known[nearest] if self.scaled else 0):
            return nearest
        warnings.warn(
            f"the cache plan was measured for {len(known)} timesteps, {known[0]:g} to {known[-1]:g}, and is asked for "
            f"others, which are computed in full: sample with cache_'s scheduler in {len(known)} steps",
            stacklevel=4,
        )
        return None

    def _way(self, step: int, sample: Tensor, conditioning: dict[str, Any]) -> _Way:
        """The way on which a call is the next one; it is one step further then."""
        alike = (w for w in self._ways if w.x_t.shape == sample.shape and _equal(w.conditioning, conditioning))
        way = next(alike, None)
        if way is None:
            way = _Way(sample, conditioning, step)
            self._ways.append(way)
        elif way.walks > 1:
            way.walks += step == 0
        elif step != way.next and not (step == way.next - 1 and torch.equal(way.x_t, sample)):
            way.walks, way.feature = 2, None
            warnings.warn(
                "another walk through the schedule begins before the one before it is over, and its calls cannot be "
                "told from those: both are computed in full. Where that one was broken off, call forget(); where they "
                "take turns, give each a begin_walk() of its own, as pqcad_ao.diffusion.sampling.sample does",
                stacklevel=4,
            )
        elif step == way.next and not (self.declared or way.leads_to(sample)):
            way.calls = []
            if way.feature is not None and self.plan.sources[step] != step:
                warnings.warn(
                    "what comes is not what a sampler's step makes of the calls before: another walk may begin, or the "
                    "step clips or draws noise. It is computed in full. Where all are of one walk, say so: "
                    "with cached.one_walk(): pipeline(...)",
                    stacklevel=4,
                )
            way.feature = None
        way.x_t, way.next = sample.clone(), step + 1
        return way


class ThreadsWalk(threading.local):
    """The walk that each thread is on; a copy is on none."""

    walk: Walk | None = None

    def __reduce__(self) -> tuple[type["ThreadsWalk"], tuple[()]]:
        return ThreadsWalk, ()


def _row(table: Tensor, step: int, feature: Tensor) -> Tensor:
    """A step's row of a table, (1, C, 1, 1)."""
    return table[step].to(feature.device).view(1, -1, 1, 1)


def _repeats(value: Tensor, times: int) -> bool:
    """Whether a batch holds the same samples so many times over."""
    if len(value) % times:
        return False
    first, *others = value.chunk(times)
    return all(torch.equal(first, other) for other in others)


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    (values, spec), (others, other_spec) = tree_flatten(one), tree_flatten(other)
    return spec == other_spec and all(map(_same, values, others))


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    tensors = isinstance(one, Tensor), isinstance(other, Tensor)
    return torch.equal(one, other) if all(tensors) else not any(tensors) and bool(one == other)
