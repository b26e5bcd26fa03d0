"""How a network keeps a feature between sampling steps: ``CacheConfig``."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pqcad_ao.config.shared import MAX_BATCH, AOBaseConfig
from pqcad_ao.utils.checks import check_fields, check_seed, check_word

Refreshes = Literal["uniform", "optimal"]
FeatureCorrection = Literal["channel", "none"]


@dataclass
class CacheConfig(AOBaseConfig):
    """How a network keeps its deep feature from one sampling step for those after it, which then cost little.

    Args:
        interval: the mean number of steps that one computed in full serves, itself included; 1 keeps nothing.
        branch: the skip concatenation at which the network is cut, counted from its output. At 1 only the outermost
            block is computed in the steps between.
        schedule: which steps are computed in full: ``"uniform"``, every interval-th; or ``"optimal"``, as many, where
            what is kept is measured to err least (Liu et al. 2025, CacheQuant's DPS).
        correction: ``"channel"``, a line for each channel and step from the feature that is kept to the one it stands
            for, fitted while the network samples with all earlier ones (CacheQuant's DEC); or ``"none"``.
        points: trajectories that are measured.
        batch_size: pictures a call meanwhile, at most 63.
        seed: of their noise, 0 to 2^63 - 1.

    Raises:
        ValueError: a value outside its range; the message says which and what is allowed.

    Example:
        >>> CacheConfig(interval=3, schedule="optimal").correction
        'channel'
    """

    version: ClassVar[int] = 1

    interval: int = 2
    branch: int = 1
    schedule: Refreshes = "uniform"
    correction: FeatureCorrection = "channel"
    points: int = 128
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, ("interval", "branch", "points"))
        check_fields(self, ("batch_size",), most=MAX_BATCH)
        check_word("schedule", self.schedule, Refreshes)
        check_word("correction", self.correction, FeatureCorrection)
        check_seed(self.seed)
