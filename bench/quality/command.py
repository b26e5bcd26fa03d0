"""The options of ``pqcad bench quality``, what they run, and its table."""

import json
from collections.abc import Sequence
from math import hypot
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token
from tabulate import tabulate

from pqcad_ao.bench.quality.rows import DEFAULT_ROWS, ROWS, SETS
from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.utils.options import COMMON, NONE_GIVEN, WRITTEN, Device, Flag, Shared, Whole, options, resumable

if TYPE_CHECKING:
    Quantizing = dict[str, Any]
    Distilling = dict[str, Any]
else:  # made at run time, where no type checker looks
    Quantizing = options(PQCADConfig, "Every row that quantizes (PQCADConfig)", **WRITTEN)
    Distilling = options(CADConfig, "Every row that distills (CADConfig)")


def _rows(_: Any, tokens: Sequence[Token]) -> list[str]:
    return SETS.get(tokens[0].value) or tokens[0].value.split(",")


Rows = Annotated[
    list[str] | None,
    Parameter(
        converter=_rows,
        n_tokens=1,
        help=f"{', '.join(SETS)}, or of {', '.join(ROWS)}, with commas between [default: {','.join(DEFAULT_ROWS)}]",
    ),
]


def table(result: dict[str, Any]) -> str:
    """Each row in Markdown: mean ± standard deviation over its seeds; of a single seed, FID with its 95 % interval.

    Ratios are to full precision of the same seed, at all the steps; of a single seed, FID's with the interval that both
    rows' give as if they were independent. That of the power is for each band, from coarse to fine.
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

    def with_full(rows: list[dict[str, Any]], key: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        pairs = [(row, full[row["seed"], row["n"]]) for row in rows if (row["seed"], row["n"]) in full]
        return [pair for pair in pairs if all(key in one for one in pair)]

    def power_over_full(rows: list[dict[str, Any]]) -> str:
        powers = [zip(one["power"], other["power"], strict=True) for one, other in with_full(rows, "power")]
        bands = [[ours / full for ours, full in band if full] for band in zip(*powers, strict=True)]
        return " ".join(f"{mean(ratios):.2f}" if ratios else "–" for ratios in bands) or "–"

    def over_full(rows: list[dict[str, Any]]) -> str:
        if rows[0]["name"] == "fp_full":
            return "1"
        pairs = with_full(rows, "fid")
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
            power_over_full(rows),
            spread(of(rows, "sqnr_db"), 1),
            spread(of(rows, "seconds"), 0),
            spread([100 * share for share in of(rows, "trained_share")], 0),
            spread([size / 2**20 for size in of(rows, "adam_bytes")], 1),
            spread(of(rows, "gmacs_per_step"), 3),
            len(rows),
        )
        for rows in alike.values()
    ]
    measures = ("FID", "over full precision", "KID", "precision", "recall", "power by band", "a step, dB")
    costs = ("seconds to make", "% learned", "Adam, MiB", "GMAC a step")
    headers = ("row", "steps", *measures, *costs, "seeds")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _half_width(row: dict[str, Any]) -> float:
    low, high = row["fid_ci"]
    return (high - low) / 2


def bench_quality(
    *,
    model: str = "demo",
    rows: Rows = None,
    steps: Whole = 20,
    n: Whole = 2000,
    seeds: Whole = 1,
    work: Path = Path("quality-work"),
    device: Device = "cpu",
    features: Path | None = None,
    compile: Flag = False,
    grid: Path | None = None,
    lines: Flag = False,
    pq: Quantizing = NONE_GIVEN,
    cad: Distilling = NONE_GIVEN,
    common: Shared = COMMON,
) -> dict[str, Any]:
    """FID, KID, precision and recall of every way to quantize.

    For example, three rows; and what distillation adds, over three seeds, with fewer updates:
        pqcad bench quality --rows fp_full,ptq_full,pqcad_half
        pqcad bench quality --rows halving --seeds 3 --compile --pq.iterations 100

    Args:
        model: demo, or a folder with a diffusers UNet.
        steps: of the sampler.
        n: images behind each FID.
        seeds: as many, counted from --seed.
        work: folder that keeps what was made; the same command goes on where it was killed.
        features: folder that pqcad_ao.recipes.train_classifier wrote, for pictures of other kinds than the embedded
            feature network's.
        compile: sample through torch.compile: for many images.
        grid: a picture (PNG) that receives the first images of every row.
        lines: print each row as a line of JSON in place of the table.
    """
    from pqcad_ao.bench.quality import measure
    from pqcad_ao.evaluate.features import features_in
    from pqcad_ao.pages.pictures import save_samples

    with resumable(work):
        result = measure.bench_quality(
            model,
            rows=rows,
            steps=steps,
            n=n,
            seeds=[*range(common.seed, common.seed + seeds)],
            work=work,
            device=device,
            options=pq,
            cad_options=cad,
            threads=common.threads,
            features=None if features is None else features_in(features),
            compiled=compile,
            progress=True,
            say=(lambda line: None) if lines else print,
        )
    if grid is not None:
        save_samples(result["pictures"], grid, columns=4, side=2.4, across=5)
    print("\n".join(map(json.dumps, result["rows"])) if lines else table(result))
    return result
