"""How a network learns to sample in fewer steps: ``CADConfig``."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pqcad_ao.config.shared import MAX_BATCH, AOBaseConfig, check_selected, check_weights
from pqcad_ao.utils.checks import check_fields, check_numbers, check_seed, check_word
from pqcad_ao.utils.fields import later, repr_of

Solver = Literal["ddim", "dpmpp_2m", "unipc"]
REFERENCE_STEPS = 20  # of a trajectory, at least: UniPC's 40 taught no better (FID 2.88 and 2.79 of W4A6 in 10 steps)
Space = Literal["v", "x"]
StepWeighting = Literal["uniform", "groups"]
Guidance = Literal["kept", "baked"]


@dataclass
class CADConfig(AOBaseConfig):
    """How a network learns to sample in half the steps, staying quantized.

    Args:
        steps: N, of the full schedule; a multiple of 2^halvings.
        halvings: the student samples in N / 2^halvings.
        direct: teach all the halvings in one run of updates, not each in a run of its own.
        iterations: training updates of each run.
        batch_size: of an update, at most 63.
        learning_rate: of weights, biases and norms (Adam), after a short rise falling linearly to zero.
        scale_learning_rate: of the scales, as a part of their own size, falling alike.
        reference_weight: of the target that the full-precision network sets: where its probability flow leads.
        reference_solver: of that flow, with which C_DC is drawn, too: ``"unipc"`` (Zhao et al. 2023), which corrects
            each of its steps; ``"dpmpp_2m"``, DPM-Solver++ 2M (Lu et al. 2022), of the second order; or ``"ddim"``, of
            the first. Where noise is fresh (``renoised``, real pictures) it starts anew with each of the student's
            steps, and takes twice as many substeps if it is of a higher order.
        reference_substeps: its steps for each of the N, at most the training timesteps between two of them. None: one,
            or as many as make 20 of fewer; what the solver gets wrong is handed on to the student.
        teacher_weight: of the target that the student as it was sets, with two of its own steps.
        space: of the loss: ``"v"``, where a network that predicts epsilon counts by how far its error carries over a
            jump, or ``"x"`` with the signal-to-noise weight truncated from below at 1 (Salimans & Ho 2022, §4).
        points: pictures that full precision draws for C_DC. The student learns on the trajectories to them.
        renoised: keep the pictures alone, put fresh noise into them for every update, and let the reference walk from
            there: as published, at several times the cost of an update. Real pictures are always taken so.
        noise_injection: deviation of the noise put on top of each x_t, which the targets correct.
        generation_batch_size: pictures a call while C_DC is drawn.
        check_betas: look first whether the network finds the noise that this scheduler puts in.
        seed: seeds every random draw, 0 to 2^63 - 1.
        trainable: which layers learn weights, biases and weight scales, as for :class:`PQCADConfig`; None: all. For
            networks so large that Adam's eight bytes a parameter do not fit.
        sensitive_share: part of the quantized layers that ``"sensitive"`` names there.
        sample_weights: ``"groups"``: a learned weight for each of the student's steps, which rises where its gradient
            agrees with those of all steps; or ``"uniform"``.
        weight_rate: at which the logits of the learned weights move, 0 to 1000.
        weight_temperature: by which the logits are divided, above 0.
        weight_pairs: part of their alignment that asks to help both steps of every pair, 0 to 1.
        guidance: where the conditioning holds guidance: ``"kept"``, the student is guided as the reference is, in two
            calls a step; or ``"baked"``, it learns to land there in one call without guidance (Meng et al. 2023, for
            one scale). Draw with it without guidance then, in a pipeline with ``guidance_scale=1``; a quantized student
            remembers that, and warns where it is guided again.
        shard: as for :class:`PQCADConfig`; of a quantized student.

    Raises:
        ValueError: a value outside its range; the message says which and what is allowed.

    Example:
        >>> CADConfig(steps=20).runs  # from how many steps to how many, run by run
        [(20, 10)]
        >>> CADConfig(steps=20, halvings=2).runs
        [(20, 10), (10, 5)]
        >>> CADConfig(steps=20, halvings=2, direct=True).runs
        [(20, 5)]
        >>> CADConfig(steps=20).substeps, CADConfig(steps=8).substeps, CADConfig(steps=8, reference_substeps=1).substeps
        (1, 3, 1)
    """

    version: ClassVar[int] = 1

    steps: int = 20
    halvings: int = 1
    direct: bool = False
    iterations: int = 400
    batch_size: int = 32
    learning_rate: float = 6e-4
    scale_learning_rate: float = 1e-3
    reference_weight: float = 1.0
    reference_solver: Solver = "unipc"
    reference_substeps: int | None = None
    teacher_weight: float = 0.0
    space: Space = "v"
    points: int = 1024
    renoised: bool = False
    noise_injection: float = 0.0
    generation_batch_size: int = 32
    check_betas: bool = field(default=True, repr=False)  # the repr names what the result depends on
    seed: int = 0
    trainable: list[str] | None = later(None)
    sensitive_share: float = later(0.1)
    sample_weights: StepWeighting = later("uniform")
    weight_rate: float = later(0.5)
    weight_temperature: float = later(1.0)
    weight_pairs: float = later(0.5)
    guidance: Guidance = later("kept")
    shard: bool = later(False)

    def __post_init__(self) -> None:
        for name in ("check_betas", "direct", "renoised", "shard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: write True or False")
        check_fields(self, ("steps", "halvings", "iterations", "points"))
        if self.reference_substeps is not None:
            check_fields(self, ("reference_substeps",))
        check_word("reference_solver", self.reference_solver, Solver)
        check_fields(self, ("batch_size", "generation_batch_size"), most=MAX_BATCH)
        check_numbers(self, ("learning_rate", "scale_learning_rate", "noise_injection"))
        check_numbers(self, ("reference_weight", "teacher_weight"), most=1000)
        if self.reference_weight + self.teacher_weight == 0:
            raise ValueError("reference_weight=0 and teacher_weight=0 leave nothing to learn from")
        check_word("space", self.space, Space)
        check_word("guidance", self.guidance, Guidance)
        if self.steps % 2**self.halvings:
            raise ValueError(
                f"steps={self.steps} cannot be halved {self.halvings} times: give a multiple of {2**self.halvings}"
            )
        check_seed(self.seed)
        check_selected(self.trainable, self.sensitive_share)
        check_weights(self, StepWeighting)

    __repr__ = repr_of

    @property
    def substeps(self) -> int:
        """Steps of the reference's solver for each of the N."""
        return self.reference_substeps or math.ceil(REFERENCE_STEPS / self.steps)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Each run of updates in turn: the steps that the student takes before it, and those that it learns to take."""
        if self.direct:
            return [(self.steps, self.steps // 2**self.halvings)]
        return [(self.steps // 2**number, self.steps // 2 ** (number + 1)) for number in range(self.halvings)]

    @classmethod
    def fast(cls, **options: Any) -> "CADConfig":
        """Fewer updates and pictures: about a minute for a network of a million parameters on two cores."""
        return cls(**{"iterations": 120, "points": 128, "learning_rate": 1e-3, **options})

    @classmethod
    def paper(cls, **options: Any) -> "CADConfig":
        """Progressive distillation as it is published (Salimans & Ho 2022): from pictures that are noised anew, the
        target is where the sampler's own N DDIM steps land, what they get wrong included."""
        published = {"reference_solver": "ddim", "reference_substeps": 1, "renoised": True}
        return cls(**{**published, "learning_rate": 2e-4, **options})
