"""Fitting the grids of a prepared graph: weights to themselves, activations to what passes on the calibration set."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pqcad_ao.diffusion.calibration import CalibrationSet
from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.operators import OPERATORS, layer_fqn, quantizable, weight_fqn
from pqcad_ao.graph.plan import Plan
from pqcad_ao.prepare.fake_quant import ActivationFakeQuantize, WeightFakeQuantize
from pqcad_ao.utils.processes import of_all, rank_and_world
from pqcad_ao.utils.progress import tqdm


def _layers(graph: GraphModule) -> Iterator[tuple[str, Node]]:
    for node in graph.graph.nodes:
        fqn = layer_fqn(node) if quantizable(node) is not None else None
        if fqn is not None:
            yield fqn, node


def weight_quantizers(graph: GraphModule) -> dict[str, tuple[WeightFakeQuantize, Tensor]]:
    """Each quantized layer's weight fake quantizer and weight, by layer name."""
    modules = dict(graph.named_modules())
    return {
        fqn: (modules[str(weight.target)], graph.get_parameter(f"unet.{weight_fqn(node)}"))
        for fqn, node in _layers(graph)
        if (weight := bind(node)["weight"]).op == "call_module"
    }


def activation_quantizers(graph: GraphModule) -> dict[str, ActivationFakeQuantize]:
    """Each quantized layer's activation fake quantizer, by layer name; empty before they are inserted."""
    modules = dict(graph.named_modules())
    sources = {fqn: modules.get(str(bind(node)["input"].target)) for fqn, node in _layers(graph)}
    return {fqn: module for fqn, module in sources.items() if isinstance(module, ActivationFakeQuantize)}


def parts_of(graph: GraphModule) -> dict[Tensor, Tensor]:
    """The weights of which each process has a part, and the forms of the whole, on the meta device."""
    return {weight: module.form for module, weight in weight_quantizers(graph).values() if module.form is not None}


@contextmanager
def weights_in_full_precision(graph: GraphModule) -> Iterator[None]:
    """Let every weight pass as it is."""
    quantizers = [module for module, _ in weight_quantizers(graph).values()]
    enabled = [bool(module.fake_quant_enabled[0]) for module in quantizers]
    for module in quantizers:
        module.disable_fake_quant()
    try:
        yield
    finally:
        for module, before in zip(quantizers, enabled, strict=True):
            module.enable_fake_quant(before)


@torch.no_grad()
def observe(
    graph: GraphModule,
    points: CalibrationSet,
    batch_size: int,
    *,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = False,
) -> None:
    """Show the calibration set to a graph's activation quantizers, which keep a sample of it and quantize nothing.

    Of several processes each shows some of its batches, and all keep the sample that one alone would.
    """
    quantizers = activation_quantizers(graph).values()
    rank, world = rank_and_world()
    for module in quantizers:
        module.forget()
        module.enable_observer()
        module.disable_fake_quant()
    count = len(range(0, len(points), batch_size))
    total = len(range(count)[rank::world])
    batches = islice(points.batches(batch_size), rank, None, world)
    bar = tqdm(batches, total=total, desc="observing", disable=not progress, leave=False)
    try:
        for done, batch in enumerate(bar):
            graph(*batch)
            if callback is not None:
                callback("observe", done + 1, total)
        for module in quantizers:
            module.disable_observer()
        if total < -(-count // world) and parts_of(graph):
            graph(*next(points.batches(batch_size)))  # the others have one more, and want this one's parts of weights
    finally:
        for module in quantizers:
            module.disable_observer()
            module.enable_fake_quant()
    if world > 1:
        seen = of_all([module.observed for module in quantizers])
        for module, *parts in zip(quantizers, *seen, strict=True):
            module.join(parts)


def input_forms(resolved: Plan) -> dict[str, tuple[list[int], int]]:
    """What :class:`~pqcad_ao.diffusion.layer_inputs.LayerInputs` takes, of each layer whose input a plan quantizes."""
    rows = [row for row in resolved.quantized if row.activation_bits is not None]
    return {row.fqn: (row.segments, OPERATORS[row.kind].channel_dim) for row in rows}


def take_inputs(graph: GraphModule, values: Mapping[str, Tensor], group: Tensor) -> None:
    """Give a graph's activation quantizers what was kept of their inputs in a walk, in place of :func:`observe`.

    Args:
        values: as those of :class:`~pqcad_ao.diffusion.layer_inputs.LayerInputs`.
        group: (N,) each point's timestep group.

    Raises:
        RuntimeError: a layer was not called at some of the points.
    """
    group = group.cpu()
    for fqn, module in activation_quantizers(graph).items():
        if not values[fqn][:, 0, 1].any(-1).all():
            raise RuntimeError(
                f"{fqn} was not called in every step of the network: networks are quantized that compute the same "
                "layers for every timestep"
            )
        module.join([[(values[fqn], group)]])


def _fit_each(quantizers: Mapping[str, Any], fit: Callable[[str], None], look: Callable[[str], Any]) -> None:
    """Fit every quantizer by its layer's name; of several processes each fits some, and all take those grids over.

    Args:
        look: called with the names of the others' layers meanwhile, whose weights may be in parts.
    """
    rank, world = rank_and_world()
    mine = list(quantizers)[rank::world]
    for number, fqn in enumerate(quantizers):
        (fit if number % world == rank else look)(fqn)
    if world == 1:
        return
    fitted = {fqn: (quantizers[fqn].position(), _on_cpu(quantizers[fqn].state_dict())) for fqn in mine}
    for part in of_all(fitted):
        for fqn, (position, state) in part.items():
            quantizers[fqn].move(**position)
            quantizers[fqn].load_state_dict(state)


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in state.items()}


def fit_weights(graph: GraphModule, bits: dict[str, int], *, blend: bool = False) -> None:
    """Fit every weight quantizer to its weight, at the bits given by layer name.

    Args:
        blend: let the new grids blend in, where the bits change, rather than use them at once.
    """
    found = weight_quantizers(graph)

    def whole(fqn: str) -> Tensor:
        module, weight = found[fqn]
        return module.whole(weight.detach())

    def fit(fqn: str) -> None:
        (module, _), weight = found[fqn], whole(fqn)
        if not blend:
            module.fit(weight, bits[fqn])
        elif bits[fqn] != module.bits:
            module.begin(weight, bits[fqn])

    _fit_each({fqn: module for fqn, (module, _) in found.items()}, fit, whole)


def fit_activations(
    graph: GraphModule,
    bits: dict[str, int],
    *,
    blend: bool = False,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = False,
) -> None:
    """Fit every activation quantizer to what it observed, at the bits given by layer name.

    Args:
        blend: let the new grids blend in, where the bits change, rather than use them at once.

    Raises:
        FloatingPointError: NaN or infinite activations; names the layer.
    """
    quantizers, (rank, world) = activation_quantizers(graph), rank_and_world()
    mine, done = len(list(quantizers)[rank::world]), 0

    def fit(fqn: str) -> None:
        nonlocal done
        module = quantizers[fqn]
        try:
            if not blend:
                module.fit(bits[fqn])
            elif bits[fqn] != module.bits:
                module.begin(bits[fqn])
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} at the input of {fqn} while calibrating") from error
        done += 1
        bar.update()
        if callback is not None:
            callback("fit", done, mine)

    with tqdm(total=mine, desc="fitting activations", disable=not progress, leave=False) as bar:
        _fit_each(quantizers, fit, lambda _: None)
    for module in quantizers.values():
        module.forget()
