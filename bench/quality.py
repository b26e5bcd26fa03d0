"""How good the pictures are, row by row: FID and KID of full precision and of every way to quantize, side by side.

One sampler, one feature pipeline, the same noise for every row of a seed. Each row is learned and sampled once for a
seed and kept under the work folder, so that a run that was cut short goes on and another one can add rows.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from pqcad_ao.bench.machine import check_device, describe, peak_rss_bytes
from pqcad_ao.calibration import digest
from pqcad_ao.capture import placement, sample_shape
from pqcad_ao.config import PQCADConfig
from pqcad_ao.evaluate import RealFeatures, embedded_features, fid_kid, trajectory_sqnr
from pqcad_ao.models import load_model, save_model
from pqcad_ao.quantize import plan, quantize_
from pqcad_ao.report import write_json
from pqcad_ao.sampling import sample
from pqcad_ao.serialization import quantized_state

BATCH = 32  # more do not stay in the cache, and take longer for each image
TRAJECTORIES = 16  # images whose trajectories carry the SQNR
BOOTSTRAP = 200


@dataclass(frozen=True)
class Row:
    """What a row is: options of :class:`PQCADConfig`, or None for full precision."""

    title: str
    options: dict[str, Any] | None = field(default_factory=dict)
    fast: bool = False

    def config(self, seed: int) -> PQCADConfig | None:
        if self.options is None:
            return None
        return (PQCADConfig.fast if self.fast else PQCADConfig)(seed=seed, **self.options)


ROWS = {
    "fp_full": Row("full precision", None),
    "ptq_full": Row("fixed W4A4, nothing learned", {"mode": "ptq"}),
    "fixed_full": Row("fixed W4A4, learned", {"mode": "fixed"}),
    "pq_full": Row("progressive W4A4"),
    "pq_fast": Row("progressive W4A4, fast preset", fast=True),
    "pq_schedule": Row("progressive W4A4, fixed schedule", {"transitions": "schedule"}),
    "pq_normal": Row("progressive W4A4, normal C_QC", {"calibration_timesteps": "normal"}),
    "pq_uniform": Row("progressive W4A4, uniform C_QC", {"calibration_timesteps": "uniform"}),
    "pq_w4a8": Row("progressive W4A8", {"activation_bits": 8}),
    "pq_w3a8": Row("progressive W3A8", {"weight_bits": 3, "activation_bits": 8}),
    "pq_w3a4": Row("progressive W3A4", {"weight_bits": 3}),
}
DEFAULT_ROWS = ["fp_full", "ptq_full", "pq_full"]


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
        options: further options of every row's :class:`PQCADConfig`.
        say: receives a line for each result.

    Returns:
        ``rows``, one for each name and seed (name, title, fid, fid_ci, kid, n, steps, seed, sqnr_db, and what making
        its network took), and the versions, threads and CPU behind them.

    Raises:
        ValueError: a row that does not exist, or sizes out of range.
    """
    rows, seeds = rows or DEFAULT_ROWS, [0] if seeds is None else seeds
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise ValueError(f"rows {', '.join(unknown)}: allowed are {', '.join(ROWS)}")
    if n < 2 or steps < 1 or not seeds:
        raise ValueError(f"n={n}, steps={steps}, seeds={seeds}: allowed are n >= 2, steps >= 1 and at least one seed")
    if threads is not None:
        torch.set_num_threads(threads)
    network, real = features or embedded_features()
    place = check_device(device)
    teacher, scheduler = load_model(model)
    teacher = teacher.to(place)
    found = []
    for seed in seeds:
        for name in rows:
            row = ROWS[name]
            config = row.config(seed)
            if config is not None and options:
                config = type(config)(**{**vars(config), **options})
            home = Path(work) / f"{name}-{digest(config, teacher.state_dict())[:8]}-seed{seed}"
            file = home / f"steps{steps}-n{n}.json"
            if file.is_file():
                result = json.loads(file.read_text())
            else:
                home.mkdir(parents=True, exist_ok=True)
                unet, made = quantized(teacher, scheduler, config, home, progress)
                images, sqnr = pictures(teacher, unet.to(place), scheduler, steps, n, seed, progress)
                quality = fid_kid(images, network, real, seed=seed, bootstrap=BOOTSTRAP)
                result = {
                    "name": name,
                    "title": row.title,
                    **quality,
                    "steps": steps,
                    "seed": seed,
                    "sqnr_db": sqnr,
                    **made,
                }
                write_json(file, result)
            found.append(result)
            say(f"{name} seed {seed}: FID {result['fid']:.3f}, {result['n']} images, {steps} steps")
    return {"rows": found, "model": model, **describe(torch.get_num_threads())}


def quantized(
    teacher: nn.Module, scheduler, config: PQCADConfig | None, home: Path, progress: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """A row's network, as it was left in its folder or made now, and what making it took."""
    if config is None:
        return teacher, {}
    made = home / "made.json"
    if made.is_file():
        return load_model(str(home / "model"))[0], json.loads(made.read_text())
    unet, begin = copy.deepcopy(teacher), time.perf_counter()
    quantize_(unet, config, scheduler=scheduler, folder=home / "learning", progress=progress)
    state = quantized_state(unet)
    facts = {
        "seconds": time.perf_counter() - begin,
        "peak_rss_bytes": peak_rss_bytes(),
        "average_bits": plan(unet).average_bits,
        "iterations": config.iterations if config.learns else 0,
        "transitions": state.transitions if state else [],
    }
    save_model(unet, scheduler, home / "model")
    write_json(made, facts)
    return unet, facts


def pictures(
    teacher: nn.Module, unet: nn.Module, scheduler, steps: int, n: int, seed: int, progress: bool
) -> tuple[Tensor, float | None]:
    """``n`` images of a row's network, and its SQNR against the teacher on trajectories; None for the teacher."""
    shape = sample_shape(teacher)
    device, _ = placement(teacher)
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).to(device)
    images = sample(unet, scheduler, noise, steps, batch_size=BATCH, progress=progress).cpu()
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
    """Each row's mean ± standard deviation over its seeds, in Markdown."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by_name.setdefault(row["name"], []).append(row)

    def spread(rows: list[dict[str, Any]], key: str, digits: int) -> str:
        values = [row[key] for row in rows if row.get(key) is not None]
        if not values:
            return "–"
        return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

    lines = [
        (
            rows[0]["title"],
            spread(rows, "fid", 3),
            spread([{"kid": 1000 * row["kid"]} for row in rows if row["kid"] is not None], "kid", 3),
            spread(rows, "sqnr_db", 1),
            spread(rows, "seconds", 0),
            len(rows),
        )
        for rows in by_name.values()
    ]
    headers = ("row", "FID", "1000 · KID", "SQNR of a step, dB", "seconds to make", "seeds")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pqcad bench quality``."""
    parser.add_argument("--model", default="demo", help="demo, or a folder with a diffusers UNet (default: demo)")
    parser.add_argument(
        "--rows",
        type=lambda text: [*ROWS] if text == "all" else text.split(","),
        metavar="ROW,ROW",
        help=f"all, or of {', '.join(ROWS)} (default: {','.join(DEFAULT_ROWS)})",
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
        progress=progress,
    )
    print(table(result))
    return result
