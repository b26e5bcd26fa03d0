"""How a quantized network's sampling is corrected: ``Correction``."""

from dataclasses import dataclass
from typing import Literal

from pqcad_ao.config.shared import MAX_BATCH
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
        points: pictures that are walked, at least 2.
        batch_size: of a call, at most 63.
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
