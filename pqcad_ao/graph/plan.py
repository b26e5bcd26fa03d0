"""The resolved plan: what happens to every convolution and linear of a network, in how many bits, and why."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.fx import Node

from pqcad_ao.config import ROLES, PQCADConfig
from pqcad_ao.graph.capture import Capture
from pqcad_ao.graph.operators import BATCHED_PRODUCTS, GEMMS, OTHER_GEMMS, call_site, weight_fqn
from pqcad_ao.graph.roles import ancestors, aten, role_of, segments_of

# What a role gets where the user says nothing; None is floating point, "config" the configuration's own width.
ROLE_BITS = {
    "stem": (8, 8, "first convolution: 8 bits"),
    "head": (8, 8, "last convolution: 8 bits"),
    "time_embedding": (None, None, "depends on the timestep alone: a table for a fixed schedule"),
    "time_projection": ("config", None, "weights only: its input depends on the timestep alone"),
}


@dataclass
class PlanRow:
    """What happens to one layer.

    Attributes:
        fqn: its name in the network. kind: conv2d, linear, or the operator's name. role: one of ``config.ROLES``.
        shape: of its weight; for a product without weights, of its output. parameters: of its weight.
        weight_bits, activation_bits: None is floating point.
        segments: input channels with a scale of their own each; more than one where a skip concatenation is split.
        reason: why it is so.
        sensitivity: the perturbation loss when this layer alone is quantized; None where it was not measured.
    """

    fqn: str
    kind: str
    role: str
    shape: list[int]
    parameters: int
    weight_bits: int | None
    activation_bits: int | None
    segments: list[int]
    reason: str
    sensitivity: float | None = None

    @property
    def quantized(self) -> bool:
        return self.weight_bits is not None


@dataclass
class Plan:
    """One row for each convolution, linear and batched product, in order of execution. ``print`` shows the table.

    Attributes:
        target_bits: the average that sensitive layers may yet be raised to; None once they are, or where none will be.
    """

    rows: list[PlanRow] = field(default_factory=list)
    target_bits: float | None = None

    def __iter__(self):
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, fqn: str) -> PlanRow:
        for row in self.rows:
            if row.fqn == fqn:
                return row
        raise KeyError(fqn)

    @property
    def quantized(self) -> list[PlanRow]:
        return [row for row in self.rows if row.quantized]

    def to_list(self) -> list[dict[str, Any]]:
        """Rows as plain dictionaries, fit for JSON."""
        return [asdict(row) for row in self.rows]

    @classmethod
    def from_list(cls, rows: list[dict[str, Any]]) -> "Plan":
        return cls([PlanRow(**row) for row in rows])

    @property
    def average_bits(self) -> float:
        """Of the quantized layers' weights."""
        weights = sum(row.parameters for row in self.quantized)
        return sum(row.parameters * (row.weight_bits or 0) for row in self.quantized) / max(weights, 1)

    def summary(self) -> str:
        """One line: how much of the weights is in how many bits, and their average."""
        total = sum(row.parameters for row in self.rows)
        bits = Counter()
        for row in self.rows:
            bits[row.weight_bits or 32] += row.parameters
        shares = ", ".join(
            f"{'float' if width == 32 else f'{width}-bit'} {share / max(total, 1):.1%}"
            for width, share in sorted(bits.items())
        )
        return (
            f"{len(self.quantized)} of {sum(row.parameters > 0 for row in self.rows)} layers quantized; "
            f"{total:,} weights: {shares}; "
            f"{self.average_bits:.2f} bits on average where quantized"
            + (
                ""
                if self.target_bits is None
                else f"; the layers measured most sensitive get more, up to {self.target_bits:g} on average"
            )
        )

    def __str__(self) -> str:
        measured = any(row.sensitivity is not None for row in self.rows)
        table = [
            (
                row.fqn,
                row.kind,
                row.role,
                "x".join(map(str, row.shape)),
                row.weight_bits or "float",
                row.activation_bits or "float",
                "+".join(map(str, row.segments)) if len(row.segments) > 1 else "",
                *(["" if row.sensitivity is None else f"{row.sensitivity:.1e}"] if measured else []),
                row.reason,
            )
            for row in self.rows
        ]
        headers = ("layer", "kind", "role", "shape", "W", "A", "split", *["sensitivity"] * measured, "reason")
        return tabulate(table, headers, tablefmt="simple") + "\n" + self.summary()


def _unsupported(
    node: Node, fqn: str, modules: dict[str, nn.Module], calls: Counter[str], readers: dict[str, set[str]], batch: Any
) -> str | None:
    """Why a layer cannot be quantized, or None.

    Args:
        fqn: the layer's name. modules: every module under every name that it has. calls: of each layer in one step.
        readers: the modules in whose forward each parameter is read. batch: the (symbolic) number of samples.
    """
    if node.target in OTHER_GEMMS:
        return "no quantized form of this operator"
    parameter, module = weight_fqn(node), modules.get(fqn)
    if module is None or parameter is None:
        return "its weight belongs to no Conv2d or Linear module"
    expected = nn.Linear if node.target is aten.linear.default else nn.Conv2d
    if not isinstance(module, expected):
        return f"its weight belongs to a {type(module).__name__}, not to a {expected.__name__}"
    if type(module).forward is not expected.forward:
        return f"{type(module).__name__} overrides {expected.__name__}.forward"
    names = [name for name, other in modules.items() if other is module]
    if len(names) > 1:
        return f"one module under {len(names)} names: {', '.join(names)}"
    if calls[fqn] > 1:
        return f"called {calls[fqn]} times in one step: one scale would not do"
    if readers[parameter] != {fqn}:
        return f"its weight is read in the forward of {', '.join(sorted(readers[parameter]))}"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={module.padding_mode!r} is not zeros"
    if getattr(module, "padding", 0) == "same" and any(k % 2 == 0 for k in module.kernel_size):
        return "padding='same' with an even kernel is not symmetric"
    first = node.args[0].meta["val"].shape[0]
    if not isinstance(first, torch.SymInt) or first.node.expr != batch.node.expr:
        return "its first dimension is not the batch"
    return None


def _without_image(node: Node, capture: Capture, above: dict[Node, set[Node]], reason: str) -> str:
    """Why a layer that the image does not reach gets other bits; ``reason`` holds where only the timestep does."""
    inputs = {other for other in above[node.args[0]] if other.op == "placeholder"}
    return reason if inputs <= {capture.timesteps} else "depends on timestep and conditioning, not on the image"


def _layer_name(node: Node, modules: dict[str, nn.Module]) -> str:
    """The module whose forward a convolution or linear is, else the one that holds its weight, else the node's name."""
    site, parameter = call_site(node), weight_fqn(node)
    if isinstance(getattr(modules.get(site), "weight", None), torch.Tensor):
        return site
    return parameter.rpartition(".")[0] if parameter else node.name


def _override(fqn: str, role: str, config: PQCADConfig) -> tuple[dict[str, int | None], str]:
    """What the user asked for this layer, and under which key; a layer's glob wins over its role."""
    globs = [key for key in config.overrides if key not in ROLES and fnmatchcase(fqn, key)]
    key = globs[-1] if globs else role
    return config.overrides.get(key, {}), key


def resolve(capture: Capture, model: nn.Module, config: PQCADConfig, filter_fn=None) -> Plan:
    """Read roles off the graph and settle each layer's bits.

    Args:
        filter_fn: ``(module, fqn) -> bool`` in torchao's manner; layers it refuses stay in floating point.

    Raises:
        ValueError: an override matches neither a role nor a layer; the network has no convolution or linear at all.
    """
    above = ancestors(capture)
    nodes = [node for node in capture.graph.graph.nodes if node.target in GEMMS + OTHER_GEMMS]
    followed = set(nodes)
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(_layer_name(node, modules) for node in nodes)
    readers: dict[str, set[str]] = defaultdict(set)
    for node in capture.graph.graph.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                readers[str(source.target).removeprefix("unet.")].add(call_site(node) or type(model).__name__)
    batch = capture.x_t.meta["val"].shape[0]
    plan = Plan()
    for node in capture.graph.graph.nodes:
        if node.target in BATCHED_PRODUCTS:
            kind, site = str(node.target).split(".")[1], call_site(node)
            fqn = f"{site}.{kind}" if site else node.name
            shape = [int(n) for n in node.meta["val"].shape[1:]]
            reason = "a product of two activations: stays in the model's floating-point type"
            plan.rows.append(PlanRow(fqn, kind, "attention", shape, 0, None, None, [], reason))
            continue
        if node not in followed:
            continue
        fqn = _layer_name(node, modules)
        module = modules.get(fqn)
        role = role_of(node, capture, above, followed)
        kind = str(node.target).split(".")[1]
        weight = (
            node.args[1].meta["val"].shape
            if "val" in node.args[1].meta
            else capture.graph.get_parameter(node.args[1].target).shape
        )
        shape = [int(n) for n in weight]
        segments = segments_of(node) if node.target in GEMMS else []
        default_weight, default_activation, reason = ROLE_BITS.get(
            role, ("config", "config", f"{role.replace('_', ' ')}")
        )
        if role in ("time_embedding", "time_projection"):
            reason = _without_image(node, capture, above, reason)
        weight_bits = config.weight_bits if default_weight == "config" else default_weight
        activation_bits = config.activation_bits if default_activation == "config" else default_activation
        if role in ("stem", "head") and config.activation_bits is None:
            activation_bits = None
        asked, key = _override(fqn, role, config)
        if asked:
            weight_bits = asked.get("weight_bits", weight_bits)
            activation_bits = asked.get("activation_bits", activation_bits)
            reason = f"overrides[{key!r}]"
        if weight_bits is None:
            if asked.get("activation_bits") is not None:
                reason += ": activation bits take effect only together with weight_bits"
            activation_bits = None
        blocked = _unsupported(node, fqn, modules, calls, readers, batch)
        if blocked is None and filter_fn is not None and not filter_fn(module, fqn):
            blocked = "refused by filter_fn"
        if blocked is not None:
            weight_bits = activation_bits = None
            reason = blocked
        if len(segments) > 1 and (activation_bits is None or getattr(module, "groups", 1) > 1):
            segments = [sum(segments)]
        plan.rows.append(PlanRow(fqn, kind, role, shape, prod(shape), weight_bits, activation_bits, segments, reason))
    if not nodes:
        raise ValueError(f"{type(model).__name__} has no convolution and no linear layer: there is nothing to quantize")
    for key in config.overrides:
        if key not in ROLES and not any(fnmatchcase(row.fqn, key) for row in plan.rows):
            raise ValueError(
                f"overrides[{key!r}] is no role ({', '.join(ROLES)}) and matches no layer; layers are named like "
                f"{plan.rows[0].fqn!r}"
            )
    return plan
