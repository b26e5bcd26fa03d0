"""The parity guard: a lowered program against the network it was made from, on the network's own trajectories."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from pqcad_ao.cached_unet import CachedUNet
from pqcad_ao.denoiser import predict, spread_rows, take_rows
from pqcad_ao.diffusion.correction import CorrectionTable
from pqcad_ao.diffusion.noise import Sampler, process_of
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.edge.lower import lower
from pqcad_ao.edge.sampler import rows_of, tensors_of
from pqcad_ao.evaluate.sqnr import decibels, row_powers
from pqcad_ao.nn.layers import QuantizedLayer
from pqcad_ao.passes.to_xnnpack import LAYER

FLOOR_DB = 10.0  # what all images of a step together must reach, however their roundings fell
ROUNDING_MARGIN_DB = 10.0  # how far two samples of the same roundings may lie apart
OUTSIDE = 1.5  # by which inputs are made larger than any that were calibrated on
STEP_DB = 60.0  # what the arithmetic of a sampling step must reach, given the network's prediction


class ParityError(RuntimeError):
    """The lowered program does not compute what the network computes."""


@dataclass
class Record:
    """One call of the network on a trajectory: its step's index, inputs and prediction.

    ``source`` is the call whose deep feature it took, if it did not compute its own.
    """

    index: int
    x_t: Tensor
    conditioning: dict[str, Any]
    prediction: Tensor
    source: "Record | None" = None


def record(
    network: nn.Module,
    scheduler: Sampler,
    noise: Tensor,
    steps: int,
    conditioning: dict[str, Any],
    batch_size: int,
    progress: bool,
) -> list[Record]:
    """Every call of a network while it samples from ``noise``, a :class:`CachedUNet` by its cache plan.

    Returns:
        calls of ``batch_size`` images, or what is left of them; of a network without a plan, before these, calls on the
        first images made ``OUTSIDE`` larger.
    """
    records: list[Record] = []
    outside: list[Record] = []
    called: Callable[..., Tensor] = network
    sources: list[int] | None = None
    if isinstance(network, CachedUNet):
        called, sources = network.begin_walk(), network.plan.sources

    def recorded(x_t: Tensor, timesteps: Tensor, *, whole: dict[str, Any]) -> Tensor:
        """Guidance, where there is any, is the program's own: to ``sample`` it is no guidance."""
        index, prediction = len(records) % steps, predict(called, x_t, timesteps, whole)
        if sources is None and len(outside) < steps:
            outside.append(Record(index, OUTSIDE * x_t, whole, predict(called, OUTSIDE * x_t, timesteps, whole)))
        back = 0 if sources is None else index - sources[index]
        records.append(Record(index, x_t.clone(), whole, prediction.clone(), records[-back] if back else None))
        return prediction

    chosen = {"whole": spread_rows(conditioning, torch.arange(len(noise)), len(noise))}
    sample(recorded, scheduler, noise, steps, conditioning=chosen, batch_size=batch_size, progress=progress)
    return outside + records


def check_parity(
    program: bytes,
    unet: nn.Module,
    records: list[Record],
    scheduler: Sampler,
    steps: int,
    batch_size: int,
    min_sqnr_db: float,
    parted: Callable[[Record], str],
    correction: CorrectionTable | None = None,
    suffix: str = "",
) -> tuple[dict[float, float], float | None]:
    """Compare the program with the recorded predictions, step by step.

    The two sum in another order, so that now and then a value on a threshold of the 4-bit grid falls to its other side;
    that one image then departs by as much as quantization noise does. A program that computes something else departs on
    every image: the bound is on a step's median image, and on all of them together only as far as ``FLOOR_DB``. In a
    network of many layers every image has such a value. Where the bounds are not met, they are lowered to
    ``ROUNDING_MARGIN_DB`` below what the network itself reaches when its activations move in their last bit.

    Args:
        program: of :func:`pqcad_ao.edge.lower.lower_sampler`. scheduler, steps: that it was made for.
        parted: says where the two part on a record; asked only if they do. correction: what the program's step applies.
        suffix: what the names of the methods of ``batch_size`` end in.

    Returns:
        timestep to the program's SQNR on all images together, and the network's own at its worst step, if measured.

    Raises:
        ParityError: a step is below its bound, or not a number.
    """
    from executorch.runtime import Runtime

    loaded = Runtime.get().load_program(program)
    methods = {False: (loaded.load_method(f"unet{suffix}"), loaded.load_method(f"step{suffix}"))}
    if any(record.source for record in records):
        methods[True] = loaded.load_method(f"unet_cached{suffix}"), loaded.load_method(f"step_cached{suffix}")
    scheduler = type(scheduler).from_config(scheduler.config)
    process_of(scheduler).set_timesteps(steps)
    timesteps = scheduler.timesteps

    def run(record: Record) -> Tensor:
        network, step = methods[record.source is not None]
        inputs = _inputs(record, batch_size)
        if record.source is not None:
            whole = _inputs(record.source, batch_size)
            _, feature = methods[False][1].execute([whole[0], torch.tensor([record.source.index]), *whole[1:]])
            inputs.append(feature.clone())
        prediction = network.execute([inputs[0], timesteps[record.index].view(1), *inputs[1:]])[0].clone()
        stepped = step.execute([inputs[0], torch.tensor([record.index]), *inputs[1:]])[0]
        taken = prediction if correction is None else correction.predicted(prediction, record.index)
        process_of(scheduler).set_timesteps(steps)  # a flow's counts its steps
        expected = scheduler.step(taken, timesteps[record.index], inputs[0]).prev_sample
        expected = expected if correction is None else correction.sampled(expected, record.index)
        signal, noise = row_powers(expected[None], stepped[None])
        if not decibels(signal.item(), noise.item()) > STEP_DB:
            raise ParityError(
                f"the program's step does not do what the scheduler does at timestep {timesteps[record.index]}, in "
                f"batches of {batch_size}. Nothing was written"
            )
        return prediction[: len(record.x_t)]

    def run_moved(record: Record) -> Tensor:
        with _moved_in_the_last_bit(twin):
            return predict(twin, record.x_t, timesteps[record.index], record.conditioning)

    bounds = (min_sqnr_db, min(min_sqnr_db, FLOOR_DB))
    reached = _sqnr_db(run, records, steps)
    own = None
    if any(_below(both, bounds) for both in reached):
        twin = copy.deepcopy(unet)  # what hooks do to a network, other threads would see
        in_full = [record for record in records if record.source is None]
        own = [min(column) for column in zip(*_sqnr_db(run_moved, in_full, steps), strict=True)]
        bounds = tuple(min(bound, value - ROUNDING_MARGIN_DB) for bound, value in zip(bounds, own, strict=True))
    failed = [(both, index) for index, both in enumerate(reached) if _below(both, bounds)]
    if failed:
        (typical, together), index = min(failed)
        where = next((parted(record) for record in records if record.index == index), "nowhere that was looked at")
        raise ParityError(
            f"the lowered program departs from the network in batches of {batch_size}: {typical:.1f} dB for the median "
            f"image and {together:.1f} dB for all at timestep {timesteps[index]}, where {bounds[0]:.3g} and "
            f"{bounds[1]:.3g} dB are asked for; {len(failed)} of {steps} timesteps are below. They part {where}. "
            "Nothing was written"
        )
    sqnr_db = {t.item(): together for (_, together), t in zip(reached, timesteps, strict=True)}
    return sqnr_db, None if own is None else own[1]


def _inputs(record: Record, batch_size: int) -> list[Tensor]:
    """x_t and the conditioning's tensors, filled up to a whole batch, as the runtime reads them."""
    rows = rows_of(len(record.x_t), batch_size)
    tensors, _ = tensors_of(take_rows(record.conditioning, rows))
    return [record.x_t[rows].contiguous(), *(value.contiguous() for value in tensors.values())]


def first_departure(
    graph: GraphModule, unet: nn.Module, record: Record, timestep: Tensor, inputs: tuple[Any, ...], bound_db: float
) -> str:
    """Where a lowered network first departs from the network, as half a sentence: every layer's result is looked at.

    Args:
        graph: rewritten, ``f(x_t, step, tensors) -> prediction``, as it was lowered. inputs: that it is exported with.
    """
    from executorch.runtime import Runtime

    graph = copy.deepcopy(graph)
    results = {node.meta[LAYER]: node for node in graph.graph.nodes if LAYER in node.meta}
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    output.args = (tuple(results.values()),)
    graph.graph.set_codegen(CodeGen())  # export's own knows the outputs that there were
    graph.recompile()
    expected: dict[str, Tensor] = {}
    handles = [
        unet.get_submodule(fqn).register_forward_hook(lambda _, __, y, fqn=fqn: expected.setdefault(fqn, y.clone()))
        for fqn in results
    ]
    try:
        predict(unet, record.x_t, timestep, record.conditioning)
    finally:
        for handle in handles:
            handle.remove()
    x_t, _, tensors = inputs
    program, _ = lower(graph, (x_t, torch.tensor([0]), *tensors))
    given = _inputs(record, len(x_t))
    method = Runtime.get().load_program(program).load_method("forward")
    found = method.execute([given[0], torch.tensor([record.index]), *given[1:]])
    for fqn, value in zip(results, found, strict=True):
        reference = expected[fqn]
        signal, noise = row_powers(reference[None], value[: len(reference)].reshape(reference.shape)[None])
        reached = decibels(signal.item(), noise.item())
        if reached < bound_db:
            return f"first at layer {fqn}, {reached:.1f} dB"
    return "after the last quantized layer"


def _below(both: tuple[float, float], bounds: tuple[float, ...]) -> bool:
    return any(value < bound for value, bound in zip(both, bounds, strict=True))


def _sqnr_db(run: Callable[[Record], Tensor], records: list[Record], steps: int) -> list[tuple[float, float]]:
    """For each step, the median image's signal-to-noise ratio in dB and that of all images together."""
    pairs: list[list[tuple[float, float]]] = [[] for _ in range(steps)]
    for record in records:
        signal, noise = row_powers(record.prediction, run(record))
        pairs[record.index] += zip(signal.tolist(), noise.tolist(), strict=True)
    return [(median(decibels(*pair) for pair in step), decibels(*map(sum, zip(*step, strict=True)))) for step in pairs]


@contextmanager
def _moved_in_the_last_bit(unet: nn.Module) -> Iterator[None]:
    """Move what every quantized layer reads by as much as summing it in another order would."""
    generator = torch.Generator().manual_seed(0)

    def move(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        ulp = torch.finfo(x.dtype).eps * x.square().mean().sqrt()
        return (x + ulp * torch.randn(x.shape, generator=generator), *args[1:])

    layers = [m for m in unet.modules() if isinstance(m, QuantizedLayer) and m.activation_bits is not None]
    handles = [layer.register_forward_pre_hook(move) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
