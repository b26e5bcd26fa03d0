"""What an export of a ``.pte`` wrote and measured."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from pqcad_ao.edge.storage import EdgePlan


@dataclass
class PTEReport:
    """What an export wrote and what was measured on it.

    Attributes:
        path: of the file. bytes: its size.
        delegates: calls of XNNPACK in one step. portable: operators that stayed outside, with their number.
        sqnr_db: timestep to the signal-to-noise ratio of the program's predictions against the network's.
        rounding_db: the network's own at its worst step when its activations move in their last bit; measured where the
            program fell below what was asked for, else None.
        arithmetic: layer to what it runs in. plan: how each layer's weights are stored, and why.
        refresh: the timesteps that are computed in full, where others take the deep feature of one before; None: all.
    """

    path: Path
    bytes: int
    delegates: int
    portable: dict[str, int]
    sqnr_db: dict[float, float] = field(default_factory=dict)
    rounding_db: float | None = None
    arithmetic: dict[str, str] = field(default_factory=dict)
    plan: EdgePlan = field(default_factory=lambda: EdgePlan([]))
    refresh: list[Any] | None = None

    def __str__(self) -> str:
        rows = [("file", f"{self.path}, {self.bytes:,} bytes"), ("XNNPACK calls per step", self.delegates)]
        portable = ", ".join(f"{count} {name}" for name, count in sorted(self.portable.items()))
        rows.append(("operators outside", portable or "none"))
        if self.refresh is not None:
            counts = f"{len(self.refresh)} of {len(self.sqnr_db)}"
            rows.append(("steps in full", f"{counts}, the others with a feature that is kept"))
        if self.sqnr_db:
            worst = min(self.sqnr_db, key=self.sqnr_db.__getitem__)
            middle = median(self.sqnr_db.values())
            text = f"{self.sqnr_db[worst]:.1f} dB at worst (timestep {worst:g}), median {middle:.1f} dB"
            rows.append(("against the network", text))
        if self.rounding_db is not None:
            rows.append(("float32 rounding alone", f"{self.rounding_db:.1f} dB at worst"))
        for text, count in Counter(self.arithmetic.values()).most_common():
            rows.append((f"{count} layer{'s' if count > 1 else ''}", text))
        return "\n\n".join([tabulate(rows, tablefmt="plain"), *([str(self.plan)] if self.plan.layers else [])])
