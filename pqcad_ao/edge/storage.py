"""Which convolutions of a .pte store two weights a byte: half the bytes, for more numbers moved around the product."""

import json
from dataclasses import dataclass, replace
from functools import cache

from tabulate import tabulate
from torch.fx import GraphModule, Node

from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import layer_fqn, packed_operator
from pqcad_ao.passes.to_xnnpack import can_pack
from pqcad_ao.utils.assets import asset_path
from pqcad_ao.utils.checks import check_count

OBJECTIVES = ("speed", "size")
# Under objective="speed" two weights go into a byte where that costs at most this part of the layer's own time.
CHEAP = 0.5
COSTS = asset_path("xnnpack_costs.json")


@dataclass(frozen=True)
class EdgeLayer:
    """A quantized layer of a .pte.

    Attributes:
        fqn: its name in the network. bits: of its weights.
        byte_weights, packed_weights: bytes of the file for its weights, at one and at two a byte; None where there is
            no such form.
        ms: of one call with byte_weights, and extra_ms: what packed_weights add, by the measured costs.
        packed: the choice. reason: for it.
    """

    fqn: str
    bits: int
    byte_weights: int | None
    packed_weights: int | None
    ms: float
    extra_ms: float
    packed: bool
    reason: str

    @property
    def bytes(self) -> int:
        """Of its weights, as chosen."""
        return (self.packed_weights if self.packed else self.byte_weights) or 0


@dataclass(frozen=True)
class EdgePlan:
    """The choice for every quantized layer whose input is quantized too."""

    layers: list[EdgeLayer]

    @property
    def packed(self) -> set[str]:
        """The convolutions to pack, by name."""
        return {layer.fqn for layer in self.layers if layer.packed and layer.byte_weights is not None}

    @property
    def saved(self) -> int:
        """Bytes that packing takes away."""
        return sum(row.byte_weights - row.bytes for row in self.layers if row.byte_weights is not None)

    def __str__(self) -> str:
        rows = [
            (
                row.fqn,
                f"W{row.bits}",
                "int4" if row.packed else "int8",
                f"{row.bytes:,}",
                f"{row.extra_ms:.3f}",
                row.reason,
            )
            for row in self.layers
        ]
        return tabulate(rows, ["layer", "", "stored", "bytes", "ms for int4", "why"], colalign=("left",) * 3)


def check_objective(objective: str, max_bytes: int | None) -> None:
    """Raises ValueError: an objective or a size that there is not."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: allowed are {', '.join(map(repr, OBJECTIVES))}")
    if max_bytes is not None:
        check_count("max_bytes", max_bytes, otherwise=", or None")


def plan_edge(graph: GraphModule, objective: str = "speed", to_save: int | None = None) -> EdgePlan:
    """Choose for every layer of an exported network, before :func:`to_xnnpack` rewrites it.

    Args:
        objective: ``"speed"`` packs where that costs a layer at most half of its time; ``"size"`` wherever there
            is such a form.
        to_save: bytes that packing has to take away, those first that cost the least time for a byte. It takes the
            place of ``objective``.

    Raises:
        ValueError: that many bytes cannot be saved.
    """
    measured = [_measure(node) for node in graph.graph.nodes if packed_operator(node) is not None]
    if to_save is None:
        chosen = {row.fqn for row in measured if _has_choice(row) and (objective == "size" or _is_cheap(row))}
    else:
        chosen = _cheapest(measured, to_save)
    return EdgePlan([_decide(row, row.fqn in chosen, objective, to_save) for row in measured])


@cache
def costs() -> dict[str, float]:
    """Nanoseconds for a multiply-accumulate of an int8 convolution, and for a number that the packed form moves."""
    return json.loads(COSTS.read_text())["nanoseconds"]


def _measure(node: Node) -> EdgeLayer:
    arguments, fqn = bind(node), layer_fqn(node) or ""
    weight_bits = arguments["weight_bits"]
    shape, result = arguments["input"].meta["val"].shape, node.meta["val"].shape
    if "kernel_size" not in arguments:
        outputs, inputs = result[-1], shape[-1]
        packed = outputs * (inputs + 2) // 2 if weight_bits <= 4 else None
        return EdgeLayer(fqn, weight_bits, None if packed else outputs * (inputs + 2), packed, 0.0, 0.0, False, "")
    kernel, groups = arguments["kernel_size"], arguments["groups"]
    places, outputs, inputs = result[2] * result[3] * result[0], result[1], shape[1]
    size = kernel[0] * kernel[1]
    per_byte = outputs * (inputs // groups + 2 * (groups == 1)) * size * (4 if groups > 1 else 1)
    steps = costs()
    ms = places * outputs * (inputs // groups) * size * steps["multiply_accumulate"] * 1e-6
    if not can_pack(node):
        return EdgeLayer(fqn, weight_bits, per_byte, None, ms, 0.0, False, "")
    columns = kernel[1] if list(arguments["stride"]) == [1, 1] else 1
    packed = columns * outputs * ((size // columns * inputs + 2) // 2)
    moved = places * (inputs + outputs) if size > 1 else 0
    return EdgeLayer(fqn, weight_bits, per_byte, packed, ms, moved * steps["number"] * 1e-6, False, "")


def _has_choice(row: EdgeLayer) -> bool:
    return row.byte_weights is not None and row.packed_weights is not None


def _is_cheap(row: EdgeLayer) -> bool:
    return row.extra_ms <= CHEAP * row.ms


def _cheapest(measured: list[EdgeLayer], to_save: int) -> set[str]:
    def price(row: EdgeLayer) -> float:
        return row.extra_ms / (row.byte_weights - row.packed_weights)  # type: ignore[operator]

    chosen, saved = set(), 0
    for row in sorted((row for row in measured if _has_choice(row)), key=price):
        if saved >= to_save and row.extra_ms > 0:
            break
        chosen.add(row.fqn)
        saved += row.byte_weights - row.packed_weights  # type: ignore[operator]
    if saved < to_save:
        raise ValueError(f"storing every 4-bit weight in half a byte saves {saved:,} bytes, {to_save:,} are asked for")
    return chosen


def _decide(row: EdgeLayer, chosen: bool, objective: str, to_save: int | None) -> EdgeLayer:
    if row.packed_weights is None:
        reason = "grouped" if row.bits <= 4 else f"weights of {row.bits} bits"
    elif row.byte_weights is None or row.extra_ms == 0:
        chosen, reason = True, "two weights a byte cost nothing here"
    else:
        share = f"int4 costs {row.extra_ms / row.ms:.0%} of its time" if row.ms else "int4 costs time"
        wanted = "bytes to save" if to_save is not None else f"objective {objective!r}"
        reason = f"{share}; {wanted}"
    chosen = chosen and row.packed_weights is not None
    return replace(row, packed=chosen, reason=reason)
