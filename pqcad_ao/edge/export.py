"""ExecuTorch: the sampling step of a quantized network as a .pte for the stock XNNPACK runtime."""

import copy
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pqcad_ao import denoiser
from pqcad_ao.denoiser import Denoiser, check_conditioning, evaluation_mode
from pqcad_ao.diffusion.cache_plan import warn_unused
from pqcad_ao.diffusion.correction import CorrectionTable, correction_of
from pqcad_ao.diffusion.noise import Sampler, process_of
from pqcad_ao.diffusion.process import matching_sampler
from pqcad_ao.diffusion.schedule import signal_and_noise, steps_to_bind, timesteps_of
from pqcad_ao.edge.lower import lower, lower_sampler
from pqcad_ao.edge.parity import ParityError, Record, check_parity, first_departure, record
from pqcad_ao.edge.sampler import FORMAT, PTESampler, require_executorch, tensors_of
from pqcad_ao.edge.seal import UNSEALED, seal
from pqcad_ao.edge.storage import EdgePlan, check_objective, plan_edge
from pqcad_ao.graph.operators import operator_of
from pqcad_ao.nn.layers import QuantizedLayer
from pqcad_ao.nn.state import quantized_state, required_state
from pqcad_ao.passes.attention import decompose_attention
from pqcad_ao.passes.fold_constants import fold_constants
from pqcad_ao.passes.fold_timesteps import fold_timesteps
from pqcad_ao.passes.group_norm import decompose_group_norm
from pqcad_ao.passes.identities import drop_identities
from pqcad_ao.passes.layer_norm import decompose_layer_norm
from pqcad_ao.passes.nearest import decompose_nearest
from pqcad_ao.passes.pieces import decompose_pieces
from pqcad_ao.passes.sampling_step import add_sampling_step, step_table
from pqcad_ao.passes.to_xnnpack import to_xnnpack
from pqcad_ao.utils.checks import check_count, check_counts
from pqcad_ao.utils.files import check_writable, write_whole
from pqcad_ao.utils.progress import tqdm
from pqcad_ao.utils.tracing import forgetting_sources, one_at_a_time

__all__ = ["PTEReport", "PTESampler", "ParityError", "export_fp32_pte", "export_pte"]

VALUE_RANGE = (-1.0, 1.0)  # of the images


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
    """

    path: Path
    bytes: int
    delegates: int
    portable: dict[str, int]
    sqnr_db: dict[float, float] = field(default_factory=dict)
    rounding_db: float | None = None
    arithmetic: dict[str, str] = field(default_factory=dict)
    plan: EdgePlan = field(default_factory=lambda: EdgePlan([]))

    def __str__(self) -> str:
        rows = [("file", f"{self.path}, {self.bytes:,} bytes"), ("XNNPACK calls per step", self.delegates)]
        portable = ", ".join(f"{count} {name}" for name, count in sorted(self.portable.items()))
        rows.append(("operators outside", portable or "none"))
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


def export_pte(
    unet: nn.Module,
    path: str | Path,
    *,
    scheduler,
    num_inference_steps: int | None = None,
    objective: str = "speed",
    max_bytes: int | None = None,
    batch_size: int = 1,
    conditioning: dict[str, Any] | None = None,
    sample_shape: tuple[int, int, int] | None = None,
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

    What depends on the timestep alone is a table in the file; weights are in it once. The program is compared with the
    network on the network's own trajectories, at every step, and on inputs outside the calibrated range, before
    anything is written under ``path``.

    Args:
        unet: a float32 network on the CPU that ``quantize_`` has quantized.
        path: of the .pte.
        scheduler: of the noise process it was quantized for; of a distilled network what ``distill_`` returned.
        num_inference_steps: of the schedule; None: as many as the network was distilled for, or else 20.
        objective: ``"speed"`` stores two weights a byte where that costs a layer little time, ``"size"`` wherever it
            can. max_bytes: of the file; then layers are chosen by the time that a saved byte costs.
        conditioning: keyword arguments of ``unet.forward`` with a row for each sample; its tensors become inputs. With
            a ``guidance_scale`` and a ``negative`` in it, guidance with that scale is part of the program.
        sample_shape: (C, H, W), for networks whose config does not say it.
        min_sqnr_db: what the program must reach at every step on the median image of the trajectories; on all images
            together 10 dB, or this if it is less. Where rounding in float32 alone moves the network by more, what that
            leaves less 10 dB.
        trajectories: how many are walked for the comparison. seed: of their noise.
        progress: show bars.

    Raises:
        ImportError: executorch is not installed.
        ValueError: the network is not quantized by pqcad_ao, not float32 or not on the CPU; conditioning is missing;
            the scheduler is foreign, of another process or number of training timesteps, or walks other timesteps than
            the network was distilled for; the samples are packed tokens, no images; the file
            cannot be made as small as ``max_bytes``.
        OSError: ``path`` cannot be written; said before the work begins.
        ParityError: the program departs from the network; says where and by how much, and nothing is written.

    Example:
        >>> report = export_pte(quantized, "unet.pte", scheduler=scheduler, num_inference_steps=4, progress=False)
        >>> report.delegates, min(report.sqnr_db.values()) > 25  # dB, of its predictions against the network's
        (1, True)
    """
    require_executorch()
    timestep = required_state(unet, ", or export_fp32_pte for the baseline").timestep
    warn_unused(unet, "a .pte")
    _check_float(unet)
    scheduler = matching_sampler(scheduler, timestep.num_train_timesteps, continuous=timestep.continuous)
    num_inference_steps = steps_to_bind(scheduler, num_inference_steps, timestep.schedule)
    correction = correction_of(unet)
    if correction is not None:
        correction.check(timesteps_of(scheduler, num_inference_steps), conditioning or {}, cached=False)
    check_count("batch_size", batch_size, otherwise=": of one program; for several sizes write several files")
    check_counts(trajectories=trajectories)
    check_objective(objective, max_bytes)
    conditioning = check_conditioning(unet, conditioning)
    shape = _image_shape(unet, sample_shape)
    path = check_writable(path)
    unet = _contiguous(unet)
    stages = tqdm(total=4, desc="recording trajectories", disable=not progress, leave=False)
    with evaluation_mode(unet), torch.no_grad(), forgetting_sources(), stages as bar:
        noise = torch.randn(trajectories, *shape, generator=torch.Generator().manual_seed(seed))
        records = record(unet, scheduler, noise, num_inference_steps, conditioning, batch_size, progress)
        bar.update()
        bar.set_description("capturing")
        captured, inputs, names = _capture(unet, shape, batch_size, conditioning, timestep.continuous)
        constants = _metadata(scheduler, num_inference_steps, batch_size, shape, names, correction)
        timesteps = constants["timesteps"]
        bar.update()
        bar.set_description("lowering")
        to_save = None if max_bytes is None else 0
        while True:
            plan = plan_edge(captured, objective, to_save)
            graph, arithmetic = _rewrite(copy.deepcopy(captured), unet, timesteps, plan.packed)
            program, calls = _lower(graph, inputs, scheduler, constants, correction)
            if max_bytes is None or len(program) <= max_bytes:
                break
            # the plan knows the weights' bytes, the file holds more: what it is too large by has to go as well
            to_save = plan.saved + len(program) - max_bytes
        bar.update()
        bar.set_description("comparing")

        def parted(record: Record) -> str:
            return first_departure(graph, unet, record, timesteps[record.index], inputs, min_sqnr_db)

        sqnr_db, rounding_db = check_parity(
            program, unet, records, scheduler, num_inference_steps, batch_size, min_sqnr_db, parted, correction
        )
        bar.update()
    write_whole(path, program)
    delegates = calls.pop("executorch_call_delegate", 0)
    return PTEReport(path, len(program), delegates, dict(calls), sqnr_db, rounding_db, arithmetic, plan)


@one_at_a_time
def _lower(
    graph: GraphModule,
    inputs: tuple[Any, ...],
    scheduler: Sampler,
    constants: dict[str, Any],
    correction: CorrectionTable | None,
) -> tuple[bytes, Counter[str]]:
    """The program of a rewritten network, and the calls of one step."""
    timesteps = constants["timesteps"]
    stepping = copy.deepcopy(graph)
    factors = step_table(scheduler, len(timesteps))
    add_sampling_step(stepping, timesteps, factors, process_of(scheduler).clip, correction)
    x_t, _, tensors = inputs
    exported = torch.export.export(stepping, (x_t, torch.tensor([0]), timesteps[:1].clone(), *tensors))
    program, calls = lower_sampler(exported, torch.export.export(_Image(), (x_t,)), constants)
    return seal(program), calls


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
    shape = _image_shape(unet, sample_shape)
    path = check_writable(path)
    unet = _contiguous(unet)
    with evaluation_mode(unet), torch.no_grad(), forgetting_sources():
        step, inputs, _ = _step(unet, shape, batch_size, conditioning)
        program, calls = lower(step, inputs, stock=True)
    write_whole(path, program)
    delegates = calls.pop("executorch_call_delegate", 0)
    return PTEReport(path, len(program), delegates, dict(calls))


def _image_shape(unet: nn.Module, given: tuple[int, ...] | None) -> tuple[int, ...]:
    """(C, H, W). Raises ValueError: what the network denoises are no images."""
    shape = denoiser.sample_shape(unet, given)
    if len(shape) != 3:
        raise ValueError(
            f"sample_shape={shape}: a .pte draws images, write (channels, height, width); packed tokens take "
            'torch.compile(network, backend="pqcad")'
        )
    return shape


def _check_float(unet: nn.Module) -> None:
    for name, parameter in unet.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(
                f"{name} is {parameter.dtype} on {parameter.device}: export takes float32 on the CPU, write "
                "unet.to('cpu', torch.float32)"
            )


def _step(
    unet: nn.Module, shape: tuple[int, ...], batch_size: int, conditioning: dict[str, Any], continuous: bool = False
) -> tuple[Denoiser, tuple[Any, ...], list[str]]:
    """The network as a function of tensors, inputs to export it with, and its conditioning's names."""
    tensors, rebuild = tensors_of(conditioning)
    tensors = {name: value[torch.arange(batch_size) % len(value)] for name, value in tensors.items()}
    timesteps = torch.ones(batch_size, dtype=torch.float32 if continuous else torch.int64)
    inputs = (torch.zeros(batch_size, *shape), timesteps, tuple(tensors.values()))
    return Denoiser(unet, rebuild), inputs, list(tensors)


@one_at_a_time
def _capture(
    unet: nn.Module, shape: tuple[int, ...], batch_size: int, conditioning: dict[str, Any], continuous: bool
) -> tuple[GraphModule, tuple[Any, ...], list[str]]:
    """The network's graph for one batch size, the inputs it was captured with, and its conditioning's names.

    Raises:
        RuntimeError: torch.export cannot capture it; the cause is chained.
    """
    step, inputs, names = _step(unet, shape, batch_size, conditioning, continuous)
    try:
        return torch.export.export(step, inputs).module(check_guards=False), inputs, names
    except Exception as error:
        raise RuntimeError(
            f"torch.export cannot capture {type(unet).__name__} called as f(x_t {tuple(inputs[0].shape)}, timesteps "
            f"({batch_size},), {', '.join(names) or 'no conditioning'}): {str(error).splitlines()[0]}"
        ) from error


def _metadata(
    scheduler: Sampler,
    steps: int,
    batch_size: int,
    shape: tuple[int, ...],
    names: list[str],
    correction: CorrectionTable | None,
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
        "batch_size": batch_size,
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
    }


def _rewrite(
    graph: GraphModule, unet: nn.Module, schedule: Tensor, packed: Collection[str]
) -> tuple[GraphModule, dict[str, str]]:
    """Run the passes over a captured network: what to lower, and each quantized layer's arithmetic in it."""
    timesteps = [node for node in graph.graph.nodes if node.op == "placeholder"][1]
    drop_identities(graph)
    weight_only = _weight_only_products(graph, unet)
    fold_constants(graph)
    arithmetic = to_xnnpack(graph, packed)
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
    return GraphModule(graph, graph.graph), arithmetic  # with the parameters that are still read, and no others


def _weight_only_products(graph: GraphModule, unet: nn.Module) -> dict[str, tuple[int, Node]]:
    """For each layer that quantizes its weights alone: their bits and the node that multiplies by them."""
    readers = {str(node.target): node for node in graph.graph.nodes if node.op == "get_attr"}
    found = {}
    for fqn, layer in unet.named_modules():
        if isinstance(layer, QuantizedLayer) and layer.activation_bits is None:
            node = readers[f"unet.{fqn}.weight_scale"]
            while operator_of(node) is None:
                node = next(iter(node.users))
            found[fqn] = (layer.weight_bits, node)
    return found
