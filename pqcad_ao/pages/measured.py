"""What a run's dictionary says, as bars and rows for its page; the forms that demo, compress, eval and bench return."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pqcad_ao.pages.charts import Bar
from pqcad_ao.pages.names import BYTE_NAMES, LATENCY_NAMES, ROW_NAMES, SQNR_NAMES

Z = 1.96  # deviations that hold 95 %
OURS = ("ptq", "pq", "pqcad", "fixed", "shipped", "compressed", "pte", "checkpoint", "resident")


def is_ours(name: str) -> bool:
    """Whether a row is of a compressed network, by its name."""
    return not name.startswith(("fp32", "pte_fp32")) and name.startswith(OURS)


def quality(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each measure that was taken, a title, what it says, and its bars."""
    rows = [row for row in _quality_rows(result) if row.get("fid") is not None]
    if not rows:
        return []
    counts = sorted({row["n"] for row in rows})
    of = f"of {' or '.join(f'{n:,}' for n in counts)} pictures"
    charts = [
        {"title": "FID", "note": f"{of}, less is better", "bars": [_bar(row, "fid", row.get("fid_ci")) for row in rows]}
    ]
    for kind, note in (
        ("precision", "part of the pictures that look real"),
        ("recall", "part of the real pictures that it can draw"),
    ):
        bars = [_bar(row, kind, interval(row[kind], row["n"])) for row in rows if row.get(kind) is not None]
        if bars:
            charts.append({"title": kind, "note": note, "bars": bars})
    noise = result.get("sqnr_db")
    if isinstance(noise, Mapping):
        told = {name: db for name, db in noise.items() if db is not None and math.isfinite(db)}
        bars = [Bar(SQNR_NAMES.get(name, name), db, f"{db:.1f} dB", ours=True) for name, db in told.items()]
        charts.append({"title": "signal to quantization noise", "note": "more is better", "bars": bars})
    return charts


def _quality_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with name, title, steps, n, fid, fid_ci, precision and recall."""
    if isinstance(result.get("fid"), Mapping):  # of the demo: a dictionary for each measure
        steps = result["steps"]
        return [
            {"name": name, "title": ROW_NAMES.get(name, name), "steps": steps.get(name.rpartition("_")[2])}
            | {"n": result["fid_n"], "fid": fid, "fid_ci": result["fid_ci"][name]}
            | {kind: result.get(kind, {}).get(name) for kind in ("precision", "recall")}
            for name, fid in result["fid"].items()
        ]
    if "fid" in result:  # of one network
        return [{"name": "pq", "title": str(result.get("model", "this network")), **result}]
    return [dict(row) for row in result.get("rows", []) if "fid" in row]


def _bar(row: Mapping[str, Any], kind: str, whisker: Sequence[float] | None) -> Bar:
    steps = f", {row['steps']} steps" if row.get("steps") else ""
    seed = f", seed {row['seed']}" if "title" in row and row.get("seed") else ""
    low, high = whisker or (None, None)
    text = f"{row[kind]:.2f}" if kind == "fid" else f"{row[kind]:.3f}"
    if low is not None and high is not None:
        text += f" ({low:.2f} to {high:.2f})"
    title = row.get("title") or row["name"]
    return Bar(f"{title}{steps}{seed}", row[kind], text, low, high, is_ours(row["name"]))


def interval(part: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a part that was counted among n."""
    middle, spread = part + Z**2 / (2 * n), Z * math.sqrt(part * (1 - part) / n + Z**2 / (4 * n**2))
    return (middle - spread) / (1 + Z**2 / n), (middle + spread) / (1 + Z**2 / n)


def sizes(result: Mapping[str, Any]) -> list[Bar]:
    """Bytes of each form, and how much smaller than full precision's of the same kind."""
    if "bytes" in result and isinstance(result["bytes"], Mapping):
        known = dict(result["bytes"])
        whole = {"pte": "fp32_pte", "fp32_pte": "fp32_pte"}
        return [_size(name, size, known.get(whole.get(name, "fp32_checkpoint"))) for name, size in known.items()]
    if "checkpoint_bytes" in result:
        full = result.get("fp32_bytes")
        bars = [_size("checkpoint", result["checkpoint_bytes"], full)]
        return bars if full is None else [_size("fp32_checkpoint", full, full), *bars]
    rows = [row for row in result.get("rows", []) if row.get("bytes") or row.get("resident_weight_bytes")]
    counted = [(row, row.get("bytes") or row["resident_weight_bytes"]) for row in rows]
    counted = list({row["name"]: (row, size) for row, size in counted}.values())  # once, not for each batch
    full = counted[0][1] if counted else None
    return [_size(str(row.get("title", row["name"])), size, full, row["name"]) for row, size in counted]


def _size(title: str, size: int, full: int | None, name: str | None = None) -> Bar:
    smaller = f", 1/{full / size:.1f}" if full and full != size else ""
    return Bar(BYTE_NAMES.get(title, title), size, f"{size / 1e6:.2f} MB{smaller}", ours=_ours_of_bench(name or title))


def _ours_of_bench(name: str) -> bool:
    return is_ours(name) or name.startswith("pqcad")


def speed(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each batch a title and its bars; milliseconds of one step."""
    if isinstance(result.get("latency_ms"), Mapping):
        whole = result["latency_ms"].get("fp32_eager")
        bars = [
            _time(LATENCY_NAMES.get(name, name), ms, whole, is_ours(name)) for name, ms in result["latency_ms"].items()
        ]
        threads, batch = result["threads"], result["latency_batch"]
        return [{"title": f"one step, batch {batch}, {threads} thread{'s' if threads > 1 else ''}", "bars": bars}]
    timed: dict[Any, list[Mapping[str, Any]]] = {}
    for row in result.get("rows", []):
        if row.get("ms"):
            timed.setdefault(row.get("batch", result.get("batch", 1)), []).append(row)
    charts = []
    for batch, rows in timed.items():
        bars = [
            _time(row.get("title", row["name"]), row["ms"], rows[0]["ms"], _ours_of_bench(row["name"]), _spread(row))
            for row in rows
        ]
        charts.append({"title": f"one step, batch {batch}", "bars": bars})
    return charts


def _spread(row: Mapping[str, Any]) -> Sequence[float] | None:
    if "ms_min" in row:
        return row["ms_min"], row["ms_max"]
    return row.get("ms_quartiles")


def _time(title: str, ms: float, whole: float | None, ours: bool, spread: Sequence[float] | None = None) -> Bar:
    faster = f", {whole / ms:.1f} times as fast" if whole and whole != ms else ""
    low, high = spread or (None, None)
    return Bar(title, ms, f"{ms:.2f} ms{faster}", low, high, ours)


def plan_rows(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The plan's rows, as of ``Plan.to_list``."""
    rows = result.get("plan", result.get("rows", []))
    return [row for row in rows if "fqn" in row]


def skipped(result: Mapping[str, Any]) -> dict[str, str]:
    """What could not be measured, and why."""
    found = result.get("skipped")
    return {str(name): str(reason) for name, reason in found.items()} if isinstance(found, Mapping) else {}


def heading(result: Mapping[str, Any]) -> dict[str, Any]:
    """Title, command, the plan in a sentence, what the machine multiplies, and whether it was busy."""
    command = str(result.get("command", ""))
    return {
        "title": " ".join(command.split()[: 3 if " bench " in command else 2]) or "pqcad",
        "command": command,
        "summary": str(result.get("plan_summary", result.get("summary", ""))),
        "arithmetic": str(result.get("arithmetic", "")),
        "busy": _busy(result),
        "speedup": result.get("speedup_end_to_end"),
    }


def _busy(result: Mapping[str, Any]) -> str:
    """Why times are not to be trusted; empty where nothing is known against them."""
    return str(result.get("busy") or "")


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it was run on, row by row."""
    rows = [(name, str(result[name])) for name in ("model", "seed", "threads", "loadavg") if name in result]
    cpu = result.get("cpu")
    if isinstance(cpu, Mapping):
        rows.append(("processor", f"{cpu['name']}, {cpu['cores']} cores; {' '.join(cpu['features'])}"))
    counted = result.get("pte_arithmetic", {})
    rows += [("in unet.pte", f"{count} layers: {text}") for text, count in counted.items()]
    rows += [(name, str(version or "not installed")) for name, version in result.get("versions", {}).items()]
    rows += [(f"time: {stage}", f"{seconds:.1f} s") for stage, seconds in result.get("stages_s", {}).items()]
    if "task_cosine" in result:
        begun, ended = result["task_cosine"]
        rows.append(("timesteps' gradients", f"mean cosine {begun:.2f} at the start, {ended:.2f} at the end"))
    if "seconds" in result:
        rows.append(("time", f"{result['seconds']:.0f} s"))
    return rows
