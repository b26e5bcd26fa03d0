"""The demo: a teacher goes in; pictures, a compressed model, a ``.pte`` and a summary of measurements come out."""

import copy
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pqcad_ao import ops
from pqcad_ao.bench.compile.contenders import module_bytes
from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.denoiser import sample_shape
from pqcad_ao.diffusion.recording import Recorder
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.diffusion.trajectories import checked_trajectories
from pqcad_ao.distill import check_distillation, distill_
from pqcad_ao.edge.sampler import PTESampler
from pqcad_ao.evaluate.features import RealFeatures, embedded_features, extract_features
from pqcad_ao.evaluate.fid import image_quality
from pqcad_ao.evaluate.sqnr import sqnr_db, trajectory_sqnr
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.state import QuantizedState, quantized_state
from pqcad_ao.ops.cpu import loader
from pqcad_ao.pages.names import LATENCY_NAMES, ROW_NAMES
from pqcad_ao.pages.pictures import save_samples
from pqcad_ao.pages.report import write_report
from pqcad_ao.pages.text import text_report
from pqcad_ao.quantize import quantize_
from pqcad_ao.recipes.forms import compiled_forms, exporting, load_step, median_ms
from pqcad_ao.utils.checks import check_count, check_counts
from pqcad_ao.utils.files import write_json
from pqcad_ao.utils.load import busy
from pqcad_ao.utils.machine import describe
from pqcad_ao.utils.quiet import start_executorch

TRAJECTORY_ROWS = 8  # images whose trajectories carry the SQNR
RESAMPLES = 50  # of the images, behind each FID's interval
UNFINISHED = "unfinished"  # folder within out that keeps what is drawn and learned until all is done


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


@dataclass(frozen=True)
class Row:
    """A network and how it is sampled.

    Attributes:
        name: of ``ROW_NAMES``: the way it was made, and whether it takes all the steps ("full") or half of them.
    """

    name: str
    unet: nn.Module
    scheduler: Any
    steps: int

    @property
    def way(self) -> str:
        return self.name.partition("_")[0]

    @property
    def length(self) -> str:
        return self.name.partition("_")[2]


@dataclass(frozen=True)
class Measured:
    """What saving, exporting and timing the networks gave; keys as in ``summary.json``.

    Attributes:
        pictures: (N, C, H, W) that unet.pte sampled. skipped: what could not be measured, and why.
    """

    bytes: dict[str, int]
    latency_ms: dict[str, float]
    sqnr_db: dict[str, float]
    pte_arithmetic: dict[str, int]
    skipped: dict[str, str]
    pictures: Tensor


def run(
    out: str | Path,
    *,
    model: str = "demo",
    config: PQCADConfig | None = None,
    cad: CADConfig | None = None,
    shipped: str | None = None,
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
        out: folder; receives summary.json, report.html, samples.png, model/ and unet.pte. Where a run was interrupted,
            the same one goes on with what that drew and learned.
        model: as for :func:`~pqcad_ao.models.load_model`.
        config: how to quantize; if None, ``PQCADConfig(mode="ptq", seed=seed)``. Where it learns, there is one more
            row, and the fixed-bit row has the same configuration with ``mode="ptq"``.
        cad: how to distill the quantized network to half the steps; None: not at all.
        shipped: a network that was made of the teacher before and takes half the steps, as for
            :func:`~pqcad_ao.models.load_model`; it is one more row. None: there is none.
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
    start_executorch(torch.get_num_threads())
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = config or PQCADConfig(mode="ptq", seed=seed)
    stages, disturbed = Stages(say), busy()
    if disturbed is not None:
        say(f"note: {disturbed}")
    # the kernels' compiler works while the teacher calibrates; the first quantized layer waits for what is left
    threading.Thread(target=loader.load, daemon=True).start()
    with stages("load the teacher"):
        teacher, scheduler = load_model(model)
        network, real = features or embedded_features()
        noise = torch.randn(images, *sample_shape(teacher), generator=torch.Generator().manual_seed(seed))
        extract_features(noise[:2], network)  # a network for other images is refused now, not after sampling

    rows, result = make_rows(Row("fp_full", teacher, scheduler, steps), config, cad, out / UNFINISHED, stages, progress)
    state = cast(QuantizedState, quantized_state(result.unet))
    say(f"           {state.plan.summary()}")
    if shipped is not None:
        rows.append(Row("shipped_half", *load_model(shipped), steps // 2))
    drawn, visited = draw(rows, noise, batch_size, stages, progress)
    with stages("evaluate: FID, SQNR"):
        quality = {
            name: image_quality(pixels, network, real, seed=seed, bootstrap=RESAMPLES) for name, pixels in drawn.items()
        }
        sqnr = {
            f"{row.way}_step": trajectory_sqnr(teacher, row.unet, visited)["sqnr_db"]
            for row in rows[1:]
            if row.length == "full"
        }
    shown, timestep = min(pictures, images), visited[0][1][0]
    seen = {**quality[result.name], "steps": result.steps}
    measured = measure_forms(rows[0], result, seen, noise[:shown], timestep, out, latency_calls, stages, progress)
    sqnr |= measured.sqnr_db
    sqnr["pte_images"] = sqnr_db(drawn[result.name][:shown], measured.pictures)

    summary: dict[str, Any] = {
        "steps": {row.length: row.steps for row in rows},
        "fid": {name: found["fid"] for name, found in quality.items()},
        "fid_ci": {name: found["fid_ci"] for name, found in quality.items()},
        "precision": {name: found["precision"] for name, found in quality.items()},
        "recall": {name: found["recall"] for name, found in quality.items()},
        "fid_n": images,
        "bytes": measured.bytes,
        "latency_ms": measured.latency_ms,
        "latency_batch": 1,
        "sqnr_db": sqnr,
        "arithmetic": ops.arithmetic(),
        "pte_arithmetic": measured.pte_arithmetic,
        "plan_summary": state.plan.summary(),
        "model": str(model),
        "seed": seed,
        "command": command or shlex.join(sys.argv),
        **describe(torch.get_num_threads()),
        "stages_s": stages.seconds,
    }
    summary |= _speedup(summary)
    if config.learns:
        summary["transitions"] = state.transitions
    if disturbed is not None:
        summary["busy"] = disturbed
    if measured.skipped:
        summary["skipped"] = measured.skipped
    panels = labelled_panels(rows, result, drawn, measured.pictures, summary, config)
    labels = dict(zip([row.name for row in rows], panels, strict=False))
    beside = [labels[name] for name in ("fp_full", "shipped_half", result.name) if name in labels]
    write_results(out, summary, panels, state, beside)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    say("\n" + text_report(summary) + f"\n\narithmetic: {summary['arithmetic']}")
    say(f"\n{sum(stages.seconds.values()):.0f} s. Open {out / 'report.html'}")
    return summary


def make_rows(
    full: Row, config: PQCADConfig, cad: CADConfig | None, folder: Path, stages: Stages, progress: bool
) -> tuple[list[Row], Row]:
    """Quantize the teacher, learn, and distill it.

    Args:
        full: the teacher's row. folder: keeps what is done, for a run that was interrupted to go on.

    Returns:
        the rows in the tables' order, the teacher's first, and the one of the model that is saved.
    """
    teacher, scheduler, half = full.unet, full.scheduler, full.steps // 2
    kept: dict[str, Any] = {"folder": folder, "progress": progress}
    if cad is not None:  # first: it finds out what cannot be distilled
        with stages(f"draw {cad.points} pictures to distill from"):
            ddim, _ = check_distillation(teacher, scheduler, cad)
            checked_trajectories(teacher, ddim, sample_shape(teacher), cad, None, images=None, callback=None, **kept)
    with stages("fixed bits: calibrate on the teacher's own trajectories"):
        calibrated = replace(full, name="ptq_full", unet=copy.deepcopy(teacher))
        quantize_(calibrated.unet, replace(config, mode="ptq"), scheduler=scheduler, **kept)
    quantized = [calibrated]
    if config.learns:
        with stages(f"progressive: learn on more of its trajectories, {config.iterations} updates"):
            learned = replace(full, name="pq_full", unet=copy.deepcopy(teacher))
            quantize_(learned.unet, config, scheduler=scheduler, **kept)
        quantized.append(learned)
    best = quantized[-1]
    if cad is None:
        halved = [] if full.steps % 2 else [replace(best, name=f"{best.way}_half", steps=half)]
        return [full, *quantized, *halved], best
    with stages(f"distill to {half} steps, {cad.iterations} updates"):
        student = copy.deepcopy(best.unet)
        sampler = distill_(student, teacher, scheduler, cad, **kept)
    distilled = Row("pqcad_half", student, sampler, half)
    # both kinds of full precision first
    return [full, replace(full, name="fp_half", steps=half), *quantized, distilled], distilled


def draw(
    rows: list[Row], noise: Tensor, batch_size: int, stages: Stages, progress: bool
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Each row's images of the same noise, by its name, and what full precision met on its first trajectories."""
    recorder = Recorder(rows[0].unet, most=rows[0].steps)  # the first batch of images
    drawn: dict[str, Tensor] = {}
    for row in rows:
        unet = recorder if row is rows[0] else row.unet
        with stages(f"sample {len(noise)} images in {row.steps} steps: {ROW_NAMES[row.name]}"):
            drawn[row.name] = sample(unet, row.scheduler, noise, row.steps, batch_size=batch_size, progress=progress)
    return drawn, [(call.x_t[:TRAJECTORY_ROWS], call.timesteps[:TRAJECTORY_ROWS]) for call in recorder.calls]


def measure_forms(
    full: Row,
    result: Row,
    quality: dict[str, Any],
    noise: Tensor,
    timestep: Tensor,
    out: Path,
    calls: int,
    stages: Stages,
    progress: bool,
) -> Measured:
    """Save, export and compile the teacher and the result, sample ``noise`` with unet.pte, and time a step of each.

    Args:
        quality: of the result's pictures, for its card.
        timestep: of the timed steps, at ``noise[:1]``. out: receives model/ and unet.pte. calls: behind each median.
    """
    x_t, pte = noise[:1], out / "unet.pte"
    with tempfile.TemporaryDirectory() as scratch:
        fp32_model, fp32_pte = Path(scratch) / "model", Path(scratch) / "fp32.pte"
        with stages("save both models"):
            fp32_checkpoint = save_model(full.unet, full.scheduler, fp32_model).stat().st_size
            saved = save_model(result.unet, result.scheduler, out / "model", quality=quality)
            checkpoint = saved.stat().st_size
        with (
            stages("export unet.pte and its fp32 counterpart in processes of their own; meanwhile torch.compile"),
            exporting(fp32_model, fp32_pte, "--full-precision") as finish_fp32,
            exporting(out / "model", pte, "--steps", str(result.steps)) as finish,
        ):
            forms, skipped = compiled_forms(full.unet, result.unet, x_t, timestep)
            fp32_exported, exported = finish_fp32(), finish()
        with stages(f"sample {len(noise)} images with unet.pte"):
            sampler = PTESampler(pte)
            pictures = sampler.sample(noise, progress=progress)
        forms["fp32_eager"] = partial(full.unet, x_t, timestep)
        forms["pte_fp32"] = partial(load_step(fp32_pte), [x_t, timestep.reshape(1)])
        forms["pte"] = partial(sampler.predict, x_t, 0)
        with stages("time one step of each"):
            latency = {name: median_ms(forms[name], calls) for name in LATENCY_NAMES if name in forms}
    sizes = {
        "fp32_checkpoint": fp32_checkpoint,
        "checkpoint": checkpoint,
        "fp32_pte": fp32_exported["bytes"],
        "pte": exported["bytes"],
        "resident_weights": module_bytes(result.unet),
    }
    arithmetic = dict(Counter(exported["arithmetic"].values()).most_common())
    worst = {"pte_vs_eager": min(exported["sqnr_db"].values())}
    return Measured(sizes, latency, worst, arithmetic, skipped, pictures)


def _speedup(summary: dict[str, Any]) -> dict[str, float]:
    """``speedup_end_to_end``, where half the steps and both compiled forms were measured."""
    steps, latency = summary["steps"], summary["latency_ms"]
    if "half" not in steps or not {"fp32_compile", "compressed_compile"} <= latency.keys():
        return {}
    whole, rest = latency["fp32_compile"] * steps["full"], latency["compressed_compile"] * steps["half"]
    return {"speedup_end_to_end": whole / rest}


def labelled_panels(
    rows: list[Row],
    result: Row,
    drawn: dict[str, Tensor],
    pte_pictures: Tensor,
    summary: dict[str, Any],
    config: PQCADConfig,
) -> dict[str, Tensor]:
    """As many pictures of every row as unet.pte sampled, and those, each under what it is and how good it is."""
    bits = f"W{config.weight_bits}A{config.activation_bits or ' float'}"
    ways = {"fp": "full precision", "ptq": f"{bits} fixed", "pq": f"{bits} progressive", "pqcad": f"{bits} distilled"}
    ways["shipped"] = "default recipe"

    def label(row: Row) -> str:
        return f"{ways[row.way]}, {row.steps} steps"

    fid, intervals, sqnr_db = summary["fid"], summary["fid_ci"], summary["sqnr_db"]["pte_images"]

    def said(name: str) -> str:
        return "FID {:.1f} ({:.1f} to {:.1f})".format(fid[name], *intervals[name])

    panels = {f"{label(row)}\n{said(row.name)}": drawn[row.name][: len(pte_pictures)] for row in rows}
    panels[f"{label(result)}, unet.pte\n{sqnr_db:.0f} dB SQNR against eager"] = pte_pictures
    return panels


def write_results(
    out: Path, summary: dict[str, Any], panels: dict[str, Tensor], state: QuantizedState, shown: list[str]
) -> None:
    """Write samples.png, summary.json and report.html, in which the panels ``shown`` stand side by side."""
    save_samples(panels, out / "samples.png")
    write_json(out / "summary.json", summary)
    log = [asdict(update) for update in state.log]
    result = {**summary, "plan": state.plan.to_list()}
    write_report(out / "report.html", result, pictures=panels, shown=shown, log=log)
