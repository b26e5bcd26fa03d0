"""How good the pictures are, row by row: FID, KID, precision and recall of full precision and of every way to quantize.

One sampler, one feature pipeline, the same noise for every row of a seed. Each row is learned and sampled once for a
seed and kept under the work folder, so that a run that was cut short goes on and another one can add rows.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import hypot
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor, nn

from pqcad_ao.bench.machine import check_device, cpu, describe, peak_rss_bytes, reset_peak_rss
from pqcad_ao.calibration import digest, settings_of
from pqcad_ao.capture import placement, sample_shape
from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.data import to_uint8
from pqcad_ao.distill import check_distillation, distill_
from pqcad_ao.evaluate import RealFeatures, embedded_features, image_quality, trajectory_sqnr
from pqcad_ao.models import load_model, save_model
from pqcad_ao.quantize import plan, quantize_
from pqcad_ao.report import save_samples, write_json
from pqcad_ao.sampling import sample
from pqcad_ao.serialization import quantized_state

BATCH = 32  # more do not stay in the cache, and take longer for each image
TRAJECTORIES = 16  # images whose trajectories carry the SQNR
BOOTSTRAP = 200
DRAWN = 16  # images of each row that are kept, for --grid
METHOD = 2  # of learning and sampling; counted up where what an older one left in a work folder no longer compares


@dataclass(frozen=True)
class Row:
    """How a row's network is made.

    Attributes:
        options: of :class:`PQCADConfig`; None: nothing is quantized in this row. preset: of its presets, the one meant.
        cad: options of :class:`CADConfig`, the distillation that follows; None: none.
        base: the row whose network this one starts from, with that one's sampler; None: the teacher.
        part: the row is sampled in this part of the steps: 1, 2 (half) or 4.
    """

    title: str
    options: dict[str, Any] | None = field(default_factory=dict)
    preset: str | None = None
    cad: dict[str, Any] | None = None
    base: str | None = None
    part: int = 1

    def config(self, seed: int, extra: dict[str, Any] | None = None) -> PQCADConfig | None:
        if self.options is None:
            return None
        make = getattr(PQCADConfig, self.preset) if self.preset else PQCADConfig
        return make(seed=seed, **{**self.options, **(extra or {})})


def _distilled(title: str, base: str = "pq_full", part: int = 2, **cad: Any) -> Row:
    return Row(title, None, cad=cad, base=base, part=part)


ROWS = {
    "fp_full": Row("full precision", None),
    "ptq_full": Row("fixed W4A4, nothing learned", {"mode": "ptq"}),
    "fixed_full": Row("fixed W4A4, learned", {"mode": "fixed"}),
    "pq_full": Row("progressive W4A4"),
    "pq_fast": Row("progressive W4A4, fast preset", preset="fast"),
    "pq_paper": Row("progressive W4A4, paper preset", preset="paper"),
    "pq_schedule": Row("progressive W4A4, fixed schedule", {"transitions": "schedule"}),
    "pq_normal": Row("progressive W4A4, normal C_QC", {"calibration_timesteps": "normal"}),
    "pq_w4a6": Row("progressive W4A6", {"activation_bits": 6}),
    "pq_w4a8": Row("progressive W4A8", {"activation_bits": 8}),
    "pq_w3a8": Row("progressive W3A8", {"weight_bits": 3, "activation_bits": 8}),
    "pq_w3a4": Row("progressive W3A4", {"weight_bits": 3}),
    "fp_half": Row("full precision, half the steps", None, part=2),
    "pq_half": Row("progressive W4A4, half the steps", None, base="pq_full", part=2),
    "pqcad_half": _distilled("W4A4, distilled to half the steps"),
    "pqcad_quarter": _distilled("W4A4, distilled to a quarter of the steps", part=4, halvings=2),
    "pqcad_half_w4a6": _distilled("W4A6, distilled to half the steps", base="pq_w4a6"),
}
# What each part of distillation adds. All take the same number of updates.
ABLATIONS = {
    "cad_teacher": _distilled("W4A4 distilled: quantized teacher alone", teacher_weight=1.0, reference_weight=0.0),
    "cad_both": _distilled("W4A4 distilled: quantized teacher and reference", teacher_weight=0.5, reference_weight=0.5),
    "cad_inject": _distilled("W4A4 distilled: noise injected", noise_injection=0.05),
    "cad_own": _distilled("W4A4 distilled: a quarter from its own trajectories", own_share=0.25),
    "cad_x": _distilled("W4A4 distilled: x-space, truncated SNR", space="x"),
    "cad_from_fixed": _distilled("W4A4 distilled, from fixed-bit learning", base="fixed_full"),
    "cad_from_ptq": _distilled("W4A4 distilled, nothing learned before", base="ptq_full"),
    "cad_joint": _distilled("W4A4 quantized and distilled at once, twice the updates", base="ptq_full", iterations=800),
    "pd_half": _distilled("full precision, distilled to half the steps", base="fp_full"),
    "pd_then_q": Row("distilled, then progressive W4A4", base="pd_half", part=2),
}
ROWS |= ABLATIONS
DEFAULT_ROWS = ["fp_full", "ptq_full", "pq_full"]
SETS = {
    "all": [*ROWS],
    "progressive": [
        "fp_full",
        "ptq_full",
        "fixed_full",
        "pq_full",
        "pq_schedule",
        "pq_normal",
        "pq_fast",
        "pq_w4a8",
        "pq_w4a6",
        "pq_w3a8",
        "pq_w3a4",
    ],
    "halving": ["fp_full", *(name for name, row in ROWS.items() if row.part > 1 and name not in ABLATIONS)],
    "ablations": ["fp_full", "pqcad_half", *ABLATIONS],
}


def bench_quality(
    model: str = "demo",
    *,
    rows: list[str] | None = None,
    steps: int = 20,
    n: int = 2000,
    seeds: list[int] | None = None,
    work: str | Path = "quality-work",
    device: torch.device | str = "cpu",
    threads: int | None = None,
    features: tuple[nn.Module, RealFeatures] | None = None,
    options: dict[str, Any] | None = None,
    cad_options: dict[str, Any] | None = None,
    compiled: bool = False,
    grid: str | Path | None = None,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure rows for seeds.

    Args:
        model: as for :func:`~pqcad_ao.models.load_model`.
        rows: names of ``ROWS``; ``DEFAULT_ROWS`` if None. steps: of the sampler. n: images behind each FID.
        seeds: of learning and of the noise alike; [0] if None.
        work: folder with what every row and seed leaves behind.
        device: where networks learn and sample.
        features: feature network and real statistics; the embedded ones if None.
        options, cad_options: further options of every row's :class:`PQCADConfig` and :class:`CADConfig`.
        compiled: sample through ``torch.compile``, quantized networks with ``backend="pqcad"``: for many images.
        grid: a picture (PNG) to write, with the first images of every row, of the first seed.
        say: receives a line for each result.

    Returns:
        ``rows``, one for each name and seed (name, title, fid, fid_ci, kid, precision, recall, n, steps, seed, sqnr_db,
        the processor and threads that it was sampled on, and what making its network took), and this run's versions,
        threads and processor.

    Raises:
        ValueError: a row that does not exist, sizes out of range, or steps or a scheduler that cannot be distilled.
    """
    rows, seeds = rows or DEFAULT_ROWS, [0] if seeds is None else seeds
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise ValueError(f"rows {', '.join(unknown)}: allowed are {', '.join(ROWS)}")
    if n < 2 or steps < 1 or not seeds:
        raise ValueError(f"n={n}, steps={steps}, seeds={seeds}: allowed are n >= 2, steps >= 1 and at least one seed")
    parts = max(ROWS[name].part for name in rows)
    if steps % parts:
        raise ValueError(f"steps={steps}: these rows take 1/{parts} of them, give a multiple of {parts}")
    if threads is not None:
        torch.set_num_threads(threads)
    network, real = features or embedded_features()
    place = check_device(device)
    teacher, scheduler = load_model(model)
    bench = _Bench(teacher.to(place), scheduler, steps, Path(work), options or {}, cad_options or {}, progress)
    measure = digest(network.state_dict(), real.mean, real.cov)[:8]
    for name in rows:
        if (cad := bench.settings(name, seeds[0])[1]) is not None:  # before hours of work on other rows
            check_distillation(teacher, scheduler, cad)
    found, panels = [], {}
    for seed in seeds:
        for name in rows:
            row = ROWS[name]
            kind = f"steps{steps // row.part}-n{n}{'-compiled' if compiled else ''}-{measure}"
            file = bench.home(name, seed) / f"{kind}.json"
            drawn = file.with_suffix(".safetensors")  # written first
            if file.is_file():
                result = json.loads(file.read_text())
            else:
                unet, sampler, made = bench.network(name, seed)
                images, sqnr = images_of(teacher, unet, sampler, steps // row.part, n, seed, compiled, progress)
                quality = image_quality(images, network, real, seed=seed, bootstrap=BOOTSTRAP)
                result = {
                    "name": name,
                    "title": row.title,
                    **quality,
                    "steps": steps // row.part,
                    "seed": seed,
                    "sampled": "compiled" if compiled else "eager",
                    "cpu": cpu()["name"],
                    "threads": torch.get_num_threads(),
                    "sqnr_db": sqnr if row.part == 1 else None,  # a distilled step is another function by design
                    **made,
                }
                save_file({"images": to_uint8(images[:DRAWN])}, drawn)
                write_json(file, result)
            if seed == seeds[0]:
                panels[f"{row.title}: {steps // row.part} steps, FID {result['fid']:.2f}"] = load_file(drawn)["images"]
            found.append(result)
            say(f"{name} seed {seed}: FID {result['fid']:.3f}, {result['n']} images, {result['steps']} steps")
    if grid is not None:
        save_samples(panels, grid, columns=4, side=2.4, across=5)
    return {"rows": found, "model": model, **describe(torch.get_num_threads())}


@dataclass
class _Bench:
    """The rows' networks, as they were left in their folders or made now."""

    teacher: nn.Module
    scheduler: Any
    steps: int
    work: Path
    options: dict[str, Any]
    cad_options: dict[str, Any]
    progress: bool

    def settings(self, name: str, seed: int) -> tuple[PQCADConfig | None, CADConfig | None]:
        row = ROWS[name]
        # the steps that it will take, or takes since it was distilled
        walked = {"calibration_steps": self.steps // (ROWS[row.base].part if row.base else 1)}
        cad = None if row.cad is None else CADConfig(seed=seed, **{"steps": self.steps, **row.cad, **self.cad_options})
        return row.config(seed, {**walked, **self.options}), cad

    def home(self, name: str, seed: int) -> Path:
        """The folder of a row and seed, named by all that its network depends on."""
        base, settings = ROWS[name].base, self.settings(name, seed)
        key = digest(METHOD, settings[0], settings_of(self.scheduler), self.teacher.state_dict())
        if base is not None:
            key = digest(settings, self.home(base, seed).name)
        return self.work / f"{name}-{key[:8]}-seed{seed}"

    def network(self, name: str, seed: int) -> tuple[nn.Module, Any, dict[str, Any]]:
        """A row's network on the teacher's device, its sampler, and what making it took."""
        row, home, (config, cad) = ROWS[name], self.home(name, seed), self.settings(name, seed)
        home.mkdir(parents=True, exist_ok=True)
        unet, sampler = self.teacher, self.scheduler
        facts: dict[str, Any] = {}
        if row.base is not None:
            unet, sampler, facts = self.network(row.base, seed)
        if config is None and cad is None:
            return unet, sampler, facts
        device, made = placement(self.teacher)[0], home / "made.json"
        if made.is_file():
            unet, sampler = load_model(home / "model")
            return unet.to(device), sampler, json.loads(made.read_text())
        resumed, before = (home / "learning").exists(), facts.get("seconds", 0.0)
        reset_peak_rss()
        unet, begin = copy.deepcopy(unet), time.perf_counter()
        keeps: dict[str, Any] = {"folder": home / "learning", "progress": self.progress}
        if config is not None:
            quantize_(unet, config, scheduler=sampler, **keeps)
        if cad is not None:
            sampler = distill_(unet, self.teacher, sampler, cad, **keeps)
        state = quantized_state(unet)
        updates = (config.iterations if config is not None and config.learns else 0) + (
            cad.iterations * cad.halvings if cad is not None else 0
        )
        facts = {
            # with those of the network it started from; unknown where this process made the last part alone
            "seconds": None if resumed or before is None else before + time.perf_counter() - begin,
            "peak_rss_bytes": peak_rss_bytes(),
            "average_bits": plan(unet).average_bits if state else 32.0,
            "iterations": updates,
            "transitions": state.transitions if state else [],
        }
        save_model(unet, sampler, home / "model")
        write_json(made, facts)
        return unet, sampler, facts


def images_of(
    teacher: nn.Module, unet: nn.Module, scheduler, steps: int, n: int, seed: int, compiled: bool, progress: bool
) -> tuple[Tensor, float | None]:
    """``n`` images of a row's network, and its SQNR against the teacher on trajectories; None for the teacher."""
    shape = sample_shape(teacher)
    device, _ = placement(teacher)
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).to(device)
    runs: Any = unet
    if compiled:
        torch.compiler.reset()  # networks of one class share their code, and so its limit of recompilations
        runs = torch.compile(unet, backend="pqcad" if quantized_state(unet) else "inductor", dynamic=False)
    images = sample(runs, scheduler, noise, steps, batch_size=BATCH, progress=progress).cpu()
    if unet is teacher:
        return images, None
    visited: list[tuple[Tensor, Tensor]] = []
    sample(
        teacher,
        scheduler,
        noise[:TRAJECTORIES],
        steps,
        callback=lambda first, step, t, x_t: visited.append((x_t.clone(), t.to(device))),
    )
    return images, float(trajectory_sqnr(teacher, unet, visited)["sqnr_db"])  # type: ignore[arg-type]


def table(result: dict[str, Any]) -> str:
    """Each row in Markdown: mean ± standard deviation over its seeds; of a single seed, FID with its 95 % interval.

    The ratio is to full precision of the same seed, at all the steps; of a single seed, with the interval that both
    rows' give as if they were independent.
    """
    alike: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        alike.setdefault((row["name"], row["n"]), []).append(row)
    full = {(row["seed"], row["n"]): row for row in result["rows"] if row["name"] == "fp_full"}

    def spread(values: list[float], digits: int, single: float | None = None) -> str:
        if not values:
            return "–"
        around = stdev(values) if len(values) > 1 else single
        return f"{mean(values):.{digits}f}" + (f" ± {around:.{digits}f}" if around is not None else "")

    def of(rows: list[dict[str, Any]], key: str) -> list[float]:
        return [row[key] for row in rows if row.get(key) is not None]

    def over_full(rows: list[dict[str, Any]]) -> str:
        if rows[0]["name"] == "fp_full":
            return "1"
        pairs = [(row, full[row["seed"], row["n"]]) for row in rows if (row["seed"], row["n"]) in full]
        ratios = [row["fid"] / other["fid"] for row, other in pairs]
        parts = [_half_width(one) / one["fid"] for pair in pairs for one in pair]
        return spread(ratios, 2, ratios[0] * hypot(*parts) if len(ratios) == 1 else None)

    lines = [
        (
            rows[0]["title"],
            rows[0]["steps"],
            spread(of(rows, "fid"), 2, _half_width(rows[0])),
            over_full(rows),
            spread(of(rows, "kid"), 3),
            spread(of(rows, "precision"), 3),
            spread(of(rows, "recall"), 3),
            spread(of(rows, "sqnr_db"), 1),
            spread(of(rows, "seconds"), 0),
            len(rows),
        )
        for rows in alike.values()
    ]
    measures = ("FID", "over full precision", "KID", "precision", "recall", "a step, dB", "seconds to make")
    headers = ("row", "steps", *measures, "seeds")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _half_width(row: dict[str, Any]) -> float:
    low, high = row["fid_ci"]
    return (high - low) / 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pqcad bench quality``."""
    parser.add_argument("--model", default="demo", help="demo, or a folder with a diffusers UNet (default: demo)")
    parser.add_argument(
        "--rows",
        type=lambda text: SETS.get(text) or text.split(","),
        metavar="ROW,ROW",
        help=f"{', '.join(SETS)}, or of {', '.join(ROWS)} (default: {','.join(DEFAULT_ROWS)})",
    )
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--n", type=int, default=2000, help="images behind each FID (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="as many seeds, counted from it (default: 1)")
    parser.add_argument(
        "--work", type=Path, default=Path("quality-work"), metavar="DIR", help="(default: quality-work)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=int, help="(default: PyTorch's)")
    parser.add_argument("--compile", action="store_true", help="sample through torch.compile: for many images")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="draw the first images of every row there (PNG)")
    parser.add_argument("--json", metavar="FILE", help="write the result there")


def run(args: argparse.Namespace, progress: bool = False) -> dict[str, Any]:
    """Measure what the parsed options ask for and print the table."""
    result = bench_quality(
        args.model,
        rows=args.rows,
        steps=args.steps,
        n=args.n,
        seeds=[*range(args.seed, args.seed + args.seeds)],
        work=args.work,
        device=args.device,
        threads=args.threads,
        compiled=args.compile,
        grid=args.grid,
        progress=progress,
    )
    print(table(result))
    return result
