"""The rows of ``pqcad bench quality``: every way to quantize and to distill, and sets of them."""

from dataclasses import dataclass, field
from typing import Any

from pqcad_ao.config import PQCADConfig


@dataclass(frozen=True)
class Row:
    """How a row's network is made.

    Attributes:
        options: of :class:`PQCADConfig`; None: nothing is quantized in this row. preset: of its presets, the one meant.
        cad: options of :class:`CADConfig`, the distillation that follows; None: none.
        correct: options of :class:`Correction`, what is fitted to its sampling afterwards; None: none.
        base: the row whose network this one starts from, with that one's sampler; None: the teacher.
        part: the row is sampled in this part of the steps: 1, 2 (half) or 4.
        solver: name of diffusers' scheduler that samples it, with the teacher's noise process; None: the network's own.
        cache: options of :class:`CacheConfig`, with which the network keeps features between steps; None: it does not.
    """

    title: str
    options: dict[str, Any] | None = field(default_factory=dict)
    preset: str | None = None
    cad: dict[str, Any] | None = None
    correct: dict[str, Any] | None = None
    base: str | None = None
    part: int = 1
    solver: str | None = None
    cache: dict[str, Any] | None = None

    def config(self, seed: int, extra: dict[str, Any] | None = None) -> PQCADConfig | None:
        if self.options is None:
            return None
        make = getattr(PQCADConfig, self.preset) if self.preset else PQCADConfig
        return make(seed=seed, **{**self.options, **(extra or {})})


def _distilled(title: str, base: str = "pq_full", part: int = 2, **cad: Any) -> Row:
    return Row(title, None, cad=cad, base=base, part=part)


A4 = {"activation_bits": 4}
ROWS = {
    "fp_full": Row("full precision", None),
    "ptq_full": Row("fixed W4A4, nothing learned", {**A4, "mode": "ptq"}),
    "fixed_full": Row("fixed W4A4, learned", {**A4, "mode": "fixed"}),
    "pq_full": Row("progressive W4A4", A4),
    "pq_fast": Row("progressive W4A4, fast preset", A4, preset="fast"),
    "pq_paper": Row("progressive W4A4, paper preset", preset="paper"),
    "pq_schedule": Row("progressive W4A4, fixed schedule", {**A4, "transitions": "schedule"}),
    "pq_normal": Row("progressive W4A4, normal C_QC", {**A4, "calibration_timesteps": "normal"}),
    "pq_w4a6": Row("progressive W4A6", {"activation_bits": 6}),
    "pq_w4a8": Row("progressive W4A8", {"activation_bits": 8}),
    "pq_w3a8": Row("progressive W3A8", {"weight_bits": 3, "activation_bits": 8}),
    "pq_w3a4": Row("progressive W3A4", {**A4, "weight_bits": 3}),
    "fp_half": Row("full precision, half the steps", None, part=2),
    "pq_half": Row("progressive W4A4, half the steps", None, base="pq_full", part=2),
    "pqcad_half": _distilled("W4A4, distilled to half the steps"),
    "pqcad_quarter": _distilled("W4A4, distilled to a quarter of the steps", part=4, halvings=2),
    "pqcad_quarter_direct": _distilled("W4A4, distilled to a quarter at once", part=4, halvings=2, direct=True),
    "pqcad_half_w4a6": _distilled("W4A6, distilled to half the steps", base="pq_w4a6"),
    "pqcad_quarter_w4a6": _distilled(
        "W4A6, distilled to a quarter at once", base="pq_w4a6", part=4, halvings=2, direct=True
    ),
}
# Fewer steps without distillation, with the solvers that diffusers has for that.
SOLVED = {
    "pq_half_w4a6_unipc": Row(
        "progressive W4A6, UniPC, half the steps", None, base="pq_w4a6", part=2, solver="UniPCMultistepScheduler"
    ),
    "fp_full_dpmpp": Row("full precision, DPM-Solver++ 2M", None, solver="DPMSolverMultistepScheduler"),
    "fp_full_unipc": Row("full precision, UniPC", None, solver="UniPCMultistepScheduler"),
    "fp_half_dpmpp": Row(
        "full precision, DPM-Solver++ 2M, half the steps", None, part=2, solver="DPMSolverMultistepScheduler"
    ),
    "fp_half_unipc": Row("full precision, UniPC, half the steps", None, part=2, solver="UniPCMultistepScheduler"),
}
ROWS |= SOLVED


def _bit_by_bit(weight_bits: int, activation_bits: int, **options: Any) -> dict[str, Row]:
    """The same updates at the final bits, and down ladders that begin two bits above them."""
    name, bits = f"w{weight_bits}a{activation_bits}", {"weight_bits": weight_bits, "activation_bits": activation_bits}
    ladders = {
        "weight_ladder": [weight_bits + 2, weight_bits + 1],
        "activation_ladder": [] if activation_bits == 8 else [activation_bits + 2, activation_bits + 1],
    }
    return {
        f"low_fixed_{name}": Row(f"fixed {name.upper()}, learned", {**bits, **options, "mode": "fixed"}),
        f"low_pq_{name}": Row(f"progressive {name.upper()}, from two bits above", {**bits, **options, **ladders}),
    }


# Does learning bit by bit pay where bits are fewest, or updates and points (the fast preset)?
LOW = {
    **_bit_by_bit(3, 3),
    **_bit_by_bit(3, 4),
    **_bit_by_bit(2, 4, weight_share=0.5),
    **_bit_by_bit(2, 8, weight_share=0.5),
    "low_fixed_fast": Row("fixed W4A4, fast preset", {**A4, "mode": "fixed"}, preset="fast"),
}
ROWS |= LOW
# What each part of distillation adds. All take the same number of updates.
ABLATIONS = {
    "cad_ddim": _distilled("W4A4 distilled: the sampler's own steps", reference_solver="ddim", reference_substeps=1),
    "cad_dpmpp": _distilled("W4A4 distilled: DPM-Solver++ 2M", reference_solver="dpmpp_2m"),
    "cad_dpmpp_fine": _distilled(
        "W4A4 distilled: DPM-Solver++ 2M, two substeps", reference_solver="dpmpp_2m", reference_substeps=2
    ),
    "cad_fine": _distilled("W4A4 distilled: UniPC, two substeps", reference_substeps=2),
    "cad_teacher": _distilled("W4A4 distilled: quantized teacher alone", teacher_weight=1.0, reference_weight=0.0),
    "cad_both": _distilled("W4A4 distilled: quantized teacher and reference", teacher_weight=0.5, reference_weight=0.5),
    "cad_inject": _distilled("W4A4 distilled: noise injected", noise_injection=0.05),
    "cad_renoised": _distilled("W4A4 distilled: pictures noised anew", renoised=True),
    "cad_x": _distilled("W4A4 distilled: x-space, truncated SNR", space="x"),
    "cad_from_fixed": _distilled("W4A4 distilled, from fixed-bit learning", base="fixed_full"),
    "cad_from_ptq": _distilled("W4A4 distilled, nothing learned before", base="ptq_full"),
    "cad_joint": _distilled("W4A4 quantized and distilled at once, twice the updates", base="ptq_full", iterations=800),
    "pd_half": _distilled("full precision, distilled to half the steps", base="fp_full"),
    "pd_then_q": Row("distilled, then progressive W4A4", A4, base="pd_half", part=2),
}
ROWS |= ABLATIONS
# A part of the layers learns, under a local loss each and the global one.
SELECTIVE = {
    "quest_full": Row("selective W4A4, local and global loss", A4, preset="quest"),
    "quest_global": Row("selective W4A4, global loss alone", {**A4, "local_weight": 0.0}, preset="quest"),
    "quest_all": Row("fixed W4A4, local and global loss", {**A4, "mode": "fixed", "local_weight": 1.0}),
    "quest_time": Row("selective W4A4, time projections alone", {**A4, "trainable": ["time"]}, preset="quest"),
}
ROWS |= SELECTIVE
# Samples count by how their gradients agree, or by how far an error carries.
WEIGHTED = {
    "gac_full": Row("progressive W4A4, a weight for each sample", {**A4, "sample_weights": "aligned"}),
    "gac_groups": Row("progressive W4A4, a weight for each range of timesteps", {**A4, "sample_weights": "groups"}),
    "gac_reach": Row("progressive W4A4, weights by reach", {**A4, "sample_weights": "reach"}),
    "gac_w4a8": Row("progressive W4A8, a weight for each sample", {"activation_bits": 8, "sample_weights": "aligned"}),
}
ROWS |= WEIGHTED
# Which points the activation grids are fitted to; the choice matters most where there are few.
CHOSEN = {
    "ptq_clusters": Row(
        "fixed W4A4, nothing learned, points by clusters", {**A4, "mode": "ptq", "calibration_selection": "clusters"}
    ),
    "ptq_few": Row("fixed W4A4, nothing learned, 64 points", {**A4, "mode": "ptq", "calibration_points": 64}),
    "ptq_few_clusters": Row(
        "fixed W4A4, nothing learned, 64 points by clusters",
        {**A4, "mode": "ptq", "calibration_points": 64, "calibration_selection": "clusters"},
    ),
}
ROWS |= CHOSEN
# Features are kept between steps. At two steps a full one, these cost little more than half the steps do.
CACHED = {
    "cache_fp": Row("full precision, features kept for a step", None, base="fp_full", cache={}),
    "cache_naive": Row("W4A4, features kept as they are", None, base="pq_full", cache={"correction": "none"}),
    "cache_qc": Row("W4A4, features kept, corrected", None, base="pq_full", cache={"schedule": "optimal"}),
    "cache_half": Row(
        "W4A4, distilled to half the steps, features kept",
        None,
        base="pqcad_half",
        part=2,
        cache={"schedule": "optimal"},
    ),
}
ROWS |= CACHED
# A filter, or a published factor, for each step.
CORRECTED = {
    f"correct_{kind}{suffix}": Row(f"{title}, {kind}", None, correct={"kind": kind}, base=base, part=part)
    for base, suffix, title, part in (
        ("pq_full", "", "progressive W4A4 corrected", 1),
        ("pqcad_half", "_half", "W4A4 distilled to half the steps, corrected", 2),
    )
    for kind in ("debias", "regression", "variance", "ptqd", "tac", "vc")
}
ROWS |= CORRECTED
APART = {*ABLATIONS, *SOLVED, *CACHED, *CORRECTED}  # whose rows of fewer steps are of sets of their own
DEFAULT_ROWS = ["fp_full", "ptq_full", "pq_full"]
SETS = {
    "all": [*ROWS],
    "progressive": [
        "fp_full",
        "ptq_full",
        "fixed_full",
        "pq_full",
        "pq_schedule",
        "pq_normal",
        "pq_fast",
        "pq_w4a8",
        "pq_w4a6",
        "pq_w3a8",
        "pq_w3a4",
    ],
    "halving": [
        "fp_full",
        *(name for name, row in ROWS.items() if row.part > 1 and name not in APART),
        *SOLVED,
    ],
    "family": [
        *("fp_full", "ptq_full", "fixed_full", "pq_full", "pqcad_half"),
        *(*SELECTIVE, *WEIGHTED, *CHOSEN, *CACHED, *CORRECTED),
    ],
    "ablations": ["fp_full", "pqcad_half", *ABLATIONS],
    "low": ["fp_full", *LOW, "pq_fast"],
}
