"""One sampling step as a .pte on ExecuTorch's stock runtime: XNNPACK's own recipes and this project's, in one run.

Files are made by processes of their own, one after another; so are load times and memory. The timed calls of all files
take turns in one process.
"""

import argparse
import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor, nn

from pqcad_ao.bench import machine
from pqcad_ao.bench.compile import Step, float_model, quantize_fixed, random_conditioning
from pqcad_ao.capture import sample_shape
from pqcad_ao.files import check_writable, write_whole
from pqcad_ao.models import load_model, save_model
from pqcad_ao.quiet import start_executorch
from pqcad_ao.sampling import predict, sample
from pqcad_ao.serialization import quantized_state

TRAJECTORIES = 4  # behind the signal-to-noise ratios
CALIBRATION = 32  # calls behind the stock quantizer's scales
WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """What a row is made of: who quantizes, and for which backend."""

    title: str
    build: Callable[..., dict[str, Any]]
    runs: bool = True


def _network(model: str) -> tuple[nn.Module, Any]:
    unet, scheduler = float_model(model)
    if random_conditioning(unet, 1, torch.Generator()):
        raise ValueError(f"model={model!r} takes conditioning: this benchmark measures unconditional networks")
    return unet.eval(), scheduler


def _example(unet: nn.Module) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, *sample_shape(unet)), torch.tensor([500])


def build_fp32(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """ExecuTorch's recipe, not quantized."""
    from pqcad_ao.edge import export_fp32_pte

    report = export_fp32_pte(_network(job["model"])[0], path)
    return {"delegates": report.delegates, "portable": report.portable, "arithmetic": "float32"}


def build_int8(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """ExecuTorch's recipe for XNNPACK: PT2E, static int8, weights per channel."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from pqcad_ao.lower import lower

    unet, _ = _network(job["model"])
    met = load_file(job["records"])
    with torch.no_grad():
        graph = torch.export.export(Step(unet), _example(unet)).module()
        prepared = prepare_pt2e(
            graph, XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        )
        calls = [(x, t) for x_t, t in zip(met["x_t"], met["timesteps"], strict=True) for x in x_t]
        for x, t in calls[:: -(-len(calls) // CALIBRATION)]:
            prepared(x[None], t.view(1))
        program, counted = lower(torch.export.export(convert_pt2e(prepared), _example(unet)), stock=True)
    write_whole(path, program)
    delegates = counted.pop("executorch_call_delegate", 0)
    return {"delegates": delegates, "portable": dict(counted), "arithmetic": "int8 × int8 products, int8 results"}


def _compressed(job: dict[str, Any]) -> tuple[nn.Module, Any]:
    unet, scheduler = load_model(job["compressed"])
    return unet, scheduler


def _build_pqcad(objective: str) -> Callable[..., dict[str, Any]]:
    def build(job: dict[str, Any], path: Path) -> dict[str, Any]:
        from pqcad_ao.edge import export_pte

        unet, scheduler = _compressed(job)
        options = {"num_inference_steps": job["steps"], "objective": objective, "progress": False}
        report = export_pte(unet, path, scheduler=scheduler, trajectories=TRAJECTORIES, **options)
        packed = sum(row.packed for row in report.plan.layers)
        return {
            "delegates": report.delegates,
            "portable": report.portable,
            "arithmetic": f"int8 × int4 products in {packed} layers, int8 × int8 in "
            f"{len(report.plan.layers) - packed}, float32 results",
            "parity_db": {"worst": min(report.sqnr_db.values()), "median": median(report.sqnr_db.values())},
            "rounding_db": report.rounding_db,
        }

    return build


def build_coreml(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """Ahead of time only: no device is here."""
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    return _ahead_of_time(job, path, CoreMLPartitioner())


def build_vulkan(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """Ahead of time only: no device is here."""
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return _ahead_of_time(job, path, VulkanPartitioner())


def _ahead_of_time(job: dict[str, Any], path: Path, partitioner: Any) -> dict[str, Any]:
    from executorch.exir import to_edge_transform_and_lower

    from pqcad_ao.lower import calls_of

    unet, _ = _network(job["model"])
    with torch.no_grad():
        exported = torch.export.export(Step(unet), _example(unet))
        edge = to_edge_transform_and_lower(exported, partitioner=[partitioner])
        counted = calls_of(edge.exported_program())
        write_whole(path, edge.to_executorch().buffer)
    delegates = counted.pop("executorch_call_delegate", 0)
    return {"delegates": delegates, "portable": dict(counted), "arithmetic": "not run: no device"}


ROWS = {
    "xnnpack_fp32": Row("XNNPACK fp32", build_fp32),
    "xnnpack_int8": Row("XNNPACK int8, stock", build_int8),
    "pqcad_speed": Row("pqcad W4A4, speed", _build_pqcad("speed")),
    "pqcad_size": Row("pqcad W4A4, size", _build_pqcad("size")),
    "coreml_fp32": Row("Core ML fp32", build_coreml, runs=False),
    "vulkan_fp32": Row("Vulkan fp32", build_vulkan, runs=False),
}


def bench_edge(
    model: str = "demo",
    *,
    compressed: str | None = None,
    rows: Sequence[str] | None = None,
    steps: int = 20,
    rounds: int = 25,
    n: int = 0,
    threads: int | None = None,
    seed: int = 0,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure one sampling step of each row's .pte, at batch 1.

    Args:
        model: a name or folder that ``load_model`` takes, in full precision.
        compressed: a folder with the same network quantized; if None, it is quantized here, fixed-bit and without
            learning, which is as large and as fast as with.
        rows: of ``ROWS``. steps: of the schedule. rounds: timed calls of each file.
        threads: for every file; None: all available cores.
        n: images for the FID through each file and in eager mode (Fashion-MNIST features); 0: none.

    Returns:
        what ``json_path`` receives: ``rows`` with bytes, load_ms, ms, peak_rss_bytes, delegates, portable, sqnr_db
        (against full precision, all steps) and, where asked for, fid; a row that cannot be made says ``skipped``.

    Raises:
        ValueError: unknown rows or models, counts below their least.
    """
    rows = list(ROWS if rows is None else rows)
    unknown = [row for row in rows if row not in ROWS]
    if unknown or not rows:
        raise ValueError(f"rows={','.join(unknown) or 'none'!r}: allowed are {', '.join(ROWS)}")
    for name, value, least in (("steps", steps, 1), ("rounds", rounds, 1), ("n", n, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: allowed are whole numbers from {least}")
    target = None if json_path is None else check_writable(json_path)
    threads = machine.check_threads(threads)
    result: dict[str, Any] = {"model": model, "steps": steps, "batch": 1, "seed": seed} | machine.describe(threads)
    with tempfile.TemporaryDirectory() as folder:
        job: dict[str, Any] = {"model": model, "steps": steps, "seed": seed, "threads": threads}
        job |= {"records": str(Path(folder) / "records.safetensors")}
        job["compressed"] = compressed or str(Path(folder) / "model")
        alone(_prepare, job, compressed is None)
        made, paths = [], {}
        for name in rows:
            path = Path(folder) / f"{name}.pte"
            row: dict[str, Any] = {"name": name, "title": ROWS[name].title}
            try:
                started = time.perf_counter()
                row |= alone(_build, name, job, str(path))
                row |= {"bytes": path.stat().st_size, "export_s": time.perf_counter() - started}
                if ROWS[name].runs:
                    row |= alone(_alone, str(path), job)
                    paths[name] = str(path)
            except Exception as error:  # a rival's fault is a line of the table
                row["skipped"] = _reason(error)
            made.append(row)
        turns = alone(_race, paths, rounds, job) if paths else {}
        for row in made:
            if row["name"] in turns:
                row["ms"] = median(turns[row["name"]])
                row["ms_quartiles"] = _quartiles(turns[row["name"]])
                rival = turns.get("xnnpack_int8")
                if rival:
                    row["over_int8"] = median(a / b for a, b in zip(turns[row["name"]], rival, strict=True))
            if n and row["name"] in paths:
                row["fid"] = alone(_fid, row["name"], paths[row["name"]], job, n)
        result["rows"] = made
        if n:
            result["n"] = n
            result["eager"] = {kind: alone(_fid, kind, "", job, n) for kind in ("eager_fp32", "eager_w4a4")}
    if target is not None:
        write_whole(target, json.dumps(result, indent=2).encode())
    return result


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of this module in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _reason(error: Exception) -> str:
    """One line, without the folders of this machine."""
    return re.sub(r"(?:/[^/\s'\"]+)+/", "", " ".join(f"{type(error).__name__}: {error}".split()))[:300]


def _prepare(job: dict[str, Any], quantize: bool) -> None:
    """Inputs on full-precision trajectories and their predictions; the quantized network where none was given."""
    unet, scheduler = _network(job["model"])
    shape = sample_shape(unet)
    noise = torch.randn(TRAJECTORIES, *shape, generator=torch.Generator().manual_seed(job["seed"]))
    met: list[tuple[Tensor, Tensor, Tensor]] = []

    def recorded(x_t: Tensor, timesteps: Tensor) -> Tensor:
        prediction = predict(unet, x_t, timesteps, {})
        met.append((x_t.contiguous().clone(), timesteps[0].clone(), prediction.contiguous().clone()))
        return prediction

    sample(recorded, scheduler, noise, job["steps"])  # type: ignore[arg-type]
    x_t, timesteps, predictions = (torch.stack(column) for column in zip(*met, strict=True))
    save_file({"x_t": x_t, "timesteps": timesteps, "predictions": predictions}, job["records"])
    if quantize:
        quantize_fixed(unet, scheduler, {})
        save_model(unet, scheduler, job["compressed"])
    elif quantized_state(load_model(job["compressed"])[0]) is None:
        raise ValueError(f"compressed={job['compressed']!r} is not quantized: give a folder that quantize_ led to")


def _build(name: str, job: dict[str, Any], path: str) -> dict[str, Any]:
    return ROWS[name].build(job, Path(path))


class _Program:
    """A file in the runtime."""

    def __init__(self, path: str, threads: int) -> None:
        from executorch.runtime import Runtime

        start_executorch(threads)
        self._bytes = Path(path).read_bytes()  # the runtime reads from them and does not keep them alive
        self._program = Runtime.get().load_program(self._bytes)
        self._ours = "unet" in self._program.method_names
        started = time.perf_counter()
        # what a phone calls for a step
        self.method = self._program.load_method("step" if self._ours else "forward")
        self.load_ms = 1000 * (time.perf_counter() - started)

    @cached_property
    def _unet(self) -> Any:
        return self._program.load_method("unet") if self._ours else self.method

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's prediction for one image (1, C, H, W) at one timestep."""
        return self._unet.execute([x_t.contiguous(), t.view(1)])[0].clone()


def _alone(path: str, job: dict[str, Any]) -> dict[str, Any]:
    """Load time, memory, and signal to noise against full precision."""
    met = load_file(job["records"])
    before = machine.rss_bytes()
    machine.reset_peak_rss()
    program = _Program(path, job["threads"])
    for _ in range(WARM_UP):
        program.method.execute([met["x_t"][0, :1].contiguous(), torch.tensor([0])])
    peak = machine.peak_rss_bytes()
    signal = noise = 0.0
    for x_t, t, reference in zip(met["x_t"], met["timesteps"], met["predictions"], strict=True):
        for x, expected in zip(x_t, reference, strict=True):
            signal += float(expected.double().square().sum())
            noise += float((program.predict(x[None], t)[0].double() - expected.double()).square().sum())
    sqnr_db = 10 * float(torch.tensor(signal / noise).log10()) if noise else float("inf")
    return {
        "load_ms": program.load_ms,
        "peak_rss_bytes": peak,
        "peak_rss_above_start_bytes": peak - before,
        "sqnr_db": sqnr_db,
    }


def _race(paths: dict[str, str], rounds: int, job: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds of every call; the files take turns."""
    programs = {name: _Program(path, job["threads"]) for name, path in paths.items()}
    return _take_turns(programs, [load_file(job["records"])["x_t"][0, :1].contiguous(), torch.tensor([0])], rounds)


def _take_turns(programs: dict[Any, _Program], inputs: list[Tensor], rounds: int) -> dict[Any, list[float]]:
    """Milliseconds of every call after the first few."""
    turns: dict[Any, list[float]] = {key: [] for key in programs}
    for turn in range(WARM_UP + rounds):
        for key, program in programs.items():
            started = time.perf_counter()
            program.method.execute(inputs)
            if turn >= WARM_UP:
                turns[key].append(1000 * (time.perf_counter() - started))
    return turns


def _fid(kind: str, path: str, job: dict[str, Any], n: int) -> float:
    """FID of ``n`` images from the same noise, of a file or of the network in eager mode."""
    from pqcad_ao.evaluate import embedded_features, fid_kid

    unet, scheduler = _network(job["model"])
    noise = torch.randn(n, *sample_shape(unet), generator=torch.Generator().manual_seed(job["seed"]))
    if kind == "pqcad_speed" or kind == "pqcad_size":
        from pqcad_ao.edge import PTESampler

        images = PTESampler(path).sample(noise)
    elif kind.startswith("eager"):
        if kind == "eager_w4a4":
            unet, scheduler = _compressed(job)
        images = sample(unet, scheduler, noise, job["steps"])
    else:
        predict_one = _Program(path, job["threads"]).predict
        images = sample(predict_one, scheduler, noise, job["steps"], batch_size=1)  # type: ignore[arg-type]
    network, real = embedded_features()
    return fid_kid(images, network, real, seed=job["seed"], bootstrap=0)["fid"]


def _quartiles(values: list[float]) -> list[float]:
    return torch.tensor(values).quantile(torch.tensor([0.25, 0.75])).tolist()


def measure_costs(json_path: str | Path, rounds: int = 25) -> dict[str, Any]:
    """What a multiply-accumulate of an int8 convolution costs here, and what a number moved for the packed form does.

    From stacks of equal quantized layers, exported in both forms; :mod:`pqcad_ao.edge_plan` reads the medians.
    """
    target = check_writable(json_path)
    shapes = [(64, 32), (128, 32), (256, 16), (256, 8)]
    with tempfile.TemporaryDirectory() as folder:
        found = [alone(_stack_costs, channels, size, folder, rounds) for channels, size in shapes]
    nanoseconds = {key: median(row[key] for row in found) for key in ("multiply_accumulate", "number")}
    threads = machine.available_cores()
    result = {"nanoseconds": nanoseconds, "layers": found} | machine.describe(threads)
    write_whole(target, json.dumps(result, indent=2).encode())
    return result


class Stack(nn.Module):
    """``layers`` equal 3×3 convolutions between two others."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(*c, 3, padding=1) for c in ((4, channels), (channels, 4)))
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(nn.functional.silu(x))
        return self.last(x)


def _stack_costs(channels: int, size: int, folder: str, rounds: int) -> dict[str, float]:
    from diffusers import DDIMScheduler

    from pqcad_ao import PQCADConfig, quantize_
    from pqcad_ao.edge import export_pte

    scheduler, paths, shape = DDIMScheduler(), {}, (4, size, size)
    for layers in (1, 5):
        torch.manual_seed(0)
        network = Stack(channels, layers).eval()
        config = PQCADConfig(mode="ptq", calibration_points=8, calibration_steps=2, calibration_batch_size=8)
        quantize_(network, config, scheduler=scheduler, sample_shape=shape, progress=False)
        for objective in ("bytes", "size"):
            path = f"{folder}/{channels}-{size}-{layers}-{objective}.pte"
            # nothing has to be saved: convolutions keep a byte for a weight
            budget: dict[str, Any] = {"max_bytes": 2**40} if objective == "bytes" else {"objective": objective}
            options: dict[str, Any] = {"sample_shape": shape, "num_inference_steps": 2, "trajectories": 1}
            export_pte(network, path, scheduler=scheduler, progress=False, **options, **budget)
            paths[layers, objective] = path
    programs = {key: _Program(path, machine.available_cores()) for key, path in paths.items()}
    turns = _take_turns(programs, [torch.randn(1, *shape), torch.tensor([0])], rounds)
    layer = {kind: 1e6 * (median(turns[5, kind]) - median(turns[1, kind])) / 4 for kind in ("bytes", "size")}
    places = size * size
    return {
        "channels": channels,
        "size": size,
        "layer_ms": layer["bytes"] * 1e-6,
        "extra_ms": (layer["size"] - layer["bytes"]) * 1e-6,
        "multiply_accumulate": layer["bytes"] / (places * channels * channels * 9),
        "number": (layer["size"] - layer["bytes"]) / (places * 2 * channels),
    }


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    lines = []
    for row in result["rows"]:
        if "skipped" in row:
            lines.append([row["title"], f"skipped: {row['skipped'][:80]}"])
            continue
        outside = ", ".join(f"{count} {name.removeprefix('aten::')}" for name, count in sorted(row["portable"].items()))
        lines.append(
            [
                row["title"],
                f"{row['bytes'] / 1e6:.2f}",
                row.get("load_ms"),
                row.get("ms"),
                row.get("over_int8"),
                row["peak_rss_above_start_bytes"] / 1e6 if "peak_rss_above_start_bytes" in row else None,
                row["delegates"],
                outside if len(outside) < 60 else f"{sum(row['portable'].values())} calls",
                row.get("sqnr_db"),
                row.get("fid"),
            ]
        )
    head = ["", "MB", "load ms", "ms", "/ int8", "MB of memory", "calls", "outside", "dB to fp32", "FID"]
    text = tabulate(lines, head, floatfmt=".2f")
    if "eager" in result:
        text += "\n" + ", ".join(f"{kind}: FID {value:.3f}" for kind, value in result["eager"].items())
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pqcad bench edge``."""
    parser.add_argument("--model", default="demo", help="demo, ddpm-cifar10, or a folder with a diffusers UNet (demo)")
    parser.add_argument("--compressed", metavar="DIR", help="the same network quantized (quantized here, fixed-bit)")
    parser.add_argument("--rows", type=lambda text: text.split(","), metavar="ROW,ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=20, help="of the schedule (20)")
    parser.add_argument("--rounds", type=int, default=25, help="timed calls of each file (25)")
    parser.add_argument(
        "--n", type=int, default=0, help="images for the FID, through each file and in eager mode (none)"
    )
    parser.add_argument("--threads", type=int, help="for every file (all available cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--costs", metavar="FILE", help="measure what the planner goes by instead, and write it there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the parsed options ask for and print it."""
    if args.costs:
        result = measure_costs(args.costs, args.rounds)
        print(tabulate([row.values() for row in result["layers"]], list(result["layers"][0])))
        return result
    options = {"rows": args.rows, "steps": args.steps, "rounds": args.rounds, "n": args.n}
    result = bench_edge(
        args.model, compressed=args.compressed, threads=args.threads, seed=args.seed, json_path=args.json, **options
    )
    print(table(result))
    return result
