"""The result of a run as a table and as a bar chart."""

from pathlib import Path
from typing import Any

from tabulate import tabulate

from pqcad_ao.utils.load import felt


def timed(result: dict[str, Any]) -> str:
    """What a row's milliseconds are of."""
    return f"picture in {result['walk']} steps, or a distilled network's half" if result.get("walk") else "step"


def table(result: dict[str, Any]) -> str:
    """The result as text: rows, what was skipped and why, the roofline, the machine."""
    header = [
        "row",
        "batch",
        "ms",
        "min",
        "max",
        "× eager",
        "GMAC/s",
        "SQNR dB",
        "weights MB",
        "step RSS MB",
        "compile s",
        "ready s",
    ]
    body, skipped = [], []
    for row in result["rows"]:
        if "skipped" in row:
            skipped.append(f"skipped {row['name']}, batch {row['batch']}: {row['skipped']}")
            continue
        times = [f"{row[key]:.2f}" for key in ("ms", "ms_min", "ms_max")]
        megabytes = [row[key] and f"{row[key] / 1e6:.1f}" for key in ("resident_weight_bytes", "step_peak_rss_bytes")]
        sqnr = row["sqnr_db_vs_fp32"]
        rates = [
            f"{row['ratio_vs_torch_eager_fp32']:.2f}",
            f"{row['gmacs']:.0f}",
            "-" if sqnr is None else f"{sqnr:.1f}",
        ]
        body.append([row["name"], row["batch"], *times, *rates, *megabytes, f"{row['compile_s']:.0f}"])
        body[-1].append(f"{row['ready_s']:.2f}" if row.get("ready_s") else "-")
    lines = [f"ms are of a {timed(result)}"] if result.get("walk") else []
    lines += [tabulate(body, header, disable_numparse=True, colalign=("left",) + ("right",) * 11), *skipped]
    for line in result["roofline"]:
        peaks = [
            f"{kind} {line[f'peak_gmacs_{kind}']:.0f} GMAC/s = {line[f'ms_at_peak_{kind}']:.2f} ms"
            for kind in ("fp32", "bf16", "int8")
            if line[f"peak_gmacs_{kind}"]
        ]
        work = f"batch {line['batch']}: {line['gmac']:.2f} GMAC a {timed(result)}"
        lines.append(f"{work}; at this machine's peak: {'; '.join(peaks)}")
    arithmetic = {row["name"]: row["arithmetic"] for row in result["rows"] if "arithmetic" in row}
    lines += [f"{name} executes: {what}" for name, what in arithmetic.items() if name == "pqcad_w4a4"]
    for row in result["rows"]:
        if row["name"] == "pqcad_w4a4" and row.get("operators_ms"):
            parts = "; ".join(f"{name} {ms:.2f} ms" for name, ms in row["operators_ms"].items())
            lines.append(f"{row['name']}, batch {row['batch']}, by operator (profiled): {parts}")
    machine, load = result["cpu"], result["loadavg"][0]
    lines.append(
        f"{result['model']} on {machine['name']}, {result['threads']} threads, load average {load} at the start"
    )
    disturbed = {row["name"]: row["others_cores"] for row in result["rows"] if felt(row.get("others_cores", 0.0))}
    for name, others in disturbed.items():
        lines.append(f"{name} was disturbed: other programs kept up to {others:.1f} cores busy, each time again")
    if load > 0.5 or disturbed:
        lines.append("the machine was not idle: ratios from this run mean more than its milliseconds")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Bars: time of a step for each batch size with lines at the machine's peaks, and the resident weights."""
    from matplotlib.figure import Figure

    sizes = [line["batch"] for line in result["roofline"]]
    measured = [row for row in result["rows"] if "skipped" not in row]
    height = 1.5 + 0.25 * len({row["name"] for row in measured})
    figure = Figure(figsize=(5 * (len(sizes) + 1), height), layout="constrained")
    axes = figure.subplots(1, len(sizes) + 1, squeeze=False)

    def bars(axis, rows: list[dict[str, Any]], values: list[float], texts: list[str], title: str) -> None:
        colors = ["tab:orange" if row["name"].startswith("pqcad") else "tab:blue" for row in rows]
        drawn = axis.barh([row["name"] for row in rows], values, color=colors)
        axis.bar_label(drawn, texts, padding=3, fontsize=8)
        axis.set_xlim(0, 1.55 * max(values))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)

    for axis, line in zip(axes[0], result["roofline"], strict=False):
        rows = [row for row in measured if row["batch"] == line["batch"]]
        texts = [f"{row['ms']:.1f} ({row['ratio_vs_torch_eager_fp32']:.2f}×)" for row in rows]
        bars(axis, rows, [row["ms"] for row in rows], texts, f"ms a {timed(result)}, batch {line['batch']}")
        for kind, style in (("fp32", "--"), ("int8", ":")):
            if line[f"ms_at_peak_{kind}"]:
                axis.axvline(line[f"ms_at_peak_{kind}"], color="gray", linestyle=style, label=f"{kind} peak")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)  # below, as bars fill it
    rows = [row for row in measured if row["batch"] == sizes[0]]
    megabytes = [row["resident_weight_bytes"] / 1e6 for row in rows]
    bars(axes[0, -1], rows, megabytes, [f"{value:.1f}" for value in megabytes], "resident weights, MB")
    figure.suptitle(f"{result['model']}, {result['cpu']['name']}, {result['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=120)
