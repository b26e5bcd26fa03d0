"""Fake quantizers with step sizes that can be learned: per-channel weights, activations per timestep group."""

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

from pqcad_ao.clipping import fit_activation_grid, fit_weight_scale, weight_range

_VALUES_PER_SAMPLE = 256  # activations kept of each observed sample, layer and segment
_VALUES_PER_GROUP = 2048  # of those, how many a timestep group's grid is fitted to


def timestep_group(timesteps: Tensor, groups: int, num_train_timesteps: int) -> Tensor:
    """The group of each timestep: ``groups`` intervals of equal length that tile [0, num_train_timesteps).

    Timesteps outside are counted to the nearest group. Shapes (B,) to (B,) int64.
    """
    return timesteps.to(torch.int64).clamp(0, num_train_timesteps - 1) * groups // num_train_timesteps


def quantize(x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """The integers clamp(round(x / scale), low, high) as floating-point numbers; ties go to the even one.

    Divides by multiplying with the reciprocal, as every kernel here does.
    """
    return torch.clamp((x * scale.reciprocal()).round(), low, high)


def fake_quantize(x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Quantize and return to x's range; differentiable in x and scale (LSQ, Esser et al. 2020, eqs. 2, 3 and 5).

    The gradient to x passes inside [low, high] and is zero outside; that to scale is round(v) - v inside and the bound
    outside, where v = x / scale.
    """
    v = torch.clamp(x * scale.reciprocal(), low, high)
    return (v + (v.round() - v).detach()) * scale


class WeightFakeQuantize(FakeQuantizeBase):
    """A symmetric grid for each output channel.

    The scale (O,) is fitted by least squares on the first call.
    """

    def __init__(self, bits: int, channels: int, **_) -> None:
        super().__init__()
        self.bits, self.dtype, self.is_dynamic = bits, torch.int8, False
        self.qscheme, self.ch_axis = torch.per_channel_symmetric, 0
        self.quant_min, self.quant_max = weight_range(bits)
        self.scale = nn.Parameter(torch.zeros(channels))
        self.fitted = False

    def forward(self, weight: Tensor) -> Tensor:
        if not self.fitted:
            with torch.no_grad():
                self.scale.data = fit_weight_scale(weight.detach().flatten(1), self.bits)
            self.fitted = True
        if not self.fake_quant_enabled[0]:
            return weight
        scale = self.scale.view(-1, *[1] * (weight.dim() - 1))
        return fake_quantize(weight.float(), scale, self.quant_min, self.quant_max).to(weight.dtype)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale.detach(), torch.zeros_like(self.scale, dtype=torch.int64)


class ActivationFakeQuantize(FakeQuantizeBase):
    """A grid for each timestep group and segment of the channels.

    The integers of a grid are low ... low + 2^bits - 1 (zero among them); scale and low are (groups, segments).
    While the observer is enabled it keeps a sample of what passes; :meth:`fit` then fits the grids.
    """

    def __init__(self, bits: int, segments: list[int], groups: int, channel_dim: int, seed: int, **_) -> None:
        super().__init__()
        self.bits, self.dtype, self.is_dynamic = bits, torch.int8, False
        self.qscheme, self.quant_min, self.quant_max = torch.per_tensor_affine, -128, 127
        self.segments, self.groups, self.channel_dim = segments, groups, channel_dim
        self.scale = nn.Parameter(torch.ones(groups, len(segments)))
        self.register_buffer("low", torch.full((groups, len(segments)), -(2 ** (bits - 1)), dtype=torch.int64))
        self.generator = torch.Generator().manual_seed(seed)
        self.observed: list[tuple[Tensor, Tensor]] = []

    def observe(self, x: Tensor, group: Tensor) -> None:
        rows = []
        for part in x.detach().split(self.segments, self.channel_dim):
            part = part.flatten(1)
            chosen = torch.randint(part.shape[1], (_VALUES_PER_SAMPLE,), generator=self.generator)
            rows.append(part[:, chosen.to(x.device)].float().cpu())
        self.observed.append((torch.stack(rows, 1), group.cpu()))

    def fit(self) -> None:
        """Fit every group's grids to what was observed; a group that saw nothing takes its nearest neighbour's.

        Raises:
            FloatingPointError: NaN or infinity was observed. RuntimeError: nothing was.
        """
        if not self.observed:
            raise RuntimeError("no activation was observed: run the calibration set through the graph first")
        values = torch.cat([rows for rows, _ in self.observed])
        group = torch.cat([groups for _, groups in self.observed])
        if not values.isfinite().all():
            raise FloatingPointError("NaN or infinite activations")
        seen = group.unique()
        table = torch.empty(len(seen), len(self.segments), _VALUES_PER_GROUP)
        for row, index in enumerate(seen):
            pool = values[group == index].transpose(0, 1).flatten(1)
            picks = torch.randint(pool.shape[1], (_VALUES_PER_GROUP,), generator=self.generator)
            table[row] = pool[:, picks]
        scale, low = fit_activation_grid(table.flatten(0, 1), self.bits)
        nearest = (torch.arange(self.groups)[:, None] - seen[None]).abs().argmin(1)
        self.scale.data = scale.view(len(seen), -1)[nearest].to(self.scale.device)
        self.low = low.view(len(seen), -1)[nearest].to(self.low.device)
        self.observed = []

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        if self.observer_enabled[0]:
            self.observe(x, group)
        if not self.fake_quant_enabled[0]:
            return x
        scale, low = expand_grid(self.scale, self.low, group, self.segments, x.dim(), self.channel_dim)
        return fake_quantize(x.float(), scale, low, low + (2**self.bits - 1)).to(x.dtype)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale.detach(), self.low


def expand_grid(
    scale: Tensor, low: Tensor, group: Tensor, segments: list[int], rank: int, channel_dim: int
) -> tuple[Tensor, Tensor]:
    """Scale and lowest integer for each sample and channel, shaped to broadcast against an activation.

    Args:
        scale, low: (groups, segments). group: (B,). segments: channels of each.
        rank: dimensions of the activation. channel_dim: which of them are the channels (1 or -1).
    """
    shape = [-1] + [1] * (rank - 1)
    if len(segments) == 1:
        return scale[group, 0].view(shape), low[group, 0].view(shape)
    counts = torch.tensor(segments, device=scale.device)
    shape[channel_dim] = sum(segments)
    expanded = (table[group].repeat_interleave(counts, 1, output_size=sum(segments)) for table in (scale, low))
    return tuple(values.view(shape) for values in expanded)
