"""The demo: a teacher goes in; pictures, a compressed model, a ``.pte`` and a summary of measurements come out."""

import copy
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from pqcad_ao import ops
from pqcad_ao.bench.compile.contenders import frozen, module_bytes
from pqcad_ao.bench.compile.workload import Step
from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.denoiser import sample_shape
from pqcad_ao.diffusion.images import checked_images
from pqcad_ao.diffusion.recording import Recorder
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.distill import check_distillation, distill_
from pqcad_ao.evaluate.features import RealFeatures, embedded_features, extract_features
from pqcad_ao.evaluate.fid import fid_kid
from pqcad_ao.evaluate.sqnr import sqnr_db, trajectory_sqnr
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.state import QuantizedState, quantized_state
from pqcad_ao.ops.cpu import loader
from pqcad_ao.quantize import quantize_
from pqcad_ao.report import LATENCY_NAMES, ROW_NAMES, save_learning, save_samples, text_report, write_html, write_json
from pqcad_ao.utils.checks import check_count, check_counts
from pqcad_ao.utils.machine import describe
from pqcad_ao.utils.quiet import start_executorch

TRAJECTORY_ROWS = 8  # images whose trajectories carry the SQNR
WARMUP_CALLS = 3


class Stages:
    """Prints what begins, and keeps how many seconds each stage took in ``seconds``."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.start, self.seconds = say, time.perf_counter(), dict[str, float]()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        self.say(f"[{begin - self.start:6.1f} s] {name}")
        yield
        self.seconds[name] = time.perf_counter() - begin


@torch.no_grad()
def median_ms(call: Callable[[], Any], calls: int) -> float:
    """Median wall time of ``call()`` in milliseconds, after some calls that are not counted."""
    for _ in range(WARMUP_CALLS):
        call()
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1000 * median(times)


def run(
    out: str | Path,
    *,
    model: str = "demo",
    config: PQCADConfig | None = None,
    cad: CADConfig | None = None,
    images: int = 256,
    steps: int = 20,
    batch_size: int = 32,
    seed: int = 0,
    latency_calls: int = 30,
    pictures: int = 64,
    features: tuple[nn.Module, RealFeatures] | None = None,
    command: str | None = None,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Compress a teacher, sample both, measure both, and write everything to ``out``.

    Args:
        out: folder; receives summary.json, report.html, samples.png, model/ and unet.pte.
        model: as for :func:`~pqcad_ao.models.load_model`.
        config: how to quantize; if None, ``PQCADConfig(mode="ptq", seed=seed)``. Where it learns, there is one more
            row, and the fixed-bit row has the same configuration with ``mode="ptq"``.
        cad: how to distill the quantized network to half the steps; None: not at all.
        images: behind each FID, from the same noise for all rows. steps: of the sampler. batch_size: images a call.
        latency_calls: timed calls behind each median. pictures: of each kind in samples.png, at most ``images``.
        features: feature network and real statistics; the embedded ones if None.
        command: what the user typed, for the report.
        say: receives one line per stage.

    Returns:
        what ``summary.json`` holds. What could not be measured is absent there and named under ``skipped``.

    Raises:
        ValueError: the model does not fit the feature network, or cannot be quantized or distilled.
        OSError: ``out`` cannot be written.
    """
    check_count("images", images, 2)
    check_counts(steps=steps, batch_size=batch_size, latency_calls=latency_calls, pictures=pictures)
    if cad is not None and (cad.steps != steps or cad.halvings != 1):
        raise ValueError(f"cad is for {cad.steps} steps and {cad.halvings} halvings: the demo halves its {steps} once")
    from pqcad_ao.edge.sampler import PTESampler  # wants executorch, which is optional

    start_executorch(torch.get_num_threads())
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = config or PQCADConfig(mode="ptq", seed=seed)
    stages = Stages(say)
    # the kernels' compiler works while the teacher calibrates; the first quantized layer waits for what is left
    threading.Thread(target=loader.load, daemon=True).start()

    with stages("load the teacher"):
        teacher, scheduler = load_model(model)
        network, real = features or embedded_features()
        shape = sample_shape(teacher)
        noise = torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed))
        extract_features(noise[:2], network)  # a network for other images is refused now, not after sampling

    networks = {"fp_full": teacher, "ptq_full": copy.deepcopy(teacher)}
    with tempfile.TemporaryDirectory() as folder:  # the trajectories that calibrate are the ones to learn from
        if cad is not None:  # first: it finds out what cannot be distilled
            with stages(f"draw {cad.points} pictures to distill from"):
                ddim, _ = check_distillation(teacher, scheduler, cad)
                kept: dict[str, Any] = {"folder": folder, "callback": None, "progress": progress}
                checked_images(teacher, ddim, shape, cad, None, images=None, **kept)
        with stages("fixed bits: calibrate on the teacher's own trajectories"):
            fixed = replace(config, mode="ptq")
            quantize_(networks["ptq_full"], fixed, scheduler=scheduler, folder=folder, progress=progress)
        if config.learns:
            with stages(f"progressive: learn on the same trajectories, {config.iterations} updates"):
                networks["pq_full"] = copy.deepcopy(teacher)
                quantize_(networks["pq_full"], config, scheduler=scheduler, folder=folder, progress=progress)
        name, compressed = list(networks.items())[-1]
        sampler_of = dict.fromkeys(networks, scheduler)
        lengths = {"full": steps} | ({"half": steps // 2} if steps % 2 == 0 else {})
        rows = {row: (unet, "full") for row, unet in networks.items()}
        if cad is not None:
            with stages(f"distill to {steps // 2} steps, {cad.iterations} updates"):
                compressed, name = copy.deepcopy(compressed), "pqcad_half"
                halved = distill_(compressed, teacher, scheduler, cad, folder=folder, progress=progress)
            # both kinds of full precision first
            rows = {"fp_full": rows.pop("fp_full"), "fp_half": (teacher, "half"), **rows, name: (compressed, "half")}
            sampler_of |= {"fp_half": scheduler, name: halved}
        elif "half" in lengths:
            half = name.replace("full", "half")
            rows[half], sampler_of[half] = (compressed, "half"), scheduler
    learned = cast(QuantizedState, quantized_state(compressed))
    resolved = learned.plan
    say(f"           {resolved.summary()}")

    recorder = Recorder(teacher, most=steps)  # the first batch of images
    drawn: dict[str, Tensor] = {}
    for row, (unet, length) in rows.items():
        with stages(f"sample {images} images in {lengths[length]} steps: {ROW_NAMES[row]}"):
            drawn[row] = sample(
                recorder if row == "fp_full" else unet,
                sampler_of[row],
                noise,
                lengths[length],
                batch_size=batch_size,
                progress=progress,
            )
    with stages("evaluate: FID, SQNR"):
        fid = {row: fid_kid(pixels, network, real, seed=seed)["fid"] for row, pixels in drawn.items()}
        points = [(call.x_t[:TRAJECTORY_ROWS], call.timesteps[:TRAJECTORY_ROWS]) for call in recorder.calls]
        sqnr = {
            row.replace("full", "step"): trajectory_sqnr(teacher, unet, points)["sqnr_db"]
            for row, unet in networks.items()
            if row != "fp_full"
        }

    with tempfile.TemporaryDirectory() as scratch:
        places = {"fp32": Path(scratch) / "fp32.pte", "compressed": out / "unet.pte"}
        with stages("save both models"):
            fp32_checkpoint = save_model(teacher, scheduler, Path(scratch) / "model").stat().st_size
            checkpoint = save_model(compressed, sampler_of[name], out / "model").stat().st_size
        x_t, timestep = noise[:1], recorder.calls[0].timesteps[0]
        compiled = {
            "fp32_compile": lambda: partial(frozen(Step(copy.deepcopy(teacher)), (x_t, timestep)), x_t, timestep),
            "compressed_compile": lambda: partial(
                torch.compile(compressed, backend="pqcad", fullgraph=True), x_t, timestep
            ),
        }
        with (
            stages("export unet.pte and its fp32 counterpart in processes of their own; meanwhile torch.compile"),
            exporting(Path(scratch) / "model", places["fp32"], "--full-precision") as finish_fp32,
            exporting(out / "model", places["compressed"], "--steps", str(lengths[rows[name][1]])) as finish,
        ):
            calls, skipped = build(compiled)
            fp32_exported, exported = finish_fp32(), finish()
        shown = min(pictures, images)
        with stages(f"sample {shown} images with unet.pte"):
            sampler = PTESampler(places["compressed"])
            pte_full = sampler.sample(noise[:shown], progress=progress)
        sqnr["pte_vs_eager"] = min(exported["sqnr_db"].values())
        sqnr["pte_images"] = sqnr_db(drawn[name][:shown], pte_full)
        calls["fp32_eager"] = partial(teacher, x_t, timestep)
        calls["pte_fp32"] = partial(load_step(places["fp32"]), [x_t, timestep.reshape(1)])
        calls["pte"] = partial(sampler.predict, x_t, 0)
        with stages("time one step of each"):
            latency = {name: median_ms(calls[name], latency_calls) for name in LATENCY_NAMES if name in calls}

    summary: dict[str, Any] = {
        "steps": lengths,
        "fid": fid,
        "fid_n": images,
        "bytes": {
            "fp32_checkpoint": fp32_checkpoint,
            "checkpoint": checkpoint,
            "fp32_pte": fp32_exported["bytes"],
            "pte": exported["bytes"],
            "resident_weights": module_bytes(compressed),
        },
        "latency_ms": latency,
        "latency_batch": 1,
        "sqnr_db": sqnr,
        "arithmetic": ops.arithmetic(),
        "pte_arithmetic": dict(Counter(exported["arithmetic"].values()).most_common()),
        "plan_summary": resolved.summary(),
        "model": str(model),
        "seed": seed,
        "command": command or shlex.join(sys.argv),
        **describe(torch.get_num_threads()),
        "stages_s": stages.seconds,
    }
    if "half" in lengths and {"fp32_compile", "compressed_compile"} <= latency.keys():
        whole, rest = latency["fp32_compile"] * steps, latency["compressed_compile"] * lengths["half"]
        summary["speedup_end_to_end"] = whole / rest
    if config.learns:
        summary["transitions"] = learned.transitions
    if skipped:
        summary["skipped"] = skipped
    bits = f"W{config.weight_bits}A{config.activation_bits or ' float'}"
    ways = {"fp": "full precision", "ptq": f"{bits} fixed", "pq": f"{bits} progressive", "pqcad": f"{bits} distilled"}

    def label(row: str) -> str:
        way, _, length = row.partition("_")
        return f"{ways[way]}, {lengths[length]} steps"

    panels = {f"{label(row)}\nFID {fid[row]:.1f}": pixels[:shown] for row, pixels in drawn.items()}
    panels[f"{label(name)}, unet.pte\n{sqnr['pte_images']:.0f} dB SQNR against eager"] = pte_full
    save_samples(panels, out / "samples.png")
    write_json(out / "summary.json", summary)
    with tempfile.TemporaryDirectory() as scratch:
        learning = Path(scratch) / "learning.png" if config.learns else None
        if learning is not None:
            save_learning([asdict(update) for update in learned.log], learned.transitions, learning)
        write_html(out / "report.html", summary, resolved.to_list(), [out / "samples.png"], learning)
    say("\n" + text_report(summary) + f"\n\narithmetic: {summary['arithmetic']}")
    say(f"\n{sum(stages.seconds.values()):.0f} s. Open {out / 'report.html'}")
    return summary


def load_step(path: Path) -> Callable[[list[Tensor]], Any]:
    """The ``forward`` of a .pte in ExecuTorch's Python runtime."""
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path).load_method("forward").execute


@contextmanager
def exporting(model: Path, pte: Path, *options: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """``pqcad export`` in a process of its own, for lowering is Python on one core; yields what waits for its result.

    Raises (from the call):
        RuntimeError: the export failed; with what it said.
    """
    result = pte.with_suffix(".json")
    command = ["export", "--model", str(model), "--out", str(pte), "--json", str(result), *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "pqcad_ao.cli", *command, "--threads", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def finish() -> dict[str, Any]:
        _, complaint = process.communicate()
        if process.returncode:
            raise RuntimeError(f"pqcad {shlex.join(command)} failed: {complaint.strip()}")
        values = json.loads(result.read_text())
        result.unlink()
        return values

    try:
        yield finish
    finally:
        process.kill()
        process.wait()


def build(forms: Mapping[str, Callable[[], Callable[[], Any]]]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Each form compiled and called once, and why a form could not be."""
    calls, skipped = {}, {}
    for name, make in forms.items():
        try:
            call = make()
            with torch.no_grad():
                call()
            calls[name] = call
        except torch._dynamo.exc.TorchDynamoException as error:  # Inductor without a C++ compiler, say
            skipped[f"latency_ms.{name}"] = str(error).strip().splitlines()[0]
    return calls, skipped
