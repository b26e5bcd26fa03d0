"""Fake quantizers with step sizes that can be learned: per-channel weights, activations per timestep group."""

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

from pqcad_ao.diffusion.calibration import SAMPLES
from pqcad_ao.diffusion.layer_inputs import sample_of
from pqcad_ao.graph.operators import OUTPUT_FIRST, WeightLayout
from pqcad_ao.ops.reference import per_channel
from pqcad_ao.prepare.grids import Bound, fit_activation_grid, fit_weight_scale, weight_range
from pqcad_ao.utils.processes import in_turn, part_of, whole_of


def quantize(x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
    """The integers clamp(round(x / scale), low, high) as floating-point numbers; ties go to the even one.

    Divides by multiplying with the reciprocal, as every kernel here does.
    """
    v = x * scale.reciprocal()
    if torch.compiler.is_compiling() or v.requires_grad:
        return torch.clamp(v.round(), low, high)
    return v.round_().clamp_(low, high)  # the same without two more tensors: eager is bound by memory


class _FakeQuantize(torch.autograd.Function):
    """Keeps x alone for the way back, where the integers are worked out again: they would be a second copy of it."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, scale, low, high)
        ctx.gradient_scale = gradient_scale
        return quantize(x, scale, low, high).mul_(scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, low, high = ctx.saved_tensors
        v = x * scale.reciprocal()
        inside = (v >= low) & (v <= high)
        of_x = gradient * inside
        of_scale = None
        if ctx.needs_input_grad[1]:
            # round(v) - v inside, the bound outside
            integers = torch.clamp(v.round(), low, high)
            of_scale = (gradient * integers.sub_(v.mul_(inside))).sum_to_size(scale.shape) * ctx.gradient_scale
        return of_x, of_scale, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, low: Bound, high: Bound, gradient_scale: float = 1.0) -> Tensor:
    """Quantize and return to x's range; differentiable in x and scale (LSQ, Esser et al. 2020, eqs. 2, 3 and 5).

    The gradient to x passes inside [low, high] and is zero outside; that to scale is round(v) - v inside and the bound
    outside, where v = x / scale, times ``gradient_scale`` (LSQ's g = 1/√(values · largest integer), §2.2).
    """
    # of x's type: a clamp that has to convert its bounds is several times slower; filled in place, not copied to a GPU
    low, high = (b.to(x.dtype) if isinstance(b, Tensor) else x.new_full((), b) for b in (low, high))
    return _FakeQuantize.apply(x, scale, low, high, gradient_scale)


class _Blending(FakeQuantizeBase):
    """What both fake quantizers share: a grid in use and, while a transition lasts, the next one that blends in.

    The values in use are (1 - alpha)·Q_bits(x) + alpha·Q_next_bits(x). Both scales can be learned.
    """

    scale: nn.Parameter
    next_scale: nn.Parameter

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.dtype, self.is_dynamic = torch.int8, False
        self.bits = self.next_bits = bits
        self.alpha = 1.0
        self.disable_observer()

    @property
    def blending(self) -> bool:
        return self.next_bits != self.bits

    def finish(self) -> None:
        """What blended in has arrived."""
        self.bits, self.alpha = self.next_bits, 1.0
        self.scale, self.next_scale = self.next_scale, self.scale  # the parameters: an optimizer's moments go along

    def position(self) -> dict[str, float]:
        """Where on the way the quantizer is, as plain numbers; what :meth:`move` takes."""
        return {"bits": self.bits, "next_bits": self.next_bits, "alpha": self.alpha}

    def move(self, bits: int, next_bits: int, alpha: float) -> None:
        self.bits, self.next_bits, self.alpha = bits, next_bits, alpha


class WeightFakeQuantize(_Blending):
    """A symmetric grid for each output channel; scales are (O,), fitted by least squares.

    Args:
        channels: O. layout: of the layer's weight, by the table of operators. groups: of the layer.
    """

    def __init__(self, bits: int, channels: int, layout: WeightLayout = OUTPUT_FIRST, groups: int = 1, **_) -> None:
        super().__init__(bits)
        self.layout, self.groups = layout, groups
        self.qscheme, self.ch_axis = torch.per_channel_symmetric, 0
        self.scale = nn.Parameter(torch.ones(channels))
        self.next_scale = nn.Parameter(torch.ones(channels))
        self.form: Tensor | None = None  # of the weight, on the meta device, where each process has a part of it

    def whole(self, weight: Tensor) -> Tensor:
        """The layer's weight as it is in one process; of several that have parts of it, all call this alike."""
        return weight if self.form is None else whole_of(weight, self.form)

    def kept(self, weight: Tensor) -> Tensor:
        """Invert :meth:`whole`."""
        return weight if self.form is None else part_of(weight, self.form)

    @property
    def quant_min(self) -> int:
        return weight_range(self.bits)[0]

    @property
    def quant_max(self) -> int:
        return weight_range(self.bits)[1]

    @torch.no_grad()
    def fit(self, weight: Tensor, bits: int) -> None:
        """Use ``bits`` bits from now on, on the grid that lies closest to ``weight``."""
        self.move(bits, bits, 1.0)
        self.scale.copy_(fit_weight_scale(self._by_output(weight).flatten(1), bits))

    @torch.no_grad()
    def begin(self, weight: Tensor, bits: int) -> None:
        """Let ``bits`` bits blend in."""
        self.next_bits, self.alpha = bits, 0.0
        self.next_scale.copy_(fit_weight_scale(self._by_output(weight).flatten(1), bits))

    def _by_output(self, weight: Tensor) -> Tensor:
        """The layer's weight with its output channels first, (O, I / groups, ...)."""
        return self.layout.to_packed(weight, self.groups)

    def _on_grid(self, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        low, high = weight_range(bits)
        gradient_scale = (weight[0].numel() * high) ** -0.5
        return fake_quantize(weight, scale.view(-1, *[1] * (weight.dim() - 1)), low, high, gradient_scale)

    def forward(self, weight: Tensor) -> Tensor:
        weight = self.whole(weight)
        if not self.fake_quant_enabled[0]:
            return weight
        x = self._by_output(weight.float())
        quantized = self._on_grid(x, self.scale, self.bits)
        if self.blending:
            following = self._on_grid(x, self.next_scale, self.next_bits)
            quantized = (1 - self.alpha) * quantized + self.alpha * following
        return self.layout.from_packed(quantized, self.groups).to(weight.dtype)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale.detach(), torch.zeros_like(self.scale, dtype=torch.int64)


class ActivationFakeQuantize(_Blending):
    """A grid for each timestep group and segment of the channels.

    The integers of a grid are low ... low + 2^bits - 1 (zero among them); scale and low are (groups, segments).
    While the observer is enabled it keeps some values of the first samples of each group, to which :meth:`fit` and
    :meth:`begin` fit grids.
    """

    def __init__(self, bits: int, segments: list[int], groups: int, channel_dim: int, **_) -> None:
        super().__init__(bits)
        self.qscheme, self.quant_min, self.quant_max = torch.per_tensor_affine, -128, 127
        self.segments, self.groups, self.channel_dim = segments, groups, channel_dim
        shape = (groups, len(segments))
        self.scale, self.next_scale = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
        self.register_buffer("low", torch.full(shape, -(2 ** (bits - 1)), dtype=torch.int64))
        self.register_buffer("next_low", self.low.clone())
        self.forget()

    def forget(self) -> None:
        """Drop what was observed."""
        self.observed: list[tuple[Tensor, Tensor]] = []
        self.room = [SAMPLES] * self.groups

    def observe(self, x: Tensor, group: Tensor) -> None:
        """Keep some values of each group's first samples: x is (B, ...), group (B,)."""
        rows = []
        for row, index in enumerate(group.tolist()):
            if self.room[index]:
                self.room[index] -= 1
                rows.append(row)
        if rows:
            self.observed.append((sample_of(x.detach()[rows], self.segments, self.channel_dim), group[rows].cpu()))

    def join(self, parts: list[list[tuple[Tensor, Tensor]]]) -> None:
        """Take over what several have ``observed`` of batches that went to them in turn."""
        self.observed = in_turn(parts)

    def fitted(self, bits: int) -> tuple[Tensor, Tensor]:
        """Scale and low of every group's and segment's grid, fitted to what was observed.

        A group that saw nothing takes its nearest neighbour's grid.

        Raises:
            FloatingPointError: NaN or infinity was observed. RuntimeError: nothing was.
        """
        if not self.observed:
            raise RuntimeError("no activation was observed: run the calibration set through the graph first")
        sampled = torch.cat([rows for rows, _ in self.observed])
        if not sampled.isfinite().all():  # NaN counts as highest, and is there
            raise FloatingPointError("NaN or infinite activations")
        values = sampled[:, :, 0]  # (samples, segments, n)
        group = torch.cat([groups for _, groups in self.observed])
        seen = group.unique()
        # where there are fewer samples some count twice, so that all groups are fitted at once
        turns = [(group == index).nonzero().flatten() for index in seen]
        chosen = torch.stack([rows[torch.arange(SAMPLES) % len(rows)] for rows in turns])
        table = values[chosen].transpose(1, 2).flatten(2).flatten(0, 1)  # (groups · segments, samples · n)
        weights = sampled[0, :, 1].repeat(len(seen), SAMPLES)  # the same for all samples
        # where the network is: on a GPU's machine, a processor that other programs share takes minutes for it
        scale, low = fit_activation_grid(table.to(self.scale.device), bits, weights.to(self.scale.device))
        nearest = (torch.arange(self.groups)[:, None] - seen[None]).abs().argmin(1).to(self.scale.device)
        return scale.view(len(seen), -1)[nearest], low.view(len(seen), -1)[nearest]

    @torch.no_grad()
    def fit(self, bits: int) -> None:
        """Use ``bits`` bits from now on, on grids fitted to what was observed. Raises as :meth:`fitted`."""
        scale, low = self.fitted(bits)
        self.move(bits, bits, 1.0)
        self.scale.copy_(scale)
        self.low.copy_(low)

    @torch.no_grad()
    def begin(self, bits: int) -> None:
        """Let ``bits`` bits blend in, on grids fitted to what was observed. Raises as :meth:`fitted`."""
        scale, low = self.fitted(bits)
        self.next_bits, self.alpha = bits, 0.0
        self.next_scale.copy_(scale)
        self.next_low.copy_(low)

    @torch.no_grad()
    def finish(self) -> None:
        super().finish()
        self.low.copy_(self.next_low)

    def _on_grid(self, x: Tensor, scale: Tensor, low: Tensor, bits: int, group: Tensor) -> Tensor:
        gradient_scale = (x[0].numel() * (2**bits - 1)) ** -0.5
        scale, low = expand_grid(scale, low, group, self.segments, x.dim(), self.channel_dim)
        return fake_quantize(x, scale, low, low + (2**bits - 1), gradient_scale)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        if self.observer_enabled[0]:
            self.observe(x, group)
        if not self.fake_quant_enabled[0]:
            return x
        quantized = self._on_grid(x.float(), self.scale, self.low, self.bits, group)
        if self.blending:
            following = self._on_grid(x.float(), self.next_scale, self.next_low, self.next_bits, group)
            quantized = (1 - self.alpha) * quantized + self.alpha * following
        return quantized.to(x.dtype)

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
    shape[channel_dim] = sum(segments)
    return per_channel(scale[group], segments).view(shape), per_channel(low[group], segments).view(shape)
