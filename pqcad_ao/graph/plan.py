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
from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.capture import Capture
from pqcad_ao.graph.operators import BATCHED_PRODUCTS, Operator, call_site, operator_of, weight_fqn
from pqcad_ao.graph.roles import ancestors, role_of, segments_of

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

    Example:
        >>> row = plan(unet, PQCADConfig())["conv_in"]
        >>> row.role, row.shape, row.weight_bits, row.quantized
        ('stem', [8, 1, 3, 3], 8, True)
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

    Example:
        >>> resolved = plan(unet, PQCADConfig())
        >>> len(resolved), len(resolved.quantized)
        (55, 49)
        >>> Plan.from_list(resolved.to_list()) == resolved
        True
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
        bits: Counter[Any] = Counter()
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


def _unsupported(node: Node, operator: Operator, fqn: str, network: "_Network") -> str | None:
    """Why a layer cannot be quantized, or None."""
    if operator.quantized is None:
        return "no quantized form of this operator"
    parameter, module, expected = weight_fqn(node), network.modules.get(fqn), operator.module
    if module is None or parameter is None:
        return f"its weight belongs to no {expected.__name__} module"
    if not isinstance(module, expected):
        return f"its weight belongs to a {type(module).__name__}, not to a {expected.__name__}"
    if type(module).forward is not expected.forward:
        return f"{type(module).__name__} overrides {expected.__name__}.forward"
    names = [name for name, other in network.modules.items() if other is module]
    if len(names) > 1:
        return f"one module under {len(names)} names: {', '.join(names)}"
    if network.calls[fqn] > 1:
        return f"called {network.calls[fqn]} times in one step: one scale would not do"
    if network.readers[parameter] != {fqn}:
        return f"its weight is read in the forward of {', '.join(sorted(network.readers[parameter]))}"
    return _unsupported_geometry(node, module, network.batch)


def _unsupported_geometry(node: Node, module: nn.Module, batch: Any) -> str | None:
    """Why the way that a module is set up or called has no quantized form, or None."""
    arguments = bind(node)
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={module.padding_mode!r} is not zeros"
    if getattr(module, "padding", 0) == "same" and any(k % 2 == 0 for k in module.kernel_size):
        return "padding='same' with an even kernel is not symmetric"
    if list(arguments.get("output_padding", ())) not in ([], list(getattr(module, "output_padding", ()))):
        return "called with an output_size that its own output_padding does not give"
    first = arguments["input"].meta["val"].shape[0]
    if not isinstance(first, torch.SymInt) or first.node.expr != batch.node.expr:
        return "its first dimension is not the batch"
    return None


def _without_image(node: Node, capture: Capture, above: dict[Node, set[Node]], reason: str) -> str:
    """Why a layer that the image does not reach gets other bits; ``reason`` holds where only the timestep does."""
    inputs = {other for other in above[bind(node)["input"]] if other.op == "placeholder"}
    return reason if inputs <= {capture.timesteps} else "depends on timestep and conditioning, not on the image"


def _layer_name(node: Node, modules: dict[str, nn.Module]) -> str:
    """The module whose forward a layer is, else the one that holds its weight, else the node's name."""
    site, parameter = call_site(node), weight_fqn(node)
    if isinstance(getattr(modules.get(site), "weight", None), torch.Tensor):
        return site
    return parameter.rpartition(".")[0] if parameter else node.name


def _override(fqn: str, role: str, config: PQCADConfig) -> tuple[dict[str, int | None], str]:
    """What the user asked for this layer, and under which key; a layer's glob wins over its role."""
    globs = [key for key in config.overrides if key not in ROLES and fnmatchcase(fqn, key)]
    key = globs[-1] if globs else role
    return config.overrides.get(key, {}), key


class _Network:
    """What a plan needs to know of a network beside the layer at hand.

    Attributes:
        modules: every module under every name that it has. calls: of each layer in one step, by its name.
        readers: the modules in whose forward each parameter is read. batch: the (symbolic) number of samples.
        layers: the nodes of the table's operators. above: for each node the placeholders and layers that it depends on.
    """

    def __init__(self, capture: Capture, model: nn.Module) -> None:
        nodes = capture.graph.graph.nodes
        self.capture, self.above = capture, ancestors(capture)
        self.layers = {node for node in nodes if operator_of(node) is not None}
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.calls = Counter(_layer_name(node, self.modules) for node in self.layers)
        self.readers: dict[str, set[str]] = defaultdict(set)
        for node in nodes:
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    parameter = str(source.target).removeprefix("unet.")
                    self.readers[parameter].add(call_site(node) or type(model).__name__)
        self.batch = capture.x_t.meta["val"].shape[0]


def resolve(capture: Capture, model: nn.Module, config: PQCADConfig, filter_fn=None) -> Plan:
    """Read roles off the graph and settle each layer's bits.

    Args:
        filter_fn: ``(module, fqn) -> bool`` in torchao's manner; layers it refuses stay in floating point.

    Raises:
        ValueError: an override matches neither a role nor a layer, or the network has no convolution or linear at all.
    """
    network, plan = _Network(capture, model), Plan()
    for node in capture.graph.graph.nodes:
        operator = operator_of(node)
        if node.target in BATCHED_PRODUCTS:
            plan.rows.append(_product(node))
        elif operator is not None:
            plan.rows.append(_layer(node, operator, network, config, filter_fn))
    if not network.layers:
        raise ValueError(f"{type(model).__name__} has no convolution and no linear layer: there is nothing to quantize")
    for key in config.overrides:
        if key not in ROLES and not any(fnmatchcase(row.fqn, key) for row in plan.rows):
            raise ValueError(
                f"overrides[{key!r}] is no role ({', '.join(ROLES)}) and matches no layer; layers are named like "
                f"{plan.rows[0].fqn!r}"
            )
    return plan


def _product(node: Node) -> PlanRow:
    """The row of a batched product."""
    kind, site = str(node.target).split(".")[1], call_site(node)
    fqn = f"{site}.{kind}" if site else node.name
    shape = [int(n) for n in node.meta["val"].shape[1:]]
    reason = "a product of two activations: stays in the model's floating-point type"
    return PlanRow(fqn, kind, "attention", shape, 0, None, None, [], reason)


def _layer(node: Node, operator: Operator, network: _Network, config: PQCADConfig, filter_fn) -> PlanRow:
    """The row of a convolution or linear."""
    fqn = _layer_name(node, network.modules)
    module, weight = network.modules.get(fqn), bind(node)["weight"]
    traced = weight.meta["val"] if "val" in weight.meta else network.capture.graph.get_parameter(weight.target)
    shape = [int(n) for n in traced.shape]
    role = role_of(node, operator, network.capture, network.above, network.layers)
    weight_bits, activation_bits, reason = _bits(node, fqn, role, network, config)
    blocked = _unsupported(node, operator, fqn, network)
    if blocked is None and filter_fn is not None and not filter_fn(module, fqn):
        blocked = "refused by filter_fn"
    if blocked is not None:
        weight_bits, activation_bits, reason = None, None, blocked
    segments = segments_of(node, operator) if operator.quantized is not None else []
    if len(segments) > 1 and (activation_bits is None or getattr(module, "groups", 1) > 1):
        segments = [sum(segments)]
    kind = operator.kind
    return PlanRow(fqn, kind, role, shape, prod(shape), weight_bits, activation_bits, segments, reason)


def _bits(
    node: Node, fqn: str, role: str, network: _Network, config: PQCADConfig
) -> tuple[int | None, int | None, str]:
    """Bits of a layer's weights and activations where nothing speaks against them, and the reason."""
    default: tuple[Any, Any, str] = ("config", "config", f"{role.replace('_', ' ')}")
    default_weight, default_activation, reason = ROLE_BITS.get(role, default)
    if role in ("time_embedding", "time_projection"):
        reason = _without_image(node, network.capture, network.above, reason)
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
    return weight_bits, activation_bits, reason
