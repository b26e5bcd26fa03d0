"""The options of ``pqcad bench quality``, what they run, and its table."""

import argparse
import json
import sys
from math import hypot
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tabulate import tabulate

from pqcad_ao.bench.quality.measure import bench_quality
from pqcad_ao.bench.quality.rows import DEFAULT_ROWS, ROWS, SETS
from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.utils.options import read_options


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
    parser.add_argument(
        "--pq", nargs="*", default=[], metavar="NAME=VALUE", help="of PQCADConfig, in every row that quantizes"
    )
    parser.add_argument(
        "--cad", nargs="*", default=[], metavar="NAME=VALUE", help="of CADConfig, in every row that distills"
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
    parser.add_argument("--lines", action="store_true", help="print each row as a line of JSON in place of the table")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the parsed options ask for and print the table, or the rows."""
    result = bench_quality(
        args.model,
        rows=args.rows,
        steps=args.steps,
        n=args.n,
        seeds=[*range(args.seed, args.seed + args.seeds)],
        work=args.work,
        device=args.device,
        options=read_options(PQCADConfig, args.pq),
        cad_options=read_options(CADConfig, args.cad),
        threads=args.threads,
        compiled=args.compile,
        grid=args.grid,
        progress=sys.stderr.isatty(),
        say=(lambda line: None) if args.lines else print,
    )
    print("\n".join(map(json.dumps, result["rows"])) if args.lines else table(result))
    return result
