"""One UNet step of this project and of its peers on a GPU, side by side: ``pqcad bench compile --device cuda``.

All contenders live in one process and are timed in turn (A B C, A B C, ...), each as its users would run it: bfloat16,
channels last, ``max-autotune`` with CUDA graphs.
"""

import copy
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm.auto import tqdm

from pqcad_ao.bench.compile.contenders import module_bytes
from pqcad_ao.bench.compile.cpu import check_counts
from pqcad_ao.bench.compile.worker import reason
from pqcad_ao.bench.compile.workload import Step, float_model, gmac_per_step, random_conditioning
from pqcad_ao.denoiser import sample_shape
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.evaluate.sqnr import sqnr_db
from pqcad_ao.nn.conv2d import QuantizedConv2d
from pqcad_ao.quantize import quantize_
from pqcad_ao.utils.machine import check_device, describe, timed

BATCHES = (1, 16, 64, 256)
REFERENCE = "torch_compile_bf16"  # what the others' times are divided by
CALIBRATION_POINTS = 64  # values move the speed of nothing here
CHECKED = 4  # images behind the SQNR
CHECK_STEPS = 4
PROFILED = 3
KERNELS = 12  # named in a profile
MATRIX = 8192  # side of the product that shows the card's peak
LARGEST = 3  # convolutions that are held against it


@dataclass(frozen=True)
class Row:
    """How a contender's network is made of the float32 one, and how it is compiled; None: run eagerly."""

    make: Callable[[nn.Module, Any, dict[str, Any]], nn.Module]
    compile: dict[str, Any] | None
    arithmetic: str


def _bf16(unet: nn.Module, scheduler: Any = None, conditioning: dict[str, Any] | None = None) -> nn.Module:
    return unet.to(torch.bfloat16)


def _torchao(name: str) -> Callable[..., nn.Module]:
    """torchao's ``quantize_`` with one of its own configurations; it reaches linears, convolutions stay bfloat16."""

    def make(unet: nn.Module, scheduler: Any, conditioning: dict[str, Any]) -> nn.Module:
        import torchao.quantization as torchao

        unet = _bf16(unet)
        torchao.quantize_(unet, getattr(torchao, name)())
        return unet

    return make


def _pqcad(unet: nn.Module, scheduler: Any, conditioning: dict[str, Any]) -> nn.Module:
    from pqcad_ao import PQCADConfig

    config = PQCADConfig(mode="ptq", calibration_points=CALIBRATION_POINTS)
    rows = {name: value[:1] for name, value in conditioning.items()}
    quantize_(unet, config, scheduler=scheduler, conditioning=rows or None, progress=False)
    return _bf16(unet)


MAX_AUTOTUNE = {"mode": "max-autotune", "fullgraph": True}
OURS = {"backend": "pqcad", "fullgraph": True, "options": {"max_autotune": True, "triton.cudagraphs": True}}
LINEARS_ONLY = "linears alone; convolutions in bfloat16"
ROWS = {
    "torch_eager_bf16": Row(_bf16, None, "bfloat16"),
    REFERENCE: Row(_bf16, MAX_AUTOTUNE, "bfloat16"),
    "torchao_int8_dynamic": Row(
        _torchao("Int8DynamicActivationInt8WeightConfig"), MAX_AUTOTUNE, f"int8, {LINEARS_ONLY}"
    ),
    "torchao_int4_weight_only": Row(
        _torchao("Int4WeightOnlyConfig"), MAX_AUTOTUNE, f"bfloat16 on 4-bit weights, {LINEARS_ONLY}"
    ),
    "pqcad_w4a4": Row(_pqcad, OURS, "4-bit weights and activations carried to int8 multiply-accumulates"),
}


def bench_compile_gpu(
    model: str = "ddpm-cifar10",
    *,
    device: torch.device | str = "cuda",
    batches: Sequence[int] = BATCHES,
    rounds: int = 7,
    iterations: int = 10,
    rows: Sequence[str] | None = None,
    seed: int = 0,
    json_path: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Time one UNet step of every contender, in turn.

    Args:
        model: ``demo``, ``ddpm-cifar10`` or ``sd15`` (random weights: for speed and size, never for quality), or a
            folder that holds a full-precision diffusers UNet.
        rounds: turns of each contender. iterations: timed steps in a turn, after one that is not timed.
        rows: names from ``ROWS``; None: all.

    Returns:
        The JSON's content. ``rows`` holds for each name and batch ``ms`` (median), ``ms_min``, ``ms_max``, ``runs``,
        ``ratio_vs_torch_compile_bf16`` (above 1 is faster; None where that row is not measured),
        ``resident_weight_bytes``, ``activation_bytes`` (allocated by a step at most), ``sqnr_db_vs_fp32``,
        ``kernels_ms`` (of a profiled step) and ``arithmetic``; or ``skipped`` with the reason. ``peak_tmacs`` is what
        this card reaches in a large matrix product, by type; ``convolutions`` our largest ones and their part of it.

    Raises:
        ValueError: an unknown model or row, a count below 1, no such device.
    """
    unknown = [name for name in rows or () if name not in ROWS]
    if unknown:
        raise ValueError(f"rows={', '.join(map(repr, unknown))}: allowed are {', '.join(ROWS)}")
    names, place = [name for name in ROWS if rows is None or name in rows], check_device(device)
    sizes = check_counts("batches", batches)
    check_counts("rounds", [rounds])
    check_counts("iterations", [iterations])
    unet, scheduler = float_model(model)
    unet = unet.to(place)
    generator = torch.Generator().manual_seed(seed)
    shape, largest = sample_shape(unet), max(sizes)
    noise = torch.randn(largest, *shape, generator=generator).to(place)
    given = {name: value.to(place) for name, value in random_conditioning(unet, largest, generator).items()}
    result: dict[str, Any] = {"benchmark": "compile_gpu", "model": model, "seed": seed}
    result |= {**describe(torch.get_num_threads()), "device": name_of(place), "cuda": torch.version.cuda}
    result |= {"rounds": rounds, "iterations": iterations, "peak_tmacs": peak_tmacs(place), "rows": []}

    checked = min(CHECKED, largest)
    visited: list[tuple[Tensor, Tensor]] = []
    head = {name: value[:checked] for name, value in given.items()}
    sample(
        unet,
        scheduler,
        noise[:checked],
        CHECK_STEPS,
        conditioning=head,
        callback=lambda first, step, t, x_t: visited.append((x_t.clone(), t.to(place).repeat(len(x_t)))),
    )
    with torch.no_grad():
        reference = torch.stack([Step(unet, [*head])(x, t, *head.values()) for x, t in visited])
        result["gmac"] = gmac_per_step(Step(unet, [*head]), (*visited[0], *head.values())) / checked

    steps: dict[str, Callable[..., Tensor]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in tqdm(names, desc="building", disable=not progress):
        row = ROWS[name]
        try:
            network = row.make(copy.deepcopy(unet).to(memory_format=torch.channels_last), scheduler, head)
            if name == "pqcad_w4a4":
                result["convolutions"] = largest_convolutions(network, noise, given, result["peak_tmacs"])
            step = Step(network, [*head])
            call = step if row.compile is None else torch.compile(step, **row.compile)
            with torch.no_grad():
                outputs = torch.stack([call(*cast((x, t, *head.values()))).float().clone() for x, t in visited])
            steps[name] = call
            facts[name] = {
                "arithmetic": row.arithmetic,
                "resident_weight_bytes": module_bytes(network),
                "sqnr_db_vs_fp32": sqnr_db(reference, outputs),
            }
        except Exception as error:  # a rival that does not run here is a row that says so
            if name == "pqcad_w4a4":
                raise
            facts[name] = {"skipped": reason(error)}
    del unet
    gc.collect()
    with torch.no_grad():
        for batch in tqdm(sizes, desc="timing", disable=not progress):
            example = cast(
                (
                    noise[:batch].to(memory_format=torch.channels_last),
                    torch.arange(batch, device=place) * 999 // max(batch - 1, 1),
                    *(value[:batch] for value in given.values()),
                )
            )
            result["rows"] += measure(steps, facts, example, rounds, iterations, place)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def cast(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Floating-point inputs in bfloat16."""
    return tuple(value.bfloat16() if value.is_floating_point() else value for value in inputs)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    steps: dict[str, Callable[..., Tensor]],
    facts: dict[str, dict[str, Any]],
    example: tuple[Tensor, ...],
    rounds: int,
    iterations: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One batch size: every contender in turn."""
    batch = len(example[0])
    rows: dict[str, dict[str, Any]] = {name: {"name": name, "batch": batch, **facts[name]} for name in facts}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, call in steps.items():
            if "skipped" in rows[name]:
                continue

            def step(call: Callable[..., Tensor] = call) -> None:
                call(*example)
                wait(device)

            try:
                times[name] += timed(step, iterations)
            except torch.OutOfMemoryError as error:
                rows[name] = {"name": name, "batch": batch, "skipped": reason(error)}
    for name, call in steps.items():
        if "skipped" in rows[name]:
            continue
        of_reference = times.get(REFERENCE)
        rows[name] |= {
            "ms": median(times[name]),
            "ms_min": min(times[name]),
            "ms_max": max(times[name]),
            "runs": len(times[name]),
            f"ratio_vs_{REFERENCE}": median(of_reference) / median(times[name]) if of_reference else None,
            "activation_bytes": step_bytes(call, example, device),
            "kernels_ms": kernels_ms(call, example, device),
        }
    return list(rows.values())


def step_bytes(call: Callable[..., Tensor], example: tuple[Tensor, ...], device: torch.device) -> int | None:
    """Device memory that a step holds at most on top of what is held between steps; None on a CPU."""
    if device.type != "cuda":
        return None
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(*example)
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernels_ms(call: Callable[..., Tensor], example: tuple[Tensor, ...], device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by kernel, the longest first; on a CPU by operator."""
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        for _ in range(PROFILED):
            call(*example)
        wait(device)
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = {event.key: getattr(event, attribute) / 1000 / PROFILED for event in profile.key_averages()}
    longest = sorted(spent.items(), key=lambda item: -item[1])
    return dict(longest[:KERNELS]) | {"all others": sum(ms for _, ms in longest[KERNELS:])}


def peak_tmacs(device: torch.device, side: int | None = None) -> dict[str, float]:
    """Multiply-accumulates in T/s that a large matrix product reaches, the best of ten, by type."""
    side = side or (MATRIX if device.type == "cuda" else 256)
    integers = torch.ones(side, side, dtype=torch.int8, device=device)
    numbers = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    turned = integers.t().contiguous().t()  # the layout that int8 products want
    calls = {"int8": lambda: torch._int_mm(integers, turned), "bf16": lambda: numbers @ numbers}

    def best(call: Callable[[], Tensor]) -> float:
        def once() -> None:
            call()
            wait(device)

        return min(timed(once, 10))

    return {kind: side**3 / best(call) / 1e9 for kind, call in calls.items()}


@torch.no_grad()
def largest_convolutions(
    network: nn.Module, noise: Tensor, given: dict[str, Tensor], peak: dict[str, float]
) -> list[dict[str, Any]]:
    """The layers with most multiply-accumulates, each timed alone at the largest batch, in every form that it has."""
    met: list[tuple[float, str, QuantizedConv2d, Tensor]] = []

    def remember(fqn: str) -> Callable[..., None]:
        def hook(layer: QuantizedConv2d, args: tuple[Tensor, ...], output: Tensor) -> None:
            met.append((float(output[0].numel() * layer.reduction), fqn, layer, args[0]))

        return hook

    hooks = [
        module.register_forward_hook(remember(fqn))
        for fqn, module in network.named_modules()
        if isinstance(module, QuantizedConv2d) and module.activation_bits
    ]
    example = (noise[:1], torch.zeros(1, dtype=torch.int64, device=noise.device), *(v[:1] for v in given.values()))
    Step(network, [*given])(*cast(example))
    for hook in hooks:
        hook.remove()
    found = []
    for macs, fqn, layer, x in sorted(met, key=lambda item: -item[0])[:LARGEST]:
        batch = len(noise)
        integers = torch.zeros(batch, *x.shape[1:], dtype=torch.int8, device=x.device)
        scale = torch.ones(batch, len(layer.segments), device=x.device)
        arguments = (
            integers.to(memory_format=torch.channels_last),
            layer.weight,
            layer.weight_scale,
            scale,
            layer.bias,
            layer.weight_bits,
            layer.segments,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            torch.bfloat16,
            layer.activation_bits,
        )
        for form, call in forms(arguments).items():

            def once(call: Callable[[], Tensor] = call, device: torch.device = x.device) -> None:
                call()
                wait(device)

            tmacs = macs * batch / min(timed(once, 10)) / 1e9
            sizes = {"layer": fqn, "form": form, "batch": batch, "input": list(x.shape[1:])}
            found.append({**sizes, "tmacs": tmacs, "part_of_int8_peak": tmacs / peak["int8"]})
    return found


def forms(arguments: tuple[Any, ...]) -> dict[str, Callable[[], Tensor]]:
    """The ways to compute a convolution on its device."""
    if arguments[0].device.type != "cuda":
        return {"cpu": lambda: torch.ops.pqcad.conv2d(*arguments)}
    from pqcad_ao.ops.triton import kernels as gpu

    geometry = (arguments[7], arguments[8], arguments[10], arguments[11])
    exact = gpu.has_winograd(arguments[5], arguments[13], *geometry)
    names = [form for form in gpu.FORMS if form == "direct" or exact]
    return {form: lambda form=form: gpu.conv2d(*arguments, None, form) for form in names}  # type: ignore[misc]


def table(result: dict[str, Any]) -> str:
    """The result as text: rows, what was skipped and why, the card's peak and our largest convolutions."""
    header = ("row", "batch", "ms", "min", "max", "× compiled bf16", "SQNR dB", "weights MB", "step MB")
    body, lines = [], []
    for row in result["rows"]:
        if "skipped" in row:
            lines.append(f"skipped {row['name']}, batch {row['batch']}: {row['skipped']}")
            continue
        ratio, step = row[f"ratio_vs_{REFERENCE}"], row["activation_bytes"]
        times = [f"{row[key]:.3f}" for key in ("ms", "ms_min", "ms_max")]
        body.append(
            (
                *(row["name"], row["batch"], *times, "–" if ratio is None else f"{ratio:.2f}"),
                *(f"{row['sqnr_db_vs_fp32']:.1f}", f"{row['resident_weight_bytes'] / 1e6:.1f}"),
                "–" if step is None else f"{step / 1e6:.0f}",
            )
        )
    peaks = ", ".join(f"{kind} {value:.1f}" for kind, value in result["peak_tmacs"].items())
    lines.append(f"{result['model']}, {result['gmac']:.2f} GMAC an image, on {result['device']}; peak TMAC/s: {peaks}")
    for conv in result.get("convolutions", []):
        lines.append(
            f"{conv['layer']}, {conv['input']}, {conv['form']}: {conv['tmacs']:.1f} effective TMAC/s, "
            f"{100 * conv['part_of_int8_peak']:.0f} % of the int8 peak"
        )
    return "\n".join([tabulate(body, header, disable_numparse=True), *lines])
