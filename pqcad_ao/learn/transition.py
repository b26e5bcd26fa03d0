"""When a bit-width gives way to the next one, and how fast: a policy over losses, with no tensors in it."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pqcad_ao.utils.checks import is_whole

ROUNDING = 1e-9  # progress below it is no progress: of a loss that stays the same, the sign is chance


@dataclass(frozen=True)
class Transition:
    """One step down the ladder: at which update, from and to how many bits, at what momentum, and why."""

    step: int
    from_bits: int
    to_bits: int
    momentum: float
    reason: str


@dataclass
class MomentumTransition:
    """Walks a ladder of bit-widths, moved by the momentum of the perturbation loss.

    At every width m_k = β·m_{k-1} + (1-β)·ℓ_k, bias-corrected, restarts at zero. When the relative progress of m over
    ``window`` updates has been below ``tau`` for ``patience`` updates in a row, or the width's share of the budget is
    spent, the next width begins to blend in: the values in use are (1-α)·Q_from + α·Q_to, and α follows its own
    momentum, α ← β·α + (1-β), until what is missing to 1 is at most 1-β and it arrives. No update therefore moves the
    values in use by more than (1-β)·‖Q_from - Q_to‖.

    The widths share the budget equally, the last one keeping what the others left. Only ratios of losses matter, so a
    constant factor changes nothing.

    Args:
        ladder: bit-widths, falling.
        budget: updates in all; :meth:`minimum_budget` says how many it takes at least.
        beta: momentum of the loss and of α, in (0, 1).
        tau: progress below which a width counts as settled, as a part of the loss.
        window: updates over which progress is measured.
        patience: how many updates in a row must show it.

    Raises:
        ValueError: a ladder that is empty or does not fall, or a budget too small to walk it.
    """

    ladder: list[int]
    budget: int
    beta: float = 0.9
    tau: float = 0.02
    window: int = 20
    patience: int = 5
    step: int = 0
    rung: int = 0
    alpha: float = 1.0
    transitions: list[Transition] = field(default_factory=list)
    _since: int = 0
    _momentum: float = 0.0
    _history: list[float] = field(default_factory=list)
    _settled: int = 0

    def __post_init__(self) -> None:
        self.ladder = list(self.ladder)
        if not self.ladder or not all(is_whole(bits) for bits in self.ladder):
            raise ValueError(f"ladder={self.ladder}: write falling bit-widths such as [8, 6, 5, 4]")
        if any(a <= b for a, b in zip(self.ladder, self.ladder[1:], strict=False)):
            raise ValueError(
                f"ladder={self.ladder} does not fall: write it from many bits to few, such as [8, 6, 5, 4]"
            )
        if not 0 < self.beta <= 0.9999:
            raise ValueError(f"beta={self.beta}: allowed are numbers above 0 and up to 0.9999")
        if self.tau < 0 or self.window < 1 or self.patience < 1:
            raise ValueError(
                f"tau={self.tau}, window={self.window}, patience={self.patience}: allowed are tau >= 0, others >= 1"
            )
        least = self.minimum_budget(len(self.ladder), self.beta)
        if self.budget < least:
            raise ValueError(
                f"budget={self.budget} updates cannot walk {self.ladder} with beta={self.beta}: it takes {least}"
            )

    @staticmethod
    def blend_steps(beta: float) -> int:
        """Updates that α takes from 0 to 1."""
        alpha, steps = 0.0, 0
        while alpha < 1:
            alpha, steps = _raise(alpha, beta), steps + 1
        return steps

    @classmethod
    def minimum_budget(cls, widths: int, beta: float) -> int:
        """Updates that ``widths`` widths take: each but the first blends in, and each is used once whole."""
        return (widths - 1) * cls.blend_steps(beta) + widths

    @property
    def bits(self) -> int:
        """The width in use, or the one that is blending in."""
        return self.ladder[self.rung]

    @property
    def momentum(self) -> float:
        """The bias-corrected momentum of the loss at this width; NaN before the first loss."""
        return self._history[-1] if self._history else math.nan

    @property
    def done(self) -> bool:
        return self.step >= self.budget

    def update(self, loss: float) -> Transition | None:
        """Take the loss of one training update.

        Returns:
            the transition that begins here, if one does.

        Raises:
            FloatingPointError: the loss is NaN or infinite; nothing is changed.
            RuntimeError: the budget is spent.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(f"the perturbation loss is {loss} at update {self.step}, at {self.bits} bits")
        if self.done:
            raise RuntimeError(f"the budget of {self.budget} updates is spent")
        self.step += 1
        if self.alpha < 1:
            self.alpha = _raise(self.alpha, self.beta)
            return None
        self._since += 1
        self._momentum = self.beta * self._momentum + (1 - self.beta) * loss
        corrected = self._momentum / (1 - self.beta**self._since)
        self._history = [*self._history[-self.window :], corrected]
        if len(self._history) > self.window:
            before = self._history[0]
            progress = (before - corrected) / abs(before) if before else 0.0
            self._settled = self._settled + 1 if progress < max(self.tau, ROUNDING) else 0
        if self.rung == len(self.ladder) - 1:
            return None
        if self._settled >= self.patience:
            return self._descend(f"progress below {self.tau:g} for {self.patience} updates")
        if self._remaining() <= 0:
            return self._descend("share of the budget spent")
        return None

    def _remaining(self) -> int:
        """Updates that this width may still take before it is time for the next one."""
        ahead = len(self.ladder) - 1 - self.rung
        blend = self.blend_steps(self.beta)
        share = (self.rung + 1) * self.budget // len(self.ladder)
        return min(share, self.budget - ahead * (blend + 1)) - self.step

    def _descend(self, reason: str) -> Transition:
        transition = Transition(self.step, self.bits, self.ladder[self.rung + 1], self.momentum, reason)
        self.transitions.append(transition)
        self.rung += 1
        self.alpha, self._momentum, self._since, self._settled, self._history = 0.0, 0.0, 0, 0, []
        return transition

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "MomentumTransition":
        """Invert :meth:`state_dict`: the copy goes on exactly as the original would."""
        return cls(**{**state, "transitions": [Transition(**row) for row in state["transitions"]]})


def _raise(alpha: float, beta: float) -> float:
    return 1.0 if 1 - alpha <= 1 - beta else beta * alpha + (1 - beta)
