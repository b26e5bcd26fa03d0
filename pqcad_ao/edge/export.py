"""ExecuTorch: the sampling step of a quantized network as a .pte for the stock XNNPACK runtime."""

import copy
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pqcad_ao.cached_unet import CachedUNet, network_and_plan
from pqcad_ao.denoiser import check_conditioning, evaluation_mode
from pqcad_ao.diffusion.cache_plan import CachePlan
from pqcad_ao.diffusion.correction import CorrectionTable, correction_of
from pqcad_ao.diffusion.noise import Sampler, process_of
from pqcad_ao.diffusion.process import matching_sampler
from pqcad_ao.diffusion.schedule import signal_and_noise, steps_to_bind, timesteps_of
from pqcad_ao.edge.capture import Captured, as_function, capture_at, image_shape
from pqcad_ao.edge.lower import lower, lower_sampler
from pqcad_ao.edge.parity import ParityError, Record, check_parity, first_departure, record
from pqcad_ao.edge.report import PTEReport
from pqcad_ao.edge.sampler import FORMAT, PTESampler, require_executorch
from pqcad_ao.edge.seal import UNSEALED, seal
from pqcad_ao.edge.sizes import check_sizes, ending
from pqcad_ao.edge.storage import check_objective, plan_edge
from pqcad_ao.graph.operators import layer_fqn, operator_of, packed_operator
from pqcad_ao.nn.layers import QuantizedLayer
from pqcad_ao.nn.state import quantized_state, required_state
from pqcad_ao.passes.attention import decompose_attention
from pqcad_ao.passes.cache_split import give_feature_by_rows
from pqcad_ao.passes.correct_feature import correct_feature
from pqcad_ao.passes.fold_constants import fold_constants
from pqcad_ao.passes.fold_timesteps import fold_timesteps
from pqcad_ao.passes.group_norm import decompose_group_norm
from pqcad_ao.passes.identities import drop_identities
from pqcad_ao.passes.layer_norm import decompose_layer_norm
from pqcad_ao.passes.nearest import decompose_nearest
from pqcad_ao.passes.pieces import decompose_pieces
from pqcad_ao.passes.sampling_step import add_sampling_step, step_table
from pqcad_ao.passes.share_equal import share_equal
from pqcad_ao.passes.to_xnnpack import to_xnnpack
from pqcad_ao.utils.checks import check_counts
from pqcad_ao.utils.files import check_writable, write_whole
from pqcad_ao.utils.progress import tqdm
from pqcad_ao.utils.tracing import forgetting_sources, one_at_a_time

__all__ = ["PTEReport", "PTESampler", "ParityError", "export_fp32_pte", "export_pte"]

VALUE_RANGE = (-1.0, 1.0)  # of the images


def export_pte(
    unet: nn.Module,
    path: str | Path,
    *,
    scheduler,
    num_inference_steps: int | None = None,
    objective: str = "speed",
    max_bytes: int | None = None,
    batch_size: int | Sequence[int] = 1,
    conditioning: dict[str, Any] | None = None,
    sample_shape: tuple[int, int, int] | None = None,
    cache: CachePlan | Literal["own"] | None = "own",
    min_sqnr_db: float = 25.0,
    trajectories: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> PTEReport:
    """Write a quantized network as an ExecuTorch program for the stock XNNPACK runtime.

    The program's methods, on x_t (batch_size, C, H, W) float32, for the schedule that ``scheduler`` walks in
    ``num_inference_steps`` deterministic DDIM steps, of a flow Euler's:

    - ``step(x_t, i, *conditioning) -> x_{t-1}``, i a (1,) int64 index into the schedule: a whole sampling step, with
      the correction that the network carries;
    - ``unet(x_t, t, *conditioning) -> prediction``, t a (1,) timestep of the schedule, and no other: int64, of a flow
      float32;
    - ``image(x_0) -> (batch_size, H, W, C)`` uint8;
    - ``timesteps``, ``sample_shape``, ``batch_size``, ``value_range`` and more that a sampler needs, as constants.

    With a cache plan ``step`` returns ``(x_{t-1}, feature)``, and there are

    - ``step_cached(x_t, i, *conditioning, feature) -> x_{t-1}`` and ``unet_cached(x_t, t, *conditioning, feature) ->
      prediction``, of the outermost blocks alone, with the plan's line for that step in them;
    - ``cache_sources``, (S,) int64: the step whose feature each step takes; its own where it is computed in full.

    With several batch sizes these methods are of the first, and each further one, of 4 say, has its own: ``step_4``,
    ``unet_4``, ``image_4``, ``step_cached_4``, ``unet_cached_4``. The constant ``batch_sizes``, (K,) int64, lists them.

    What depends on the timestep alone is a table in the file; weights are in it once. The program is compared with the
    network on the network's own trajectories, at every step, and on inputs outside the calibrated range, before
    anything is written under ``path``.

    Args:
        unet: a float32 network on the CPU that ``quantize_`` has quantized, or a
            :class:`~pqcad_ao.cached_unet.CachedUNet` of one.
        path: of the .pte.
        scheduler: of the noise process it was quantized for; of a distilled network what ``distill_`` returned.
        num_inference_steps: of the schedule; None: as many as the cache plan has, or the network was distilled for, or
            else 20.
        objective: ``"speed"`` stores two weights a byte where that costs a layer little time, ``"size"`` wherever it
            can. max_bytes: of the file; then layers are chosen by the time that a saved byte costs.
        batch_size: images of a call, or a list of such numbers, whose methods share the weights in the file.
        conditioning: keyword arguments of ``unet.forward`` with a row for each sample; its tensors become inputs. With
            a ``guidance_scale`` and a ``negative`` in it, guidance with that scale is part of the program.
        sample_shape: (C, H, W), for networks whose config does not say it.
        cache: the plan to follow; ``"own"``: the one that ``cache_`` measured on the network, if any; None: none.
        min_sqnr_db: what the program must reach at every step on the median image of the trajectories; on all images
            together 10 dB, or this if it is less. Where rounding in float32 alone moves the network by more, what that
            leaves less 10 dB.
        trajectories: how many are walked for the comparison. seed: of their noise.
        progress: show bars.

    Raises:
        ImportError: executorch is not installed.
        ValueError: the network is not quantized by pqcad_ao, not float32 or not on the CPU; conditioning is missing;
            the scheduler is foreign, of another process or number of training timesteps, or walks other timesteps than
            the network was distilled for or the cache plan was measured for; the samples are packed tokens, no images;
            the file cannot be made as small as ``max_bytes``.
        OSError: ``path`` cannot be written; said before the work begins.
        ParityError: the program departs from the network; says where and by how much, and nothing is written.

    Example:
        >>> report = export_pte(quantized, "unet.pte", scheduler=scheduler, num_inference_steps=4, progress=False)
        >>> report.delegates, min(report.sqnr_db.values()) > 25  # dB, of its predictions against the network's
        (1, True)
    """
    require_executorch()
    unet, cached = network_and_plan(unet, cache)
    timestep = required_state(unet, ", or export_fp32_pte for the baseline").timestep
    _check_float(unet)
    scheduler = matching_sampler(scheduler, timestep.num_train_timesteps, timestep.process)
    if num_inference_steps is None and cached is not None:
        num_inference_steps = len(cached.timesteps)
    num_inference_steps = steps_to_bind(scheduler, num_inference_steps, timestep.schedule)
    correction = correction_of(unet)
    _check_walk(timesteps_of(scheduler, num_inference_steps), cached, correction, conditioning)
    sizes = check_sizes(batch_size)
    check_counts(trajectories=trajectories)
    check_objective(objective, max_bytes)
    conditioning = check_conditioning(unet, conditioning)
    shape = image_shape(unet, sample_shape)
    path = check_writable(path)
    unet = _contiguous(unet)
    stages = tqdm(total=4, desc="recording trajectories", disable=not progress, leave=False)
    with evaluation_mode(unet), torch.no_grad(), forgetting_sources(), stages as bar:
        noise = torch.randn(trajectories, *shape, generator=torch.Generator().manual_seed(seed))
        records = {}
        for size in sizes:
            walked = (scheduler, noise, num_inference_steps, conditioning, size, progress)
            records[size] = record(unet, *walked)
            if cached is not None:
                records[size] += record(CachedUNet(unet, cached), *walked)
        bar.update()
        bar.set_description("capturing")
        given = (conditioning, timestep.continuous, cached)
        captured = {size: capture_at(unet, shape, size, *given) for size in sizes}
        first = captured[sizes[0]]
        constants = _metadata(scheduler, num_inference_steps, sizes, shape, first.names, correction, cached)
        timesteps = constants["timesteps"]
        bar.update()
        bar.set_description("lowering")
        to_save = None if max_bytes is None else 0
        while True:
            plan = plan_edge(first.graph, objective, to_save)
            rewritten, arithmetic = _rewrite_all(captured, unet, timesteps, plan.packed)
            program, calls = _lower(rewritten, scheduler, constants, correction, cached)
            if max_bytes is None or len(program) <= max_bytes:
                break
            # the plan knows the weights' bytes, the file holds more: what it is too large by has to go as well
            to_save = plan.saved + len(program) - max_bytes
        bar.update()
        bar.set_description("comparing")
        sqnr_db, rounding_db = _compare(
            program, unet, rewritten, records, scheduler, timesteps, min_sqnr_db, correction
        )
        bar.update()
    write_whole(path, program)
    measured = (sqnr_db, rounding_db, arithmetic, plan, None if cached is None else cached.refresh)
    return PTEReport(path, len(program), calls.pop("executorch_call_delegate", 0), dict(calls), *measured)


def _check_walk(
    timesteps: list[Any], cached: CachePlan | None, correction: CorrectionTable | None, conditioning: Any
) -> None:
    """Raises ValueError: what goes into the program was measured on another walk than this one."""
    if cached is not None:
        cached.check(timesteps)
    if correction is not None:
        correction.check(timesteps, conditioning or {}, cached=cached is not None)


def _rewrite_all(
    captured: dict[int, Captured], unet: nn.Module, schedule: Tensor, packed: Collection[str]
) -> tuple[dict[int, Captured], dict[str, str]]:
    """:func:`_rewrite` of every program of every batch size, and the arithmetic, which is the same at each of them."""
    rewritten: dict[int, Captured] = {}
    arithmetic: dict[str, str] = {}
    for size, at in captured.items():
        parts = {}
        for part, graph in at.parts.items():
            parts[part], found = _rewrite(copy.deepcopy(graph), unet, schedule, packed)
            arithmetic = arithmetic or found  # of the first, the whole network
        rewritten[size] = replace(at, parts=parts)
    return rewritten, arithmetic


@one_at_a_time
def _lower(
    rewritten: dict[int, Captured],
    scheduler: Sampler,
    constants: dict[str, Any],
    correction: CorrectionTable | None,
    cached: CachePlan | None,
) -> tuple[bytes, Counter[str]]:
    """The program of rewritten networks, in full and cut, and the calls of one step in full at the first size."""
    timesteps = constants["timesteps"]
    factors = step_table(scheduler, len(timesteps))
    exported, images = {}, {}
    for size, at in rewritten.items():
        x_t, _, tensors = at.inputs
        suffix = ending(list(rewritten), size)
        for part, network in at.parts.items():
            stepping = copy.deepcopy(network)
            given = [x_t, torch.tensor([0]), timesteps[:1].clone(), *tensors]
            if part and cached is not None:
                feature = stepping.graph.find_nodes(op="placeholder")[-1]
                given.append(torch.zeros(feature.meta["val"].shape))
                correct_feature(stepping, cached.scale, cached.shift)
            elif cached is not None:
                give_feature_by_rows(stepping)
            add_sampling_step(stepping, timesteps, factors, process_of(scheduler).clip, correction)
            exported[part + suffix] = torch.export.export(stepping, tuple(given))
        images[suffix] = torch.export.export(_Image(), (x_t,))
    program, calls = lower_sampler(exported, images, constants)
    return seal(program), calls


def _compare(
    program: bytes,
    unet: nn.Module,
    rewritten: dict[int, Captured],
    records: dict[int, list[Record]],
    scheduler: Sampler,
    timesteps: Tensor,
    min_sqnr_db: float,
    correction: CorrectionTable | None,
) -> tuple[dict[float, float], float | None]:
    """:func:`check_parity` at every batch size; what it returns, of the worst one at each timestep."""
    reached: dict[float, float] = {}
    roundings = []
    for size, at in rewritten.items():

        def parted(record: Record, at: Captured = at) -> str:
            return first_departure(at.parts[""], unet, record, timesteps[record.index], at.inputs, min_sqnr_db)

        walked = (records[size], scheduler, len(timesteps), size, min_sqnr_db)
        found, rounding_db = check_parity(
            program, unet, *walked, parted, correction, suffix=ending(list(rewritten), size)
        )
        reached = {t: min(value, reached.get(t, value)) for t, value in found.items()}
        roundings += [] if rounding_db is None else [rounding_db]
    return reached, min(roundings, default=None)


class _Image(nn.Module):
    """(B, C, H, W) in [-1, 1] to (B, H, W, C) uint8."""

    def forward(self, x_0: Tensor) -> Tensor:
        values = (x_0.clamp(*VALUE_RANGE) * 127.5 + 127.5).round()
        return values.permute(0, 2, 3, 1).to(torch.uint8)


def _contiguous(unet: nn.Module) -> nn.Module:
    """The network itself, or where weights are in channels-last layout, which XNNPACK's passes refuse, a copy."""
    if all(parameter.is_contiguous() for parameter in unet.parameters()):
        return unet
    return copy.deepcopy(unet).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def export_fp32_pte(
    unet: nn.Module,
    path: str | Path,
    *,
    batch_size: int = 1,
    conditioning: dict[str, Any] | None = None,
    sample_shape: tuple[int, int, int] | None = None,
) -> PTEReport:
    """Write a network that is not quantized the way ExecuTorch's own recipe does: the baseline for size and latency.

    The program's method is ``forward(x_t, timesteps, *conditioning) -> prediction`` with (batch_size,) int64 timesteps.
    Arguments and errors as for :func:`export_pte`.
    """
    require_executorch()
    if quantized_state(unet) is not None:
        raise ValueError(f"this {type(unet).__name__} is quantized: write export_pte(unet, path, scheduler=...)")
    _check_float(unet)
    check_counts(batch_size=batch_size)
    conditioning = check_conditioning(unet, conditioning)
    shape = image_shape(unet, sample_shape)
    path = check_writable(path)
    unet = _contiguous(unet)
    with evaluation_mode(unet), torch.no_grad(), forgetting_sources():
        function, inputs, _ = as_function(unet, shape, batch_size, conditioning)
        program, calls = lower(function, inputs, stock=True)
    write_whole(path, program)
    delegates = calls.pop("executorch_call_delegate", 0)
    return PTEReport(path, len(program), delegates, dict(calls))


def _check_float(unet: nn.Module) -> None:
    for name, parameter in unet.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(
                f"{name} is {parameter.dtype} on {parameter.device}: export takes float32 on the CPU, write "
                "unet.to('cpu', torch.float32)"
            )


def _metadata(
    scheduler: Sampler,
    steps: int,
    sizes: list[int],
    shape: tuple[int, ...],
    names: list[str],
    correction: CorrectionTable | None,
    cached: CachePlan | None,
) -> dict[str, Any]:
    """Constant methods of the program: all that a sampler needs, for one without Python as well.

    ``alphas``, ``sigmas`` are how much of image and noise is in x_t, ``alphas_prev``, ``sigmas_prev`` in what a step
    leads to.
    """
    (alphas, alphas_prev), (sigmas, sigmas_prev) = (values.float() for values in signal_and_noise(scheduler, steps))
    process = process_of(scheduler)
    return {
        "pqcad_format": FORMAT,
        "checksum": UNSEALED,
        "steps": steps,
        "timesteps": torch.tensor(timesteps_of(scheduler, steps)),
        "batch_size": sizes[0],
        **({"batch_sizes": torch.tensor(sizes)} if len(sizes) > 1 else {}),
        "sample_shape": torch.tensor(shape),
        "value_range": torch.tensor(VALUE_RANGE),
        "conditioning": json.dumps(names),
        "alphas": alphas,
        "alphas_prev": alphas_prev,
        "sigmas": sigmas,
        "sigmas_prev": sigmas_prev,
        "init_noise_sigma": 1.0,  # of both processes
        "prediction_type": process.prediction_type,
        "clip_sample": process.clip is not None,
        "clip_sample_range": float(process.clip or 0.0),
        "scheduler_config": scheduler.to_json_string(),
        **({} if correction is None else {"correction": json.dumps(correction.to_dict())}),
        **({} if cached is None else {"cache_sources": torch.tensor(cached.sources)}),
    }


def _rewrite(
    graph: GraphModule, unet: nn.Module, schedule: Tensor, packed: Collection[str]
) -> tuple[GraphModule, dict[str, str]]:
    """Run the passes over a captured network: what to lower, and each quantized layer's arithmetic in it."""
    timesteps = [node for node in graph.graph.nodes if node.op == "placeholder"][1]
    drop_identities(graph)
    weight_only = _weight_only_products(graph, unet)
    fold_constants(graph)
    layers = {layer_fqn(node) for node in graph.graph.nodes if packed_operator(node) is not None}
    arithmetic = to_xnnpack(graph, layers.intersection(packed))  # a cut network has not all of them
    fold_timesteps(graph, timesteps, schedule)
    decompose_pieces(graph)
    decompose_group_norm(graph)
    decompose_layer_norm(graph)
    decompose_attention(graph)
    decompose_nearest(graph)
    left = set(graph.graph.nodes)
    for fqn, (bits, product) in weight_only.items():
        text = "float32 products of the dequantized weights" if product in left else f"a table of {len(schedule)} rows"
        arithmetic[fqn] = f"W{bits}: {text}"
    share_equal(graph)
    return GraphModule(graph, graph.graph), arithmetic  # with the parameters that are still read, and no others


def _weight_only_products(graph: GraphModule, unet: nn.Module) -> dict[str, tuple[int, Node]]:
    """For each layer that quantizes its weights alone: their bits and the node that multiplies by them."""
    readers = {str(node.target): node for node in graph.graph.nodes if node.op == "get_attr"}
    found = {}
    for fqn, layer in unet.named_modules():
        node = readers.get(f"unet.{fqn}.weight_scale")
        if isinstance(layer, QuantizedLayer) and layer.activation_bits is None and node is not None:
            while operator_of(node) is None:
                node = next(iter(node.users))
            found[fqn] = (layer.weight_bits, node)
    return found
