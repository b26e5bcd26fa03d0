"""What a run measured, as tables for a terminal."""

import math
from typing import Any

from tabulate import tabulate

from pqcad_ao.pages.names import BYTE_NAMES, LATENCY_NAMES, ROW_NAMES, SQNR_NAMES


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
