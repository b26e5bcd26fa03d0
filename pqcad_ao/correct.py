"""``correct_``: a filter for each sampling step brings a quantized network's walk back to full precision's."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqcad_ao import denoiser
from pqcad_ao.cached_unet import CachedUNet
from pqcad_ao.config import Correction
from pqcad_ao.denoiser import (
    GUIDANCE_SCALE,
    cast_floats,
    check_conditioning,
    evaluation_mode,
    placement,
    predict,
    predict_float32,
    spread_rows,
    take_rows,
)
from pqcad_ao.diffusion.correction import CorrectionTable, filtered
from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.process import as_sampler, check_counted, find_scheduler, span_of
from pqcad_ao.diffusion.schedule import default_steps
from pqcad_ao.diffusion.solvers import SOLVERS
from pqcad_ao.graph.suitable import check_network
from pqcad_ao.learn.unfold import dequantized_state
from pqcad_ao.nn.diffusers_plugin import attach
from pqcad_ao.nn.state import quantized_state, required_state
from pqcad_ao.utils.progress import tqdm

RIDGE = 1e-3  # of the centre's covariance: pull of a filter towards the identity
LEAST_GAIN, LARGEST_GAIN = 0.5, 2.0  # of a filter, at any frequency
SIGNIFICANT = 2.0  # standard errors, below which a bias is none
FLOOR = 0.1  # of |e| in TAC's and Q&C's quotients, which have none
CHUNK = 32  # pictures whose values around every pixel are held at once
SUBSTEPS = 4  # of the flow that a distilled step is held to


def correct_(
    unet: nn.Module,
    config: Correction | None = None,
    *,
    reference: nn.Module,
    scheduler: Any = None,
    num_inference_steps: int | None = None,
    conditioning: dict[str, Any] | None = None,
    sample_shape: tuple[int, ...] | None = None,
    progress: bool = True,
) -> CorrectionTable:
    """Fit, in closed form, what corrects a quantized network's sampling at each step, and attach it to the network.

    :func:`~pqcad_ao.diffusion.sampling.sample`, ``PT2UNet.sample`` and the ``step`` of a ``.pte`` apply it from then
    on; it is saved with the network. A diffusers pipeline, which steps by itself, does not. ``distill_`` drops it. On
    the embedded teacher no kind made better pictures than none (docs/family.md).

    The fit walks in closed loop, every earlier step corrected. For ``where="prediction"``, half of the x_t are of the
    reference's own walk and half of the corrected network's, and both predict at the same x_t; for ``where="sample"``
    both walk from the same noise. A distilled network is held to where the reference's flow is after its longer steps.

    Args:
        unet: a network of images that ``quantize_`` has quantized, or the
            :class:`~pqcad_ao.cached_unet.CachedUNet` of one, which is sampled from then. config: what is fitted;
            ``Correction()`` if None.
        reference: the full-precision network that it was made from.
        scheduler: that it is sampled with, as for :func:`~pqcad_ao.quantize.quantize_`; of a distilled network, the one
            that ``distill_`` returned. num_inference_steps: of it; None: what it was distilled for, or 20.
        conditioning: keyword arguments of ``forward`` with rows to draw from; with ``guidance_scale`` and ``negative``
            in it both walks are guided, and what is corrected is the guided prediction. sample_shape: (C, H, W).

    Returns:
        the table, which is the network's from now on.

    Raises:
        ValueError: the network is not quantized, the reference is or is of another structure, either is a pipeline or
            wrapped in something else, samples that are no images or are smaller than the filter.
        FloatingPointError: a walk left the finite numbers.

    Example:
        >>> table = correct_(
        ...     quantized,
        ...     Correction(kind="regression", size=3, points=8),  # of a length for an example
        ...     reference=unet,
        ...     scheduler=scheduler,
        ...     num_inference_steps=4,
        ...     progress=False,
        ... )
        >>> table.filters.shape, table.bias.shape
        (torch.Size([4, 1, 3, 3]), torch.Size([4, 1]))
    """
    network = unet.unet if isinstance(unet, CachedUNet) else unet
    for given in (network, reference):
        check_network(given)
    config, state = config or Correction(), required_state(unet)
    scheduler = find_scheduler(reference) if scheduler is None else as_sampler(scheduler)
    if scheduler is None:
        raise ValueError("no scheduler was given, none is saved beside the reference: pass the one to sample with")
    check_counted(span_of(scheduler), "correct_")
    if quantized_state(reference) is not None:
        raise ValueError("the reference is quantized: give the full-precision network that this one was made from")
    dequantized_state(network, reference)
    denoiser.set_time_scale(reference, state.timestep.time_scale)
    conditioning = check_conditioning(network, conditioning)
    shape = denoiser.sample_shape(reference, sample_shape)
    if len(shape) != 3 or min(shape[1:]) < config.width:
        raise ValueError(f"samples of shape {shape}: a filter of size {config.width} corrects images at least as large")
    steps = num_inference_steps or default_steps(state.timestep.schedule)
    walk = _Walk(unet, reference, scheduler, steps, shape, config, conditioning, state.timestep.schedule is not None)
    with torch.no_grad(), evaluation_mode(unet), evaluation_mode(reference):
        rows = [walk.fit(index) for index in tqdm(range(steps), desc="correcting", disable=not progress, leave=False)]
    filters, bias = (torch.stack(parts).float().cpu() for parts in zip(*rows, strict=True))
    cached, guidance = isinstance(unet, CachedUNet), conditioning.get(GUIDANCE_SCALE)
    state.correction = CorrectionTable(config.kind, config.place, walk.timesteps, filters, bias, cached, guidance)
    attach(network, state)
    return state.correction


class _Walk:
    """Two walks side by side, the reference's and the corrected network's, and what is fitted on the way."""

    def __init__(
        self,
        unet: nn.Module,
        reference: nn.Module,
        scheduler: Any,
        steps: int,
        shape: tuple[int, ...],
        config: Correction,
        conditioning: dict[str, Any],
        distilled: bool,
    ) -> None:
        self.unet, self.reference, self.config, self.distilled = unet, reference, config, distilled
        self.device, self.dtype = placement(unet)
        self.schedule = DDIMSchedule.of(scheduler, steps, self.device)
        self.timesteps: list[Any] = self.schedule.timesteps[:-1].tolist()
        trained = scheduler.config.num_train_timesteps
        self.substeps = min(SUBSTEPS, max(trained // steps, 1))
        self.flow = DDIMSchedule.of(scheduler, steps, self.device, substeps=self.substeps)
        noise = torch.randn(config.points, *shape, generator=torch.Generator().manual_seed(config.seed))
        rows = spread_rows(conditioning, torch.arange(config.points), config.points)
        self.paired = config.place == "sample"
        theirs = torch.arange(config.points)[: None if self.paired else (config.points + 1) // 2]
        ours = theirs if self.paired else torch.arange(len(theirs), config.points)
        self.x = [noise[rows_of].to(self.device) for rows_of in (theirs, ours)]
        self.rows = [take_rows(rows, rows_of) for rows_of in (theirs, ours)]
        # what keeps features from step to step walks each batch by itself
        self.networks: list[list[Any]] = [
            [unet.begin_walk() if isinstance(unet, CachedUNet) else unet for _ in range(0, len(x), config.batch_size)]
            for x in self.x
        ]

    def fit(self, index: int) -> tuple[Tensor, Tensor]:
        """One step of both walks; its filters (C, k, k) and bias (C,)."""
        config = self.config
        moments = Moments(config.width)
        predictions: list[Tensor] = []
        for walk, (x, rows) in enumerate(zip(self.x, self.rows, strict=True)):
            parts = []
            for start in range(0, len(x), config.batch_size):
                part = slice(start, start + config.batch_size)
                network = self.networks[walk][start // config.batch_size]
                e, q = self._both(network, x[part], index, take_rows(rows, part), walk)
                if e is not None and q is not None:
                    moments.add(e, q)
                parts.append(e if walk == 0 else q)
            predictions.append(torch.cat([part for part in parts if part is not None]) if parts else x)
        theirs = self._step(predictions[0], self.x[0], index)
        if not self.paired:
            filters, bias = solved(moments, config, self.x[0].shape[2:])
            predictions[1] = _corrected(predictions[1], filters, bias)
        ours = self._step(predictions[1], self.x[1], index)
        if self.paired:
            moments.add(theirs, ours)
            filters, bias = solved(moments, config, ours.shape[2:])
            ours = _corrected(ours, filters, bias)
        if not (theirs.isfinite().all() and ours.isfinite().all()):
            raise FloatingPointError(f"a walk left the finite numbers at timestep {self.timesteps[index]}")
        self.x = [theirs, ours]
        return filters, bias

    def _both(
        self, network: Any, x: Tensor, index: int, rows: dict[str, Any], walk: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The reference's prediction at x and the network's; of paired walks, the one that the walk goes by."""
        t = self.schedule.timesteps[index].repeat(len(x))
        wanted = (not self.paired or walk == 0, not self.paired or walk == 1)
        e = self._expected(x, index, rows) if wanted[0] else None
        return e, self._predicted(network, x, t, rows) if wanted[1] else None

    def _predicted(self, network: Any, x: Tensor, t: Tensor, rows: dict[str, Any]) -> Tensor:
        return predict(network, x.to(self.dtype), t, cast_floats(rows, self.dtype)).float()

    def _expected(self, x: Tensor, index: int, rows: dict[str, Any]) -> Tensor:
        def predict(x: Tensor, t: Tensor) -> Tensor:
            return predict_float32(self.reference, x, t, rows)

        if not self.distilled:
            return predict(x, self.schedule.timesteps[index].repeat(len(x)))
        step = torch.full((len(x),), index, device=x.device)
        end = SOLVERS["dpmpp_2m"](predict, self.flow, x, self.substeps * step, self.substeps)
        return self.schedule.prediction(self.schedule.target_x_0(end, x, step, 1), x, step)

    def _step(self, prediction: Tensor, x: Tensor, index: int) -> Tensor:
        return self.schedule.ddim_step(prediction, x, torch.full((len(x),), index, device=x.device))


def _corrected(value: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    return filtered(value, filters.to(value), value.shape[1]) + bias.to(value)[:, None, None]


def orbits(width: int) -> Tensor:
    """(J, k, k): the taps that the square's eight motions carry into each other, the centre first."""
    away = torch.arange(-(width // 2), width // 2 + 1).abs()
    y, x = torch.meshgrid(away, away, indexing="ij")
    near, far = torch.minimum(y, x), torch.maximum(y, x)
    pairs = [(a, b) for b in range(width // 2 + 1) for a in range(b + 1)]
    return torch.stack([((near == a) & (far == b)).double() for a, b in pairs])


@dataclass
class Moments:
    """Sums over pictures and pixels of what the fits need, for each channel.

    z are the values at a pixel, summed over the taps of each orbit: the network's (J), then the reference's (J).
    """

    width: int
    pictures: int = 0
    pixels: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, e: Tensor, q: Tensor) -> None:
        """Take in the reference's values and the network's, both (B, C, H, W)."""
        for start in range(0, len(e), CHUNK):
            self._add(e[start : start + CHUNK], q[start : start + CHUNK])

    def _add(self, e: Tensor, q: Tensor) -> None:
        taps = orbits(self.width).to(q.device)
        z = torch.cat([_features(value.double(), taps) for value in (q, e)], 2)  # (B, C, 2J, H·W)
        channels, each = z.transpose(0, 1).movedim(2, 1).flatten(2), z.mean(3)
        q, e = (value.double().transpose(0, 1).flatten(1) for value in (q, e))
        u = e.abs().clamp_min(FLOOR).reciprocal()
        found = {
            "z": channels.sum(2),
            "zz": channels @ channels.transpose(1, 2),
            "each": torch.einsum("bci,bcj->cij", each, each),
            **{name: value.sum(1) for name, value in _relative(q, e, u.square()).items()},
        }
        self.sums = {name: self.sums.get(name, 0) + value for name, value in found.items()}
        self.pictures, self.pixels = self.pictures + z.shape[0], self.pixels + channels.shape[2]

    @property
    def taps(self) -> int:
        return self.sums["z"].shape[1] // 2

    @property
    def mean(self) -> Tensor:
        return self.sums["z"] / self.pixels

    @property
    def cov(self) -> Tensor:
        return self.sums["zz"] / self.pixels - self.mean[:, :, None] * self.mean[:, None]


def _relative(q: Tensor, e: Tensor, uu: Tensor) -> dict[str, Tensor]:
    """Parts of the relative squared error, uu being 1/e², floored: of what TAC's and Q&C's sums are made.

    Their Σ q/e is Σ q·e·uu where nothing is floored, and where something is, the same as much floored.
    """
    return {"euu": e * uu, "qeuu": q * e * uu, "uu": uu, "quu": q * uu, "qquu": q * q * uu}


def _features(value: Tensor, taps: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, J, H·W): the sum over each orbit's taps, around every pixel."""
    b, c = value.shape[:2]
    reach = taps.shape[-1] // 2
    padded = F.pad(value, [reach] * 4, mode="replicate") if reach else value
    return F.conv2d(padded.flatten(0, 1)[:, None], taps[:, None]).unflatten(0, (b, c)).flatten(3)


def solved(moments: Moments, config: Correction, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The filters (C, k, k) and the bias (C,) of one step, in float64.

    Args:
        size: (H, W), on whose frequencies a filter's gain is bounded.
    """
    taps = orbits(config.width).to(moments.cov.device)
    identity = taps[0].expand(moments.cov.shape[0], -1, -1)
    if config.kind in FACTORS:
        K, bias = FACTORS[config.kind](moments)
        filters = K.expand(len(identity))[:, None, None] * identity
    else:
        filters = _bounded(FITTED[config.kind](moments, taps, size), identity, size)
        bias = _bias(moments, _of_orbits(filters, taps))
    return identity + config.strength * (filters - identity), config.strength * bias


def _of_orbits(filters: Tensor, taps: Tensor) -> Tensor:
    """The mean of (C, k, k) filters over each orbit of taps, (C, J)."""
    return (filters.flatten(1) @ taps.flatten(1).T) / taps.sum((1, 2))


def _least_squares(moments: Moments, taps: Tensor, instrument: slice) -> Tensor:
    """The filter h with Σ_j h_j cov(q_j, i) = cov(e, i) for every instrument i, pulled towards the identity."""
    J = moments.taps
    M, right = moments.cov[:, instrument, :J], moments.cov[:, instrument, J]
    pull = RIDGE * M[:, 0, 0].abs()[:, None] * taps.sum((1, 2))
    identity = torch.zeros(J).to(M)
    identity[0] = 1
    tiny = torch.finfo(M.dtype).tiny  # of a channel that is constant: the identity
    w = torch.linalg.solve(M + torch.diag_embed(pull + tiny), right + pull * identity + tiny * identity)
    return torch.einsum("cj,jyx->cyx", w, taps)


def _debias(moments: Moments, taps: Tensor, size: tuple[int, ...]) -> Tensor:
    """E[h ∗ q | e] = e: by frequency S_ee / S_qe, with e as the instrument."""
    return _least_squares(moments, taps, slice(moments.taps, None))


def _regression(moments: Moments, taps: Tensor, size: tuple[int, ...]) -> Tensor:
    """The least squared error: by frequency S_qe / S_qq, Wiener's."""
    return _least_squares(moments, taps, slice(moments.taps))


def _variance(moments: Moments, taps: Tensor, size: tuple[int, ...]) -> Tensor:
    """As much power as full precision has: by frequency the geometric middle of the other two."""
    gains = [_gain(filters, size) for filters in (_debias(moments, taps, size), _regression(moments, taps, size))]
    middle = torch.fft.ifft2((gains[0] * gains[1]).abs().sqrt()).real
    width = taps.shape[-1]
    cut = middle.roll((width // 2, width // 2), (1, 2))[:, :width, :width]
    return torch.einsum("cj,jyx->cyx", _of_orbits(cut, taps), taps)


FITTED: dict[str, Callable[[Moments, Tensor, tuple[int, ...]], Tensor]] = {
    "debias": _debias,
    "regression": _regression,
    "variance": _variance,
}


def _gain(filters: Tensor, size: tuple[int, ...]) -> Tensor:
    """The real transfer function (C, H, W) of symmetric filters (C, k, k)."""
    reach = filters.shape[-1] // 2
    grid = filters.new_zeros(len(filters), *size)
    grid[:, : filters.shape[1], : filters.shape[2]] = filters
    return torch.fft.fft2(grid.roll((-reach, -reach), (1, 2))).real


def _bounded(filters: Tensor, identity: Tensor, size: tuple[int, ...]) -> Tensor:
    """Each filter, moved towards the identity until its gain lies within the bounds."""
    gain = _gain(filters, size).flatten(1)
    high, low = gain.amax(1), gain.amin(1)
    room = torch.minimum(
        torch.where(high > LARGEST_GAIN, (LARGEST_GAIN - 1) / (high - 1), 1.0),
        torch.where(low < LEAST_GAIN, (1 - LEAST_GAIN) / (1 - low), 1.0),
    )
    return identity + room[:, None, None] * (filters - identity)


def _bias(moments: Moments, w: Tensor) -> Tensor:
    """The mean that a filter leaves, where it is told from zero by the pictures' own means; w is (C, J)."""
    J = moments.taps
    left = torch.cat([-w, torch.zeros_like(w)], 1)
    left[:, J] = 1
    bias = (left * moments.mean).sum(1)
    spread = torch.einsum("ci,cij,cj->c", left, moments.sums["each"], left) / moments.pictures - bias.square()
    error = (spread.clamp_min(0) / max(moments.pictures - 1, 1)).sqrt()
    return torch.where(bias.abs() > SIGNIFICANT * error, bias, torch.zeros_like(bias))


def _ptqd(moments: Moments) -> tuple[Tensor, Tensor]:
    """PTQD (arXiv 2305.10657): (q − b_c) / (1 + k), with k the slope of n = q − e by e, over all channels."""
    J, cov, mean = moments.taps, moments.cov, moments.mean
    gain = cov[:, 0, J].sum() / cov[:, J, J].sum()  # 1 + k
    return 1 / gain, -(mean[:, 0] - gain * mean[:, J]) / gain


def _tac(moments: Moments) -> tuple[Tensor, Tensor]:
    """TAC-Diffusion (arXiv 2407.03917): a slope of least absolute and relative squares, pulled towards 1."""
    J, N, one, two = moments.taps, moments.pixels, 0.5, 0.1
    sums, zz = moments.sums, moments.sums["zz"]
    above = (1 - one) * zz[:, 0, J] + one * N * sums["qeuu"] + two * N
    below = (1 - one) * zz[:, 0, 0] + one * N * sums["qquu"] + two * N
    return above / below, torch.zeros_like(above)


def _vc(moments: Moments) -> tuple[Tensor, Tensor]:
    """Q&C's variance compensation (arXiv 2503.02508): μ + K (x̂ − μ), μ the mean of full precision's x'.

    K is the minimiser of absolute and relative squares, in which the printed sum Σ(x̂−μ)/x' is Σ(x̂−μ)(x'−μ)/x'²:
    without that μ, pictures whose mean is not zero are ruined.
    """
    J, N, sums, zz = moments.taps, moments.pixels, moments.sums, moments.sums["zz"]
    mean_q, mu = moments.mean[:, 0], moments.mean[:, J]
    above = zz[:, 0, J] - N * mean_q * mu
    above = above + sums["qeuu"] - mu * (sums["quu"] + sums["euu"]) + mu.square() * sums["uu"]
    below = zz[:, 0, 0] - 2 * mu * N * mean_q + N * mu.square()
    below = below + sums["qquu"] - 2 * mu * sums["quu"] + mu.square() * sums["uu"]
    K = above / below.clamp_min(torch.finfo(below.dtype).tiny)
    return K, mu * (1 - K)


FACTORS: dict[str, Callable[[Moments], tuple[Tensor, Tensor]]] = {"ptqd": _ptqd, "tac": _tac, "vc": _vc}
