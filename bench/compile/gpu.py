"""One UNet step of this project and of its peers on a GPU, side by side: ``pqcad bench compile --device cuda``.

All contenders live in one process and are timed in turn (A B C, A B C, ...), each as its users would run it: bfloat16,
channels last, compiled for its batch size with CUDA graphs. What was measured is handed on after each contender, so
that a run that is cut loses nothing.
"""

import copy
import functools
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from pqcad_ao.bench.compile.card import cast, largest_convolutions, name_of, peak_tmacs, wait
from pqcad_ao.bench.compile.contenders import module_bytes
from pqcad_ao.bench.compile.cpu import check_counts
from pqcad_ao.bench.compile.worker import reason
from pqcad_ao.bench.compile.workload import Step, float_model, gmac_per_step, random_conditioning
from pqcad_ao.config import PQCADConfig
from pqcad_ao.denoiser import sample_shape
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.evaluate.sqnr import sqnr_db
from pqcad_ao.quantize import quantize_
from pqcad_ao.utils.machine import check_device, describe, timed
from pqcad_ao.utils.progress import tqdm

BATCHES = (1, 16, 64, 256)
REFERENCES = ("torch_compile_bf16", "torch_compile_bf16_max")  # the faster of them divides by the others' times
CALIBRATION_POINTS = 64  # values move the speed of nothing here
CHECKED = 4  # images behind the SQNR
CHECK_STEPS = 4
PROFILED = 3
KERNELS = 12  # named in a profile


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


def _pqcad(activation_bits: int) -> Callable[..., nn.Module]:
    def make(unet: nn.Module, scheduler: Any, conditioning: dict[str, Any]) -> nn.Module:
        config = PQCADConfig(mode="ptq", activation_bits=activation_bits, calibration_points=CALIBRATION_POINTS)
        rows = {name: value[:1] for name, value in conditioning.items()}
        quantize_(unet, config, scheduler=scheduler, conditioning=rows or None, progress=False)
        return _bf16(unet)

    return make


GRAPHS = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
MAX_AUTOTUNE = {"mode": "max-autotune", "fullgraph": True, "dynamic": False}
OURS = {"backend": "pqcad", "fullgraph": True, "dynamic": False, "options": {"triton.cudagraphs": True}}
LINEARS_ONLY = "linears alone; convolutions in bfloat16"
CARRIED = "4-bit weights, {}-bit activations, carried to int8 multiply-accumulates"
# in the order in which they are built: where a run is cut, the most telling rows are there
ROWS = {
    "pqcad_w4a4": Row(_pqcad(4), OURS, CARRIED.format(4)),
    "torch_compile_bf16": Row(_bf16, GRAPHS, "bfloat16"),
    "torch_eager_bf16": Row(_bf16, None, "bfloat16"),
    "torch_compile_bf16_max": Row(_bf16, MAX_AUTOTUNE, "bfloat16, max-autotune"),
    "pqcad_w4a6": Row(_pqcad(6), OURS, CARRIED.format(6)),
    "torchao_int8_dynamic": Row(_torchao("Int8DynamicActivationInt8WeightConfig"), GRAPHS, f"int8, {LINEARS_ONLY}"),
    "torchao_int4_weight_only": Row(
        _torchao("Int4WeightOnlyConfig"), GRAPHS, f"bfloat16 on 4-bit weights, {LINEARS_ONLY}"
    ),
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
    kept: Callable[[dict[str, Any]], None] = lambda result: None,
    progress: bool = True,
    timing: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Time one UNet step of every contender, in turn.

    Args:
        model: ``demo``, ``ddpm-cifar10`` or ``sd15`` (random weights: for speed and size, never for quality), or a
            folder that holds a full-precision diffusers UNet.
        batches: sizes, in the order in which a contender is compiled for them.
        rounds: turns of each contender. iterations: timed steps in a turn, after one that is not timed.
        rows: names from ``ROWS``; None: all.
        kept: receives the result so far, after each contender.
        timing: a context around all that is timed; whoever shares the card stops the others there.

    Returns:
        The JSON's content. ``rows`` holds for each name and batch ``ms`` (median), ``ms_min``, ``ms_max``, ``runs``,
        ``ratio_vs_compile_bf16`` (to the faster of ``REFERENCES``; above 1 is faster; None where none is measured),
        ``resident_weight_bytes``, ``activation_bytes`` (allocated by a step at most), ``sqnr_db_vs_fp32``,
        ``build_s``, ``kernels_ms`` (of a profiled step) and ``arithmetic``; or ``skipped`` with the reason.
        ``peak_tmacs`` is what this card reaches in a large matrix product, by type; ``convolutions`` our largest ones
        and their part of it.

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
    bench = _Bench(model, place, sizes, rounds, iterations, seed, timing)
    trials = [(name, batch) for name in names for batch in sizes]
    with torch._dynamo.config.patch(recompile_limit=8 + len(trials)):
        for name, batch in tqdm(trials, desc="contenders", disable=not progress):
            bench.add(name, batch)
            kept(bench.result)
    return bench.result


class _Bench:
    """A run: the network, its inputs, and what has been built and measured so far."""

    def __init__(
        self,
        model: str,
        device: torch.device,
        sizes: Sequence[int],
        rounds: int,
        iterations: int,
        seed: int,
        timing: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.device, self.rounds, self.iterations, self.timing = device, rounds, iterations, timing
        unet, self.scheduler = float_model(model)
        self.unet = unet.to(device)
        generator = torch.Generator().manual_seed(seed)
        largest = max(sizes)
        self.noise = torch.randn(largest, *sample_shape(unet), generator=generator).to(device)
        given = random_conditioning(unet, largest, generator)
        self.given = {name: value.to(device) for name, value in given.items()}
        self.x_t, self.timesteps = self._trajectory(largest)
        self.networks: dict[str, nn.Module] = {}
        self.steps: dict[int, dict[str, Callable[..., Tensor]]] = {batch: {} for batch in sizes}
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        self.result: dict[str, Any] = {"benchmark": "compile_gpu", "model": model, "seed": seed}
        self.result |= {**describe(torch.get_num_threads()), "device": name_of(device), "cuda": torch.version.cuda}
        with timing():
            peak = peak_tmacs(device)
        self.result |= {"rounds": rounds, "iterations": iterations, "peak_tmacs": peak, "rows": []}
        with torch.no_grad():
            self.result["gmac"] = gmac_per_step(Step(self.unet, [*self.given]), self._inputs(1))

    @torch.no_grad()
    def _trajectory(self, count: int) -> tuple[Tensor, Tensor]:
        """(count, C, H, W) inputs that the full-precision sampler visits, repeated, and their timesteps."""
        visited: list[tuple[Tensor, Tensor]] = []
        checked = min(CHECKED, count)
        sample(
            self.unet,
            self.scheduler,
            self.noise[:checked],
            CHECK_STEPS,
            conditioning={name: value[:checked] for name, value in self.given.items()},
            callback=lambda first, step, t, x_t: visited.append((x_t.clone(), t.to(self.device).repeat(len(x_t)))),
        )
        x_t, timesteps = (torch.cat(values) for values in zip(*visited, strict=True))
        rows = torch.arange(count, device=self.device) % len(x_t)
        return x_t[rows], timesteps[rows]

    def _inputs(self, batch: int) -> tuple[Tensor, ...]:
        return (self.x_t[:batch], self.timesteps[:batch], *(value[:batch] for value in self.given.values()))

    def _example(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs as contenders get them."""
        x_t, *others = cast(self._inputs(batch))
        return (x_t.to(memory_format=torch.channels_last), *others)

    def add(self, name: str, batch: int) -> None:
        """Build a contender for a batch size, and time it in turn with those that are there."""
        row, start = ROWS[name], time.perf_counter()
        try:
            if name not in self.networks:
                unet = copy.deepcopy(self.unet).to(memory_format=torch.channels_last)
                head = {key: value[:CHECKED] for key, value in self.given.items()}
                self.networks[name] = row.make(unet, self.scheduler, head)
                if name == "pqcad_w4a4":
                    with self.timing():
                        found = largest_convolutions(
                            self.networks[name], self.noise, self.given, self.result["peak_tmacs"]
                        )
                    self.result["convolutions"] = found
            network = self.networks[name]
            step = Step(network, [*self.given])
            call = step if row.compile is None else torch.compile(step, **row.compile)
            checked = min(batch, CHECKED * CHECK_STEPS)
            with torch.no_grad():
                output = call(*self._example(batch))[:checked].float().clone()
                reference = Step(self.unet, [*self.given])(*self._inputs(checked))
            facts = {
                "arithmetic": row.arithmetic,
                "resident_weight_bytes": module_bytes(network),
                "sqnr_db_vs_fp32": sqnr_db(reference, output),
                "build_s": time.perf_counter() - start,
            }
        except Exception as error:  # a rival that does not run here is a row that says so
            if name.startswith("pqcad"):
                raise
            self.rows[name, batch] = {"name": name, "batch": batch, "skipped": reason(error)}
        else:
            self.steps[batch][name] = call
            self.rows[name, batch] = {"name": name, "batch": batch, **facts}
            gc.collect()
            with torch.no_grad(), self.timing():
                self._measure(batch, name)
        self.result["rows"] = [*self.rows.values()]

    def _measure(self, batch: int, new: str) -> None:
        """Time the contenders of one batch size in turn, and look into the new one."""
        example, steps = self._example(batch), self.steps[batch]
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(self.rounds):
            for name, call in [*steps.items()]:
                try:
                    times[name] += timed(functools.partial(self._once, call, example), self.iterations)
                except torch.OutOfMemoryError as error:
                    self.rows[name, batch] = {"name": name, "batch": batch, "skipped": reason(error)}
                    del steps[name]
        references = [median(times[name]) for name in REFERENCES if name in steps]
        for name in steps:
            ms = median(times[name])
            self.rows[name, batch] |= {
                "ms": ms,
                "ms_min": min(times[name]),
                "ms_max": max(times[name]),
                "runs": len(times[name]),
                "ratio_vs_compile_bf16": min(references) / ms if references else None,
            }
        if new in steps:
            self.rows[new, batch] |= {
                "activation_bytes": step_bytes(steps[new], example, self.device),
                "kernels_ms": kernels_ms(steps[new], example, self.device),
            }

    def _once(self, call: Callable[..., Tensor], example: tuple[Tensor, ...]) -> None:
        call(*example)
        wait(self.device)


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


def table(result: dict[str, Any]) -> str:
    """The result as text: rows, what was skipped and why, the card's peak and our largest convolutions."""
    header = ("row", "batch", "ms", "min", "max", "× compiled bf16", "SQNR dB", "weights MB", "step MB")
    body, lines = [], []
    for row in result["rows"]:
        if "skipped" in row:
            lines.append(f"skipped {row['name']}, batch {row['batch']}: {row['skipped']}")
            continue
        ratio, step = row["ratio_vs_compile_bf16"], row["activation_bytes"]
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
