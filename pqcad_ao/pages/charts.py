"""What a page draws: places and paths for its inline SVG, in a viewBox of 100 by 100 or as said."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """One bar: what it says, how long it is, and from where to where it may as well be.

    Attributes:
        title: what was measured. value: its length. text: the value as people read it. low, high: of the whisker, or
            None. ours: whether it is drawn as ours.
    """

    title: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    ours: bool = False


def scale(bars: Sequence[Bar]) -> float:
    """What turns a value into its place, so that the longest bar and whisker end at 100."""
    longest = max((max(bar.value, bar.high or 0) for bar in bars), default=0)
    return 100 / longest if longest > 0 else 0.0


# -- the network's own shape: a diffusers UNet goes down, through its middle and up again

BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.")
LAYER, DEPTH, TALLEST = 8, 34, 30  # width of a layer, height of a level, and of eight bits


def network(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Each layer of a plan as a rectangle, in order of execution, as deep as its block lies, as high as it has bits.

    Returns:
        ``layers`` with x, y, width, height, bits, a sensitivity from 0 to 1 (or None) and a label; ``width``,
        ``height`` of the whole; ``widths``, the bits that there are; ``measured``, whether any sensitivity is known.
    """
    if not rows:
        return None
    levels = max((int(found[2]) for row in rows if (found := BLOCK.match(row["fqn"]))), default=0)
    measured = [row["sensitivity"] for row in rows if row.get("sensitivity")]
    low, high = (math.log10(min(measured)), math.log10(max(measured))) if measured else (0.0, 0.0)
    layers = []
    for place, row in enumerate(rows):
        bits = row["weight_bits"]
        height = TALLEST if bits is None else TALLEST * bits / 8
        sensitive = row.get("sensitivity")
        heat = None if not sensitive else (math.log10(sensitive) - low) / ((high - low) or 1)
        shown = "float" if bits is None else f"W{bits}A{row['activation_bits'] or ' float'}"
        label = f"{row['fqn']}: {shown}" + ("" if not sensitive else f", sensitivity {sensitive:.1e}")
        top = DEPTH * _depth(row["fqn"], levels) + TALLEST - height
        layers.append(
            {"x": place * LAYER, "y": top, "width": LAYER - 1.5, "height": height, "bits": bits}
            | {"heat": heat, "label": label}
        )
    return {
        "layers": layers,
        "width": len(rows) * LAYER,
        "height": DEPTH * (levels + 2),
        "widths": sorted({layer["bits"] for layer in layers if layer["bits"]}),
        "measured": bool(measured),
    }


def _depth(fqn: str, levels: int) -> int:
    """How many halvings of the picture lie above a layer."""
    found = BLOCK.match(fqn)
    if found is None:
        return levels + 1 if fqn.startswith("mid_block") else 0
    return int(found[2]) if found[1] == "down" else levels - int(found[2])


# -- learning

HIGH = 100  # of the upper chart; that of the bits below it is half as high


def learning(log: Sequence[Mapping[str, Any]], transitions: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The loss and its momentum above, on a logarithmic scale, bits below; x is the update, y falls from the top.

    Returns:
        ``loss``, ``momentum`` and ``bits`` as SVG paths; ``low`` and ``high`` of the loss; ``width``; ``marks``, x of
        each transition; ``widths``, y of each width of bits; ``stages``, x of where each begins; and ``transitions``.
        Without a log, the transitions alone.
    """
    if not log:
        return {"transitions": transitions} if transitions else None
    losses = [row["loss"] for row in log]
    positive = [loss for loss in losses if loss > 0]
    low, high = math.log10(min(positive, default=1e-9)), math.log10(max(positive, default=1.0))

    def y(loss: float | None) -> float | None:
        if not loss or not math.isfinite(loss):
            return None
        return HIGH * (high - math.log10(loss)) / ((high - low) or 1)

    widths = sorted({row["bits"] for row in log}, reverse=True)
    levels = {bits: 8 + 36 * place / max(len(widths) - 1, 1) for place, bits in enumerate(widths)}
    starts: dict[str, int] = {}
    for place, row in enumerate(log):
        starts.setdefault(row["stage"], place)
    return {
        "loss": path([y(loss) for loss in losses]),
        "momentum": path([y(row["momentum"]) for row in log]),
        "bits": stairs([levels[row["bits"]] for row in log]),
        "low": 10**low,
        "high": 10**high,
        "width": max(len(log) - 1, 1),
        "marks": [t["step"] for t in transitions],
        "widths": levels,
        "stages": starts,
        "transitions": transitions,
    }


def path(heights: Sequence[float | None]) -> str:
    """An SVG path through (0, heights[0]), (1, heights[1]), ...; where a height is None, it is lifted."""
    parts, down = [], False
    for x, height in enumerate(heights):
        if height is None or not math.isfinite(height):
            down = False
            continue
        parts.append(f"{'L' if down else 'M'}{x} {height:.2f}")
        down = True
    return "".join(parts)


def stairs(heights: Sequence[float]) -> str:
    """An SVG path that keeps each height until the next one."""
    changes = [(x, height) for x, height in enumerate(heights) if x == 0 or height != heights[x - 1]]
    return "".join(
        [f"M0 {heights[0]:.2f}", *(f"H{x}V{height:.2f}" for x, height in changes[1:]), f"H{len(heights) - 1}"]
    )
