"""Weights of samples, learned from how their gradients agree (after gradient-aligned calibration, arXiv 2602.01289).

To first order a held-out loss falls, by an update, as far as a sample's gradient points along its own. So the weight of
a sample rises where its gradient lowers the held-out loss of the tasks, the ranges of timesteps; no derivative of a
derivative is taken.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST, LARGEST = 0.25, 4.0  # of a weight
FORGETTING = 0.9  # of a layer's mean square, from batch to batch
# A layer's root mean square over the largest layer's, below which it counts for less than others: a shift that a norm
# takes out again has what rounding leaves. Of the embedded teacher's layers the smallest has 3e-4.
NEGLIGIBLE = 1e-6


def bounded(s: Tensor, temperature: float) -> Tensor:
    """ω ∝ softmax(s / τ) within [1/4, 4], its factor such that the mean is 1. Shapes (N,) to (N,) float64."""
    logarithm = s.double() / temperature
    low, high = math.log(LEAST) - logarithm.max(), math.log(LARGEST) - logarithm.min()
    for _ in range(60):  # the mean of the clipped weights rises with the factor: halve where it is 1
        middle = (low + high) / 2
        above = (logarithm + middle).exp().clamp(LEAST, LARGEST).mean() > 1
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (logarithm + high).exp().clamp(LEAST, LARGEST)


def alignment(P: Tensor, G: Tensor, pairs: float) -> Tensor:
    """r = (1 − γ) mean_k A_k + γ mean_{k≠l} min(A_k, A_l), with A_k the cosine of a sample's gradient and task k's.

    The first term is the gradient of the held-out loss; the second asks a sample to help both tasks of every pair.

    Args:
        P: (B, D). G: (K, D), K from 1; of one task alone the first term is all. pairs: γ.
    """
    A = F.normalize(P.double(), dim=1) @ F.normalize(G.double(), dim=1).T
    if len(G) < 2:
        return A.mean(1)
    one, other = torch.combinations(torch.arange(len(G), device=G.device)).unbind(1)
    return (1 - pairs) * A.mean(1) + pairs * torch.minimum(A[:, one], A[:, other]).mean(1)


def agreement(G: Tensor) -> float | None:
    """The mean cosine between two tasks' gradients (K, D), over all pairs; None of less than two tasks."""
    if len(G) < 2:
        return None
    one, other = torch.combinations(torch.arange(len(G), device=G.device)).unbind(1)
    unit = F.normalize(G.double(), dim=1)
    return (unit[one] * unit[other]).sum(1).mean().item()


@dataclass
class SampleWeights:
    """The weights of what is learned from, and what moves them.

    Attributes:
        slot: (N,) int64, which of the logits each point takes: its own, or its task's.
        tasks: how many there are.
        rate, temperature, pairs: ρ, τ and γ.
        logits: (M,) float64, s. gradients: (K, D) mean gradient of each task. known: (K,) whether it was measured.
        squares: (layers,) running mean square of each layer's entries.
    """

    slot: Tensor
    tasks: int
    rate: float
    temperature: float
    pairs: float
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    gradients: Tensor = field(default_factory=lambda: torch.empty(0))
    known: Tensor = field(default_factory=lambda: torch.empty(0))
    squares: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        device = self.slot.device
        self.logits = torch.zeros(int(self.slot.max()) + 1, dtype=torch.float64, device=device)
        self.known = torch.zeros(self.tasks, dtype=torch.bool, device=device)

    @property
    def omega(self) -> Tensor:
        """ω of every point, (N,) float32."""
        return bounded(self.logits[self.slot], self.temperature).float()

    @property
    def agreement(self) -> float | None:
        return agreement(self.gradients[self.known]) if self.known.any() else None

    def forget(self) -> None:
        """Drop what was measured of tasks and layers; the weights stay."""
        self.gradients, self.squares = torch.empty(0), torch.empty(0)
        self.known = torch.zeros_like(self.known)

    def begin(self, by_task: list[list[Tensor]]) -> None:
        """Let layers' mean squares, where there are none yet, begin at those of all tasks' gradients: none goes first.

        Args:
            by_task: what the probes found of each task, layer by layer, (B, C) each.
        """
        if not len(self.squares):
            found = [torch.stack([g.square().mean() for g in gradients]) for gradients in by_task]
            self.squares = torch.stack(found).mean(0)

    def joined(self, gradients: list[Tensor], *, follow: bool) -> Tensor:
        """What the probes found as one vector for each sample, (B, D), each layer over its running root mean square.

        Args:
            follow: let the running mean squares take these gradients in.
        """
        now = torch.stack([g.square().mean() for g in gradients])
        if not len(self.squares):
            self.squares = now
        elif follow:
            self.squares = FORGETTING * self.squares + (1 - FORGETTING) * now
        scales = self.squares.sqrt()
        scales = torch.maximum(scales, (NEGLIGIBLE * scales.max()).clamp_min(torch.finfo(now.dtype).tiny))
        return torch.cat([g / scale for g, scale in zip(gradients, scales, strict=True)], 1)

    def remember(self, task: int, P: Tensor, decay: float) -> None:
        """Take the mean of samples' gradients (B, D) into a task's; the first is taken whole."""
        if not len(self.gradients):
            self.gradients = P.new_zeros(self.tasks, P.shape[1])
        mean = P.mean(0)
        self.gradients[task] = decay * self.gradients[task] + (1 - decay) * mean if self.known[task] else mean
        self.known[task] = True

    def move(self, rows: Tensor, P: Tensor) -> None:
        """Let the logits of a batch's points follow how their gradients (B, D) agree with the tasks'."""
        if not self.known.any():
            return
        r = alignment(P, self.gradients[self.known], self.pairs)
        slots, number = self.slot[rows].unique(return_inverse=True)
        total = torch.zeros(len(slots), dtype=r.dtype, device=r.device).index_add_(0, number, r)
        self.logits[slots] += self.rate * (total / torch.bincount(number) - r.mean())

    def state(self) -> dict[str, Tensor]:
        """All that moves, for a checkpoint."""
        kept = {"logits": self.logits, "known": self.known}
        return (
            kept
            | ({"gradients": self.gradients} if len(self.gradients) else {})
            | ({"squares": self.squares} if len(self.squares) else {})
        )

    def load(self, state: dict[str, Tensor]) -> None:
        """Invert :meth:`state`."""
        for name, value in state.items():
            setattr(self, name, value.to(self.slot.device))
