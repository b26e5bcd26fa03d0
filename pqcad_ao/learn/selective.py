"""Selective finetuning under local and global losses (after QuEST, arXiv 2402.03666): a part of the layers learns."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pqcad_ao.config import ROLES, CADConfig, PQCADConfig
from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import OPERATORS, layer_fqn, operator_of, quantizable
from pqcad_ao.graph.plan import Plan, PlanRow
from pqcad_ao.learn.training import Learner
from pqcad_ao.prepare.observe import weight_quantizers
from pqcad_ao.utils.processes import mean_of_all

TIME = ("time_embedding", "time_projection")
WORDS = ("time", "sensitive", "norms")  # beside roles and globs
_NORMS = (torch.ops.aten.group_norm.default, torch.ops.aten.layer_norm.default)


def choose(words: Sequence[str], rows: Sequence[PlanRow], share: float) -> dict[str, str]:
    """The layers that learn, in the plan's order, each with the words of ``trainable`` that chose it.

    Args:
        words: ``"time"`` (both of its roles), ``"sensitive"`` (the ⌈share · layers⌉ of the largest measured
            sensitivity for each parameter, ties by name), a role, or a glob over names; ``"norms"`` goes along with
            chosen layers.
        rows: of the layers that there are to choose from.

    Raises:
        ValueError: a word that names no layer, or nothing but norms.
    """
    found = {word: _named(word, rows, share) for word in words if word != "norms"}
    for word, names in found.items():
        if not names:
            roles = ", ".join(sorted({row.role for row in rows}))
            raise ValueError(
                f"trainable={list(words)}: {word!r} names no quantized layer; allowed are "
                f"{', '.join(map(repr, WORDS))}, the roles that there are here ({roles}), or a glob over names such as "
                f"{rows[0].fqn!r}"
            )
    if not found:
        raise ValueError(f"trainable={list(words)} chooses no layer: name some beside the norms that feed them")
    chosen = {row.fqn: [word for word, names in found.items() if row.fqn in names] for row in rows}
    return {fqn: ", ".join(by) for fqn, by in chosen.items() if by}


def _named(word: str, rows: Sequence[PlanRow], share: float) -> set[str]:
    if word == "time":
        return {row.fqn for row in rows if row.role in TIME}
    if word == "sensitive":
        # for each parameter, for that is what learning a layer costs: a large layer must be worth as much as many small
        ranked = sorted(rows, key=lambda row: (-(row.sensitivity or 0.0) / row.parameters, row.fqn))
        return {row.fqn for row in ranked[: math.ceil(round(share * len(rows), 9))]}
    if word in ROLES:
        return {row.fqn for row in rows if row.role == word}
    return {row.fqn for row in rows if fnmatchcase(row.fqn, word)}


def check_selection(config: PQCADConfig, resolved: Plan) -> None:
    """Raises ValueError: ``trainable`` names what the network does not have, or no time projection is to be rounded."""
    trained = None
    if config.trainable is not None:
        trained = choose(config.trainable, resolved.quantized, config.sensitive_share)
    if config.time_rounding and not time_projections(resolved, trained):
        raise ValueError(
            "time_rounding=True finds no quantized linear of role 'time_projection' among the layers that learn: leave "
            "it out, or name 'time' in trainable"
        )


def time_projections(resolved: Plan, trained: Iterable[str] | None) -> list[str]:
    """The quantized time projections, among ``trained`` where not all layers learn."""
    return [
        row.fqn
        for row in resolved.quantized
        if row.role == "time_projection" and not OPERATORS[row.kind].spatial and (trained is None or row.fqn in trained)
    ]


def marked(resolved: Plan, trained: dict[str, str] | None) -> Plan:
    """The plan, whose reasons say which layers learned and by which words."""
    if trained is None:
        return resolved
    rows = [
        replace(row, reason=f"{row.reason}; trained: {trained[row.fqn]}") if row.fqn in trained else row
        for row in resolved.rows
    ]
    return replace(resolved, rows=rows)


def norms_before(graph: GraphModule, trained: Iterable[str]) -> set[str]:
    """The parameters of the group and layer norms between which and a trained layer no other layer stands."""
    names, trained = set(), set(trained)
    waiting = [bind(node)["input"] for node in graph.graph.nodes if quantizable(node) and layer_fqn(node) in trained]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen or operator_of(node) is not None:
            continue
        seen.add(node)
        if node.target in _NORMS:
            arguments = bind(node)
            names |= {str(arguments[side].target) for side in ("weight", "bias") if arguments[side] is not None}
        else:
            waiting += node.all_input_nodes
    return names


def learner_of(
    graph: GraphModule, learns: dict[str, bool], trained: Iterable[str] | None, config: PQCADConfig | CADConfig
) -> Learner:
    """Adam over what learns of a graph: parameters by name, and the scales of the weights.

    Args:
        learns: the names of all parameters that may, and whether each was not frozen before.
        trained: of the layers that learn, with the norms before them if ``config`` says so; None: everything.
    """
    names, quantizers = list(learns), weight_quantizers(graph)
    if trained is not None:
        layers = set(trained)
        norms = norms_before(graph, layers) if "norms" in (config.trainable or ()) else set()
        names = [n for n in names if n in norms or n.removeprefix("unet.").rpartition(".")[0] in layers]
        quantizers = {fqn: value for fqn, value in quantizers.items() if fqn in layers}
    for name, learning in learns.items():
        graph.get_parameter(name).requires_grad_(learning)
    parameters = [graph.get_parameter(name) for name in names]
    learner = Learner(graph, parameters, config.learning_rate, config.scale_learning_rate, config.iterations)
    learner.add_scales(module for module, _ in quantizers.values())
    return learner


def local_loss(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """The mean over layers of ‖y − y_fp‖² / ‖y_fp‖², over a batch; of a silent layer, of ‖y‖².

    Of several processes, that have an equal part of the batch each, the mean over them is the loss.
    """
    errors = [(y.float() - r.float()).square().mean() for y, r in zip(outputs, references, strict=True)]
    power = mean_of_all(torch.stack([reference.float().square().mean() for reference in references]))
    return (torch.stack(errors) / torch.where(power > 0, power, torch.ones_like(power))).mean()
