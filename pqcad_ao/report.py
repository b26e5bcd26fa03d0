"""Pictures, JSON and the HTML report, made from tensors and plain dictionaries; no model code in here."""

import base64
import html
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor

from pqcad_ao.data import to_uint8
from pqcad_ao.utils.files import whole_file, write_whole

ROW_NAMES = {
    "fp_full": "full precision (fp32)",
    "fp_half": "full precision (fp32), half the steps",
    "ptq_full": "quantized, fixed-bit calibration",
    "pq_full": "quantized, progressive",
    "ptq_half": "quantized, fixed-bit calibration, half the steps",
    "pq_half": "quantized, progressive, half the steps",
    "pqcad_half": "quantized, distilled to half the steps",
    "shipped_half": "what the default recipe made before, half the steps",
}
BYTE_NAMES = {
    "fp32_checkpoint": "checkpoint, fp32 (safetensors)",
    "checkpoint": "checkpoint, compressed (safetensors)",
    "fp32_pte": "unet.pte, fp32",
    "pte": "unet.pte, compressed",
    "resident_weights": "weights in memory, compressed",
}
LATENCY_NAMES = {
    "fp32_eager": "PyTorch eager, fp32",
    "fp32_compile": "torch.compile, fp32",
    "compressed_compile": "torch.compile, compressed",
    "pte_fp32": "ExecuTorch, fp32",
    "pte": "ExecuTorch, compressed",
}
SQNR_NAMES = {
    "ptq_step": "one step: fixed-bit against full precision, over trajectories",
    "pq_step": "one step: progressive against full precision, over trajectories",
    "pte_vs_eager": "one step: unet.pte against the eager compressed model, worst of the checked timesteps",
    "pte_images": "finished pictures: unet.pte against the eager compressed model",
}

LETTERS = 12  # of a panel's label to an inch
PLAN_HEADERS = ("layer", "kind", "role", "shape", "W", "A", "split", "sensitivity", "reason")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
p { max-width: 46rem; } img { max-width: 100%; image-rendering: pixelated; }
table { border-collapse: collapse; font-size: .9rem; } .wide { overflow-x: auto; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { white-space: nowrap; } .numbers :is(th, td):not(:first-child) { text-align: right; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; } pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; }
.note { color: #555; font-size: .9rem; }
.plan td { font-size: .8rem; } .plan td:not(:last-child) { white-space: nowrap; }
"""


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


def grid(images: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) images to one (C, rows·(H+1)+1, columns·(W+1)+1) uint8 picture on white, one pixel between them.

    Args:
        images: uint8 in [0, 255], or floating point in [-1, 1].
        columns: images in a row; the last row may be short.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images are {tuple(images.shape)}: expected (N, C, H, W) with N at least 1")
    pixels = (images if images.dtype == torch.uint8 else to_uint8(images)).cpu()
    count, channels, height, width = pixels.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    picture = torch.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + 1) + 1, index % columns * (width + 1) + 1
        picture[:, top : top + height, left : left + width] = image
    return picture


def save_grid(images: Tensor, path: str | Path, columns: int = 8) -> None:
    """Write (N, C, H, W) images (as for :func:`grid`; C is 1 or 3) as one picture; the suffix says the format."""
    picture = grid(images, columns)
    array = picture[0].numpy() if picture.shape[0] == 1 else picture.permute(1, 2, 0).contiguous().numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(Path(path)) as unfinished:
        Image.fromarray(array).save(unfinished)


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
        panels: label to (N, C, H, W) images (as for :func:`grid`), as many in each.
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


def save_learning(log: list[dict[str, Any]], transitions: list[dict[str, Any]], path: str | Path) -> None:
    """Draw a learning run: the loss and its momentum above, bits and how far the next ones have blended in below.

    Args:
        log: a dictionary for each update, as the lines of ``log.jsonl``.
        transitions: as in ``summary.json``; each is marked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not log:
        raise ValueError("the log holds no update: nothing was learned")
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    updates = [row["update"] for row in log]
    above.plot(updates, [row["loss"] for row in log], color="#b9c4d0", linewidth=0.8, label="loss of a batch")
    momentum = [math.nan if row["momentum"] is None else row["momentum"] for row in log]
    above.plot(updates, momentum, color="#174a7c", linewidth=1.6, label="momentum")
    above.set_yscale("log")
    above.set_ylabel("perturbation loss")
    below.plot(updates, [row["bits"] for row in log], color="#b3541e", drawstyle="steps-post", label="bits")
    below.set_ylabel("bits", color="#b3541e")
    below.set_xlabel("update")
    blend = below.twinx()
    blend.plot(updates, [row["alpha"] for row in log], color="#4c7a3f", linewidth=1, label="α")
    blend.set_ylabel("α, the part of the new width", color="#4c7a3f")
    blend.set_ylim(-0.05, 1.05)
    starts = {row["stage"]: row["update"] for row in reversed(log)}
    for axis in (above, below):
        for transition in transitions:
            axis.axvline(transition["step"], color="#888", linewidth=0.7, linestyle=":")
        for first in starts.values():
            if first:
                axis.axvline(first, color="#000", linewidth=1)
    for transition in transitions:
        label = f"{transition['from_bits']}→{transition['to_bits']}"
        above.annotate(
            label, (transition["step"], 1), xycoords=("data", "axes fraction"), fontsize=8, ha="left", va="top"
        )
    for stage, first in starts.items():
        above.annotate(
            stage, (first, 0), xycoords=("data", "axes fraction"), fontsize=9, xytext=(4, 4), textcoords="offset points"
        )
    above.legend(loc="lower right", fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(Path(path)) as unfinished:
        figure.savefig(unfinished, dpi=110)


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


def _table(rows: list[list[Any]], headers: tuple[str, ...], kind: str = "") -> str:
    table = tabulate([[str(cell) for cell in row] for row in rows], headers, tablefmt="html", disable_numparse=True)
    return f'<div class="wide {kind}">{table}</div>'


def _inline(path: str | Path) -> str:
    encoded = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<img alt="{html.escape(Path(path).stem)}" src="data:image/png;base64,{encoded}">'


def _plan_row(row: dict[str, Any]) -> list[Any]:
    split = "+".join(map(str, row["segments"])) if len(row["segments"]) > 1 else ""
    bits = [row[key] or "float" for key in ("weight_bits", "activation_bits")]
    shape = "x".join(map(str, row["shape"]))
    sensitivity = "" if row["sensitivity"] is None else f"{row['sensitivity']:.1e}"
    return [row["fqn"], row["kind"], row["role"], shape, *bits, split, sensitivity, row["reason"]]


def write_html(
    path: str | Path,
    summary: dict[str, Any],
    plan: list[dict[str, Any]],
    pictures: list[str | Path],
    learning: str | Path | None = None,
) -> None:
    """One HTML file with everything in it: pictures (PNG) inlined, nothing fetched from anywhere.

    Args:
        summary: as in ``summary.json``: ``steps``, ``fid``, ``fid_ci``, ``fid_n``, ``bytes``, ``latency_ms``,
            ``latency_batch``, ``threads``, ``sqnr_db``, ``arithmetic``, ``pte_arithmetic``, ``plan_summary``,
            ``command``, ``versions``, ``cpu``, ``seed``, ``stages_s``, ``skipped`` (what was not measured, and why)
            and ``busy`` (why times are not to be trusted).
        plan: rows as of ``Plan.to_list``.
        learning: the picture that :func:`save_learning` drew; the summary's ``transitions`` stand below it.
    """
    e = html.escape
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>pqcad_ao demo</title>',
        f"<style>{STYLE}</style></head><body>",
        "<h1>pqcad_ao demo</h1>",
        '<p class="note">Every number on this page was measured in the run whose command stands at its end.</p>',
        "<h2>Samples</h2>",
        *(_inline(picture) for picture in pictures),
        '<p class="note">The same place in each grid starts from the same noise.</p>',
        "<h2>Quality</h2>",
        _table(quality_table(summary), ("network", "steps", "FID", "95 %", "images"), "numbers"),
        '<p class="note">FID under the embedded feature network: it compares rows of this table, at '
        f"{summary['fid_n']} images each, and nothing outside it. Rows whose intervals overlap much are not told apart "
        "by so few images.</p>",
        _table(sqnr_table(summary), ("signal to quantization noise", "dB"), "numbers"),
        *_learning(summary, learning),
        "<h2>Size</h2>",
        _table(bytes_table(summary), ("", "bytes", "of fp32"), "numbers"),
        "<h2>Speed</h2>",
        _table(latency_table(summary), (_latency_heading(summary), "ms"), "numbers"),
        *([f'<p class="note">But {e(summary["busy"])}.</p>'] if "busy" in summary else []),
        *(f"<p>{e(line)}.</p>" for line in end_to_end(summary)),
        f"<p>What the machine multiplies in the compressed model under PyTorch: {e(summary['arithmetic'])}.</p>",
        "<p>In unet.pte:</p>",
        _table([[text, count] for text, count in summary["pte_arithmetic"].items()], ("", "layers"), "numbers"),
    ]
    if summary.get("skipped"):
        skipped = [[name, reason] for name, reason in summary["skipped"].items()]
        parts += ["<p>Not measured in this run:</p>", _table(skipped, ("", "reason"))]
    parts += [
        "<h2>Plan</h2>",
        f"<p>{e(summary['plan_summary'])}</p>",
        _table([_plan_row(row) for row in plan], PLAN_HEADERS, "plan"),
        "<h2>Run</h2>",
        f"<pre>{e(summary['command'])}</pre>",
        _table(_run_table(summary), ("", "")),
        "</body></html>\n",
    ]
    write_whole(Path(path), "\n".join(parts).encode())


def _learning(summary: dict[str, Any], picture: str | Path | None) -> list[str]:
    if picture is None:
        return []
    rows = [
        [t["stage"], t["step"], f"{t['from_bits']} → {t['to_bits']}", f"{t['momentum']:.2e}", t["reason"]]
        for t in summary["transitions"]
    ]
    return [
        "<h2>Learning</h2>",
        _inline(picture),
        _table(rows, ("stage", "update", "bits", "momentum", "why"), "numbers"),
    ]


def _run_table(summary: dict[str, Any]) -> list[list[Any]]:
    cpu = summary["cpu"]
    rows = [["seed", summary["seed"]], ["threads", summary["threads"]]]
    rows.append(["processor", f"{cpu['name']}, {cpu['cores']} cores; {' '.join(cpu['features'])}"])
    rows += [[name, version or "not installed"] for name, version in summary["versions"].items()]
    rows += [[f"time: {stage}", f"{seconds:.1f} s"] for stage, seconds in summary["stages_s"].items()]
    return rows
