"""What a quantized network's sampling is corrected by: for each step, a small filter and a bias for each channel."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pqcad_ao.config import MAX_BATCH
from pqcad_ao.denoiser import GUIDANCE_SCALE
from pqcad_ao.utils.checks import check_count, check_fields, check_numbers, check_seed, check_word, is_whole

CorrectionKind = Literal["debias", "variance", "regression", "ptqd", "tac", "vc"]
Place = Literal["prediction", "sample"]
PUBLISHED: dict[str, Place] = {"ptqd": "prediction", "tac": "prediction", "vc": "sample"}  # and where


@dataclass
class Correction:
    """What :func:`~pqcad_ao.correct.correct_` fits: for each sampling step a filter and a bias for each channel.

    Of one frequency, with e full precision's prediction, q the quantized network's and ρ their correlation, the fits
    are E[h q | e] = e (``"debias"``), equal power (``"variance"``) and the least squared error (``"regression"``).

    Args:
        kind: ``"debias"``, ``"variance"`` or ``"regression"``, by a small filter; or what is published, one factor for
            each step and channel: ``"ptqd"`` (PTQD), ``"tac"`` (TAC-Diffusion), ``"vc"`` (Q&C's variance compensation).
        where: ``"prediction"``, or ``"sample"``, x_{t-1} after the step. None: the sample for ``"vc"``, which is
            published so, else the prediction.
        size: of the filter, odd, at most 15; 1 is one factor. None: 7, or 1 of what is published.
        strength: from 0, the identity, to 1, what was fitted.
        points: pictures that are walked, at least 2. batch_size: of a call, at most 63.
        seed: of their noise.

    Raises:
        ValueError: a value outside its range, or a published kind where it is not published; says what is allowed.

    Example:
        >>> Correction().width, Correction(kind="vc").place
        (7, 'sample')
    """

    kind: CorrectionKind = "debias"
    where: Place | None = None
    size: int | None = None
    strength: float = 1.0
    points: int = 256
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_word("kind", self.kind, CorrectionKind)
        published = PUBLISHED.get(self.kind)
        if self.where is not None:
            check_word("where", self.where, Place)
        if published is not None and (self.place != published or self.width != 1):
            raise ValueError(
                f"kind={self.kind!r} with where={self.where!r}, size={self.size!r}: it is published as one factor of "
                f"the {published}; leave both out, or write kind='debias', 'variance' or 'regression'"
            )
        if not is_whole(self.width, 1, 15) or self.width % 2 == 0:
            raise ValueError(f"size={self.size!r}: allowed are odd numbers from 1 to 15, or None")
        check_numbers(self, ("strength",))
        check_count("points", self.points, 2)
        check_fields(self, ("batch_size",), most=MAX_BATCH)
        check_seed(self.seed)

    @property
    def place(self) -> Place:
        return self.where or PUBLISHED.get(self.kind, "prediction")

    @property
    def width(self) -> int:
        if self.size is not None:
            return self.size
        return 1 if self.kind in PUBLISHED else 7


@dataclass(frozen=True)
class CorrectionTable:
    """A filter and a bias for each step and channel, of what the network predicts or of the sample after the step.

    Attributes:
        kind: of the fit. where: "prediction" or "sample".
        timesteps: (S,) of the steps, as the sampler visits them.
        filters: (S, C, k, k) float32. bias: (S, C) float32.
        cached: whether it was fitted to a network that keeps features between steps.
    """

    kind: str
    where: str
    timesteps: list[Any]
    filters: Tensor
    bias: Tensor
    cached: bool = False

    def check(self, timesteps: list[Any], conditioning: dict[str, Any], *, cached: bool) -> None:
        """Raises ValueError: the table was fitted for another walk: timesteps, guidance, or features that are kept."""
        if GUIDANCE_SCALE in conditioning or cached != self.cached:
            kept = "keeps features" if cached else "computes all features"
            walk = "is guided" if GUIDANCE_SCALE in conditioning else kept
            raise ValueError(
                f"the correction was fitted to a walk without guidance{', with features kept' if self.cached else ''}, "
                f"and this one {walk}: leave it out with correction=None, or call correct_ with what is sampled from"
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
        }

    @classmethod
    def from_dict(cls, values: Any) -> "CorrectionTable":
        """Invert :meth:`to_dict`. Raises ValueError, TypeError, KeyError: it is not what that wrote."""
        filters, bias = (torch.tensor(values[name], dtype=torch.float32) for name in ("filters", "bias"))
        table = cls(values["kind"], values["where"], values["timesteps"], filters, bias, values["cached"])
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
        if not sound or not words:
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
