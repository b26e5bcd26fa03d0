"""What a quantized network's sampling is corrected by: for each step, a small filter and a bias for each channel."""

import warnings
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pqcad_ao.config import Place
from pqcad_ao.denoiser import GUIDANCE_SCALE
from pqcad_ao.utils.checks import is_number


@dataclass(frozen=True)
class CorrectionTable:
    """A filter and a bias for each step and channel, of what the network predicts or of the sample after the step.

    Attributes:
        kind: of the fit. where: "prediction" or "sample".
        timesteps: (S,) of the steps, as the sampler visits them.
        filters: (S, C, k, k) float32. bias: (S, C) float32.
        cached: whether it was fitted to a network that keeps features between steps.
        guidance: the scale of the guidance that it was fitted under; None: without.
    """

    kind: str
    where: str
    timesteps: list[Any]
    filters: Tensor
    bias: Tensor
    cached: bool = False
    guidance: float | None = None

    def check(self, timesteps: list[Any], conditioning: dict[str, Any], *, cached: bool) -> None:
        """Raises ValueError: the table was fitted for another walk: timesteps, guidance, or features that are kept."""
        guidance = conditioning.get(GUIDANCE_SCALE)
        if guidance != self.guidance or cached != self.cached:
            fitted = "without guidance" if self.guidance is None else f"with guidance_scale={self.guidance:g}"
            walk = "keeps features" if cached else "computes all features"
            if guidance != self.guidance:
                walk = "is not guided" if guidance is None else f"is guided, with guidance_scale={guidance:g}"
            raise ValueError(
                f"the correction was fitted to a walk {fitted}{', with features kept' if self.cached else ''}, and "
                f"this one {walk}: leave it out with correction=None, or call correct_ with what is sampled from"
            )
        if timesteps != self.timesteps:
            raise ValueError(
                f"the correction was fitted for the timesteps {self.timesteps}, and this walk visits {timesteps}: use "
                f"num_inference_steps={len(self.timesteps)} and the scheduler that it was fitted with, call correct_ "
                "again, or leave it out with correction=None"
            )

    def apply(self, value: Tensor, step: Tensor) -> Tensor:
        """Correct (B, C, H, W), each sample by the row of its own step (B,); at borders the last pixel is repeated."""
        filters, bias = (table.to(value)[step] for table in (self.filters, self.bias))
        return filtered(value, filters.flatten(0, 1), value.shape[0] * value.shape[1]) + bias[:, :, None, None]

    def predicted(self, value: Tensor, index: int) -> Tensor:
        """The prediction of a batch at one step, corrected if that is what is corrected."""
        return self._at(value, index) if self.where == "prediction" else value

    def sampled(self, value: Tensor, index: int) -> Tensor:
        """The sample after one step, corrected if that is what is corrected."""
        return self._at(value, index) if self.where == "sample" else value

    def _at(self, value: Tensor, index: int) -> Tensor:
        return self.apply(value, torch.full((len(value),), index, device=value.device))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; every float32 comes back as it was."""
        return {
            "kind": self.kind,
            "where": self.where,
            "timesteps": self.timesteps,
            "filters": self.filters.tolist(),
            "bias": self.bias.tolist(),
            "cached": self.cached,
            **({} if self.guidance is None else {"guidance": self.guidance}),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "CorrectionTable":
        """Invert :meth:`to_dict`. Raises ValueError, TypeError, KeyError: it is not what that wrote."""
        try:
            filters, bias = (torch.tensor(values[name], dtype=torch.float32) for name in ("filters", "bias"))
        except (RuntimeError, OverflowError) as error:  # whole numbers beyond 64 bits
            raise ValueError(f"its correction cannot be read: {error}") from error
        kind, where, timesteps, cached = (values[name] for name in ("kind", "where", "timesteps", "cached"))
        table = cls(kind, where, timesteps, filters, bias, cached, values.get("guidance"))
        steps = len(table.timesteps)
        sound = (
            filters.dim() == 4
            and filters.shape[2] == filters.shape[3]
            and filters.shape[2] % 2 == 1
            and bias.shape == filters.shape[:2]
            and len(filters) == steps > 0
            and bool(filters.isfinite().all() and bias.isfinite().all())
        )
        words = table.where in get_args(Place) and isinstance(table.kind, str) and isinstance(table.cached, bool)
        words = words and (table.guidance is None or is_number(table.guidance, -1e6, 1e6))
        numbers = isinstance(table.timesteps, list) and all(isinstance(t, (int, float)) for t in table.timesteps)
        if not sound or not words or not numbers:
            raise ValueError(f"its correction has filters {tuple(filters.shape)} and bias {tuple(bias.shape)}")
        return table


def filtered(value: Tensor, filters: Tensor, groups: int) -> Tensor:
    """Correlate (B, C, H, W) with (groups, k, k) filters, one for each of B·C channels or of C."""
    reach = filters.shape[-1] // 2
    padded = F.pad(value, [reach] * 4, mode="replicate") if reach else value
    whole = padded.reshape(-1, groups, *padded.shape[2:])
    return F.conv2d(whole, filters[:, None], groups=groups).reshape(value.shape)


def correction_of(unet: Any) -> CorrectionTable | None:
    """What a quantized network carries, or None."""
    return getattr(getattr(unet, "_pqcad_state", None), "correction", None)


def drop_correction(unet: Any, by: str) -> None:
    """Let a network forget its correction, with a warning, where ``by`` changed what it was fitted to."""
    if correction_of(unet) is not None:
        warnings.warn(
            f"the correction that the network carried was fitted to what it was before {by}: it is dropped; call "
            "correct_ again",
            stacklevel=3,
        )
        unet._pqcad_state.correction = None
