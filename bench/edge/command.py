"""The options of ``pqcad bench edge``, what they run, and its table."""

from pathlib import Path
from typing import Any

from tabulate import tabulate

from pqcad_ao.utils.load import felt
from pqcad_ao.utils.options import COMMON, Names, Shared, Whole


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
    if felt(others := result.get("others_cores") or 0.0):
        text += f"\nthe machine was not idle, each time again: other programs kept {others:.1f} cores busy meanwhile"
    if "eager" in result:
        text += "\n" + ", ".join(f"{kind}: FID {value:.3f}" for kind, value in result["eager"].items())
    return text


def bench_edge(
    *,
    model: str = "demo",
    compressed: str | None = None,
    rows: Names | None = None,
    steps: Whole = 20,
    rounds: Whole = 25,
    n: Whole = 0,
    costs: Path | None = None,
    common: Shared = COMMON,
) -> dict[str, Any]:
    """One sampling step as a .pte on ExecuTorch's stock runtime.

    For example, every row of a network of the usual size, and with the pictures' FID:
        pqcad bench edge --model ddpm-cifar10
        pqcad bench edge --rows pqcad_speed --n 5000

    Args:
        model: demo, ddpm-cifar10, or a folder with a diffusers UNet.
        compressed: a folder with the same network quantized; quantized here, fixed-bit, if not given.
        rows: names with commas between; all if not given. A name that is not there is answered with those that are.
        steps: of the schedule.
        rounds: timed calls of each file.
        n: images for the FID, through each file and in eager mode.
        costs: a file that receives what the planner goes by, measured on this processor instead.
    """
    from pqcad_ao.bench.edge import measure
    from pqcad_ao.bench.edge.costs import measure_costs

    if costs:
        result = measure_costs(costs, rounds)
        print(tabulate([row.values() for row in result["layers"]], list(result["layers"][0])))
        return result
    result = measure.bench_edge(
        model,
        compressed=compressed,
        rows=rows,
        steps=steps,
        rounds=rounds,
        n=n,
        threads=common.threads,
        seed=common.seed,
        json_path=common.json,
    )
    print(table(result))
    return result
