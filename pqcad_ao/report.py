"""Pictures, JSON and tables for a terminal, made from tensors and plain dictionaries; no model code in here."""

import json
import math
import textwrap
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

from pqcad_ao.pages.names import BYTE_NAMES, LATENCY_NAMES, ROW_NAMES, SQNR_NAMES
from pqcad_ao.pages.pictures import as_image, grid
from pqcad_ao.utils.files import whole_file, write_whole

LETTERS = 12  # of a panel's label to an inch


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity replaced by None, which JSON can hold."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, values: dict[str, Any]) -> None:
    """Write strict JSON (infinities become null), making the folder if it is not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(finite(values), indent=2, allow_nan=False) + "\n").encode())


def save_grid(images: Tensor, path: str | Path, columns: int = 8) -> None:
    """Write the :func:`~pqcad_ao.pages.pictures.grid` of (N, C, H, W) images; the suffix says the format."""
    picture = as_image(grid(images, columns))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(Path(path)) as unfinished:
        picture.save(unfinished)


def save_samples(
    panels: dict[str, Tensor],
    path: str | Path,
    *,
    columns: int = 8,
    side: float = 4.2,
    across: int = 8,
) -> None:
    """Draw grids of images side by side, each under its label; the same place in each is the same seed.

    Args:
        panels: label to (N, C, H, W) images (as for :func:`~pqcad_ao.pages.pictures.grid`), as many in each.
        columns: images in a row of a grid. side: width of a grid in inches. across: grids side by side, at most.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    pictures = {label: grid(images, columns) for label, images in panels.items()}
    _, height, width = next(iter(pictures.values())).shape
    across = min(across, len(pictures))
    down = math.ceil(len(pictures) / across)
    figure = Figure(figsize=(side * across, (side * height / width + 0.8) * down), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [*figure.subplots(down, across, squeeze=False).flat]
    for axis in axes:
        axis.axis("off")
    for axis, (label, picture) in zip(axes, pictures.items(), strict=False):
        array = picture.permute(1, 2, 0).numpy()
        axis.imshow(array.repeat(3, 2) if array.shape[2] == 1 else array, interpolation="nearest")
        axis.set_title(textwrap.fill(label, round(side * LETTERS)), fontsize=10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(Path(path)) as unfinished:
        figure.savefig(unfinished, dpi=150, bbox_inches="tight", pad_inches=0.05)


def quality_table(summary: dict[str, Any]) -> list[list[Any]]:
    """Rows: name, steps, FID, its interval, images."""
    steps = summary["steps"]
    return [
        [
            ROW_NAMES.get(name, name),
            steps.get(name.rpartition("_")[2], ""),
            f"{fid:.2f}",
            "{:.2f} to {:.2f}".format(*summary["fid_ci"][name]),
            summary["fid_n"],
        ]
        for name, fid in summary["fid"].items()
    ]


def bytes_table(summary: dict[str, Any]) -> list[list[Any]]:
    """Rows: name, bytes, and the part of the fp32 form of the same thing where there is one."""
    sizes = summary["bytes"]
    whole = {"checkpoint": "fp32_checkpoint", "pte": "fp32_pte", "resident_weights": "fp32_checkpoint"}
    rows = []
    for name, size in sizes.items():
        full = sizes.get(whole.get(name, ""))
        rows.append([BYTE_NAMES.get(name, name), f"{size:,}", f"1/{full / size:.1f}" if full else ""])
    return rows


def latency_table(summary: dict[str, Any]) -> list[list[Any]]:
    """Rows: name, milliseconds."""
    return [[LATENCY_NAMES.get(name, name), f"{value:.2f}"] for name, value in summary["latency_ms"].items()]


def sqnr_table(summary: dict[str, Any]) -> list[list[Any]]:
    """Rows: what is compared, decibels."""
    return [
        [SQNR_NAMES.get(name, name), f"{value:.1f}" if math.isfinite(value) else "equal"]
        for name, value in summary["sqnr_db"].items()
    ]


def text_report(summary: dict[str, Any]) -> str:
    """The measured tables for a terminal."""
    tables = [
        (quality_table(summary), ("quality", "steps", "FID", "95 %", "images")),
        (bytes_table(summary), ("size", "bytes", "of fp32")),
        (latency_table(summary), (_latency_heading(summary), "ms")),
        (sqnr_table(summary), ("SQNR", "dB")),
    ]
    text = "\n\n".join(
        tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))
        for rows, headers in tables
    )
    return "\n\n".join([text, *end_to_end(summary)])


def end_to_end(summary: dict[str, Any]) -> list[str]:
    """What half the steps on the compiled kernels bring, in a sentence; nothing where that was not measured."""
    if "speedup_end_to_end" not in summary:
        return []
    steps = summary["steps"]
    return [
        f"end to end: {steps['half']} compressed steps take 1/{summary['speedup_end_to_end']:.2f} of {steps['full']} "
        "steps of torch.compile in fp32; the quality of both is above"
    ]


def _latency_heading(summary: dict[str, Any]) -> str:
    threads = summary["threads"]
    return f"one UNet step, batch {summary['latency_batch']}, {threads} thread{'s' if threads > 1 else ''}, median"
