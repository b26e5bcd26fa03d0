"""``cache_``: measures at which sampling steps a network may take the deep feature of a step before, and how."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from pqcad_ao import denoiser
from pqcad_ao.config import CacheConfig
from pqcad_ao.denoiser import (
    cast_floats,
    check_conditioning,
    guided,
    placement,
    set_time_scale,
    spread_rows,
    time_scale,
)
from pqcad_ao.diffusion.cache_plan import (
    CachePlan,
    attach_cache_plan,
    corrected_feature,
    group_costs,
    optimal_starts,
    sources_of,
    uniform_starts,
)
from pqcad_ao.diffusion.correction import drop_correction
from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.noise import process_of
from pqcad_ao.diffusion.process import as_sampler, check_counted, find_scheduler, span_of
from pqcad_ao.diffusion.sampling import overflow
from pqcad_ao.diffusion.schedule import steps_to_bind
from pqcad_ao.graph.capture import capture
from pqcad_ao.graph.suitable import check_network
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.passes.cache_split import cache_split
from pqcad_ao.utils.progress import tqdm

RIDGE = 1e-4  # of the mean variance of a feature's channels
LARGEST_SCALE = 2.0


def cache_(
    unet: nn.Module,
    config: CacheConfig | None = None,
    *,
    scheduler: Any = None,
    num_inference_steps: int | None = None,
    reference: nn.Module | None = None,
    conditioning: dict[str, Any] | None = None,
    sample_shape: tuple[int, ...] | None = None,
    progress: bool = True,
) -> CachePlan:
    """Measure a network's cache plan on its own trajectories, and let the network remember it.

    The network itself is called as before and answers as before; :class:`~pqcad_ao.cached_unet.CachedUNet` follows the
    plan. ``save_pretrained`` saves the plan with a diffusers model, ``save_quantized`` with others; ``quantize_`` and
    ``distill_`` drop it, for the network is another one then.

    Args:
        unet: a network with skip concatenations, quantized or not. config: ``CacheConfig()`` if None.
        scheduler: with which it will sample; None: the one saved beside it. Its timesteps are walked with DDIM.
        num_inference_steps: None: as many as the network was distilled for, or else 20.
        reference: the full-precision network that a quantized one was made from: what is kept is corrected towards its
            feature, and with that for quantization's error as well. None: towards the network's own.
        conditioning, sample_shape: as for :func:`~pqcad_ao.quantize.quantize_`.
        progress: show a bar.

    Raises:
        ValueError: the network has no such branch to be cut at, a scheduler without timesteps that fall step by step,
            other steps than the network was distilled for, a reference of another structure, conditioning missing, a
            pipeline, or a network that is wrapped already.
        FloatingPointError: the sampler left the finite numbers.

    Example:
        >>> config = CacheConfig(points=4)  # of a length for an example
        >>> kept = cache_(quantized, config, scheduler=scheduler, num_inference_steps=4, progress=False)
        >>> kept.refresh, kept.source
        ([999, 499], {749: 999, 249: 499})
        >>> kept.mean_macs < 0.6 * kept.full_macs
        True
    """
    config = config or CacheConfig()
    for given in (unet, reference):
        if given is not None:
            check_network(given)
    scheduler = find_scheduler(unet) if scheduler is None else scheduler
    if scheduler is None:
        raise ValueError("no scheduler was given, none is saved beside the network: pass the one it samples with")
    schedule = _schedule(unet, scheduler, num_inference_steps)
    continuous = schedule.timesteps.is_floating_point()
    shape = denoiser.sample_shape(unet, sample_shape)
    conditioning = check_conditioning(unet, conditioning)
    if reference is not None:
        set_time_scale(reference, time_scale(unet))
    own, target = _Network(unet, shape, conditioning, config.branch, continuous), None
    if reference is not None:
        target = _Network(reference, shape, conditioning, config.branch, continuous)
        if quantized_state(reference) is not None or target.cut.feature_shape != own.cut.feature_shape:
            raise ValueError(
                f"the reference is quantized, or its feature of {target.cut.feature_shape} is not as the network's of "
                f"{own.cut.feature_shape}: give the full-precision network that it was made from"
            )
    noise = torch.randn(config.points, *shape, generator=torch.Generator().manual_seed(config.seed))
    batches = [
        _Batch(noise[rows].to(own.device), spread_rows(conditioning, rows, config.points))
        for rows in torch.arange(config.points).split(config.batch_size)
    ]
    steps = len(schedule.timesteps) - 1
    walks = 2 if config.schedule == "optimal" else 1
    with torch.no_grad(), tqdm(total=walks * steps * len(batches), disable=not progress, leave=False) as bar:
        starts = uniform_starts(steps, config.interval)
        if config.schedule == "optimal":
            bar.set_description("measuring how the feature changes")
            distance = torch.cat([_distances(own, schedule, batch, bar) for batch in batches], 2).mean(2)
            starts = optimal_starts(group_costs(distance, _reach(schedule).square()), config.interval)
        bar.set_description("fitting the feature")
        fit = _Fit(own, target, schedule, sources_of(starts, steps), config)
        plan = fit.plan(batches, bar)
    if not all(batch.x_t.isfinite().all() for batch in batches):
        raise overflow("measuring a cache plan", placement(unet)[1], scheduler)
    attach_cache_plan(unet, plan)
    drop_correction(unet, "cache_")
    return plan


def _schedule(unet: nn.Module, scheduler: Any, asked: int | None) -> DDIMSchedule:
    """DDIM's steps between a scheduler's own timesteps where these are whole, or else between its sampler's."""
    sampler, state = as_sampler(scheduler), quantized_state(unet)
    check_counted(span_of(sampler), "cache_")
    steps = steps_to_bind(sampler, asked, None if state is None else state.timestep.schedule)
    device = placement(unet)[0]
    schedule = DDIMSchedule.of(sampler, steps, device)
    if not isinstance(sampler, DDIMScheduler):
        return schedule
    walked = copy.deepcopy(scheduler)
    walked.set_timesteps(steps)
    own = torch.as_tensor(walked.timesteps).double()
    if not own.equal(own.round()):
        return schedule
    if not (own.diff() < 0).all():
        raise ValueError(
            f"{type(scheduler).__name__} calls the network more than once at a timestep: pass a scheduler whose "
            "timesteps fall from step to step, such as DDIM's"
        )
    process, timesteps = process_of(sampler), own.long().tolist()
    alphas, sigmas = process.alphas_sigmas(timesteps)
    visited = torch.tensor([*timesteps, process.image], device=device)
    return replace(schedule, timesteps=visited, alphas=alphas.float().to(device), sigmas=sigmas.float().to(device))


def _reach(schedule: DDIMSchedule) -> Tensor:
    """How far an error of the prediction carries over each step, (S,)."""
    steps = torch.arange(len(schedule.timesteps) - 1, device=schedule.timesteps.device)
    free, none = replace(schedule, clip=None), torch.zeros(len(steps), 1, device=steps.device)
    return (
        (free.ddim_step(torch.ones_like(none), none, steps) - free.ddim_step(none, none, steps)).flatten().abs().cpu()
    )


def _step(schedule: DDIMSchedule, prediction: Tensor, x_t: Tensor, step: int) -> Tensor:
    """Where all of a batch are one step on."""
    return schedule.ddim_step(prediction, x_t, torch.full((len(x_t),), step, device=x_t.device))


@dataclass
class _Batch:
    """Trajectories that are walked together: where they are, and the features that are kept of each of the calls."""

    x_t: Tensor
    conditioning: dict[str, Any]
    features: list[Tensor] = field(default_factory=list)


class _Network:
    """A network that was cut, for inputs and outputs in float32. Guidance makes two calls, each with a feature."""

    def __init__(
        self, unet: nn.Module, shape: tuple[int, ...], conditioning: dict[str, Any], branch: int, continuous: bool
    ) -> None:
        self.device, self.dtype = placement(unet)
        conditioning = cast_floats(conditioning, self.dtype)
        self.cut = cache_split(capture(unet, shape, conditioning, continuous=continuous).graph, branch)

    def full(self, batch: _Batch, timestep: Any) -> tuple[Tensor, list[Tensor]]:
        """The prediction, and the feature of each call."""
        features = []

        def call(x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Any]) -> Tensor:
            prediction, feature = self.cut.full(x_t, timesteps, conditioning)
            features.append(feature)
            return prediction.float()

        return self._guided(call, batch, timestep), features

    def shallow(self, batch: _Batch, timestep: Any, features: list[Tensor]) -> Tensor:
        waiting = iter(features)

        def call(x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Any]) -> Tensor:
            return self.cut.shallow(x_t, timesteps, conditioning, next(waiting)).float()

        return self._guided(call, batch, timestep)

    def _guided(self, call: Callable[..., Tensor], batch: _Batch, timestep: Any) -> Tensor:
        timesteps = torch.full((len(batch.x_t),), timestep, device=self.device)
        prediction = guided(call, batch.x_t.to(self.dtype), timesteps, cast_floats(batch.conditioning, self.dtype))
        return prediction[:, : batch.x_t.shape[1]]


def _distances(network: _Network, schedule: DDIMSchedule, start: _Batch, bar: Any) -> Tensor:
    """(S, S, calls), of a batch that is computed in full: ‖F_s - F_i‖² / ‖F_s‖² of each two steps' features."""
    batch, features = replace(start), []
    for step, timestep in enumerate(schedule.timesteps[:-1].tolist()):
        prediction, kept = network.full(batch, timestep)
        features.append(torch.cat(kept).flatten(1).float())
        batch.x_t = _step(schedule, prediction, batch.x_t, step)
        bar.update()
    power = torch.stack([feature.square().sum(1) for feature in features])
    moved = torch.stack([torch.stack([(feature - one).square().sum(1) for feature in features]) for one in features])
    return (moved / power).cpu()


class _Fit:
    """The walk on which tables are fitted, each with all earlier ones in force."""

    def __init__(
        self,
        network: _Network,
        target: _Network | None,
        schedule: DDIMSchedule,
        sources: list[int],
        config: CacheConfig,
    ) -> None:
        self.network, self.target, self.schedule, self.sources, self.config = network, target, schedule, sources, config

    def plan(self, batches: list[_Batch], bar: Any) -> CachePlan:
        """Walk the batches to their pictures, in place."""
        cut, timesteps = self.network.cut, self.schedule.timesteps[:-1].tolist()
        scale, shift = (
            torch.ones(len(timesteps), cut.feature_shape[0]),
            torch.zeros(len(timesteps), cut.feature_shape[0]),
        )
        staleness = [0.0] * len(timesteps)
        for step, timestep in enumerate(timesteps):
            refreshed = self.sources[step] == step
            if not refreshed:
                sums = reduce(add, (_Sums.of(batch.features, self._fresh(batch, timestep)) for batch in batches))
                staleness[step] = sums.staleness
                if self.config.correction == "channel":
                    scale[step], shift[step] = sums.line()
            line = [table[step].view(1, -1, 1, 1).to(self.network.device) for table in (scale, shift)]
            for batch in batches:
                if refreshed:
                    prediction, batch.features = self.network.full(batch, timestep)
                else:
                    corrected = [corrected_feature(feature, *line) for feature in batch.features]
                    prediction = self.network.shallow(batch, timestep, corrected)
                batch.x_t = _step(self.schedule, prediction, batch.x_t, step)
                bar.update()
        return CachePlan(
            self.config.branch, timesteps, self.sources, scale, shift, staleness, cut.full_macs, cut.shallow_macs
        )

    def _fresh(self, batch: _Batch, timestep: Any) -> list[Tensor]:
        """The features that those which are kept stand for."""
        return (self.target or self.network).full(batch, timestep)[1]


@dataclass
class _Sums:
    """What a line from one feature to another takes: sums over pictures and pixels, (C,) float64 each."""

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, kept: list[Tensor], fresh: list[Tensor]) -> "_Sums":
        x, y = (torch.cat(features).double().movedim(1, 0).flatten(1) for features in (kept, fresh))
        sums = (x, y, x * x, x * y, y * y)
        return cls(x.shape[1], *(values.sum(1).cpu() for values in sums))

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(*(own + its for own, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def staleness(self) -> float:
        """‖y - x‖² / ‖y‖²."""
        return float(((self.xx - 2 * self.xy + self.yy).sum() / self.yy.sum().clamp_min(1e-30)).clamp_min(0))

    def line(self) -> tuple[Tensor, Tensor]:
        """(C,) each: y ≈ scale·x + shift by least squares, with a ridge that draws scale towards 1.

        Towards 1, and not 0: a channel that hardly varies keeps its scale, one that does not change is not touched, and
        the squared error is never above that of the feature as it is.
        """
        x, y = self.x / self.count, self.y / self.count
        variance, covariance = self.xx / self.count - x * x, self.xy / self.count - x * y
        ridge = RIDGE * variance.mean().clamp_min(1e-12)
        scale = ((covariance + ridge) / (variance + ridge)).clamp(0, LARGEST_SCALE).float()
        return scale, (y - scale * x).float()
