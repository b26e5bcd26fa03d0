"""The options of ``pqcad bench edge``, what they run, and its table."""

import argparse
from typing import Any

from tabulate import tabulate

from pqcad_ao.bench.edge.contenders import ROWS
from pqcad_ao.bench.edge.costs import measure_costs
from pqcad_ao.bench.edge.measure import bench_edge


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
