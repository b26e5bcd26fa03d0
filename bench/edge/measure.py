"""One sampling step as a .pte on ExecuTorch's stock runtime: XNNPACK's own recipes and this project's, in one run.

Files are made by processes of their own, one after another; so are load times and memory. The timed calls of all files
take turns in one process.
"""

import re
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from pqcad_ao.bench.compile.contenders import quantize_fixed
from pqcad_ao.bench.edge.contenders import ROWS, TRAJECTORIES, compressed_network, unconditional_network
from pqcad_ao.bench.edge.runtime import WARM_UP, Program, alone, take_turns
from pqcad_ao.denoiser import sample_shape
from pqcad_ao.diffusion.recording import record_calls
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.evaluate.sqnr import decibels, row_powers
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.utils import machine
from pqcad_ao.utils.checks import check_count
from pqcad_ao.utils.files import check_writable, write_json
from pqcad_ao.utils.load import undisturbed
from pqcad_ao.utils.tensor_files import write_tensors


def bench_edge(
    model: str = "demo",
    *,
    compressed: str | None = None,
    rows: Sequence[str] | None = None,
    steps: int = 20,
    rounds: int = 25,
    n: int = 0,
    threads: int | None = None,
    seed: int = 0,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure one sampling step of each row's .pte, at batch 1.

    Args:
        model: a name or folder that ``load_model`` takes, in full precision.
        compressed: a folder with the same network quantized; if None, it is quantized here, fixed-bit and without
            learning, which is as large and as fast as with.
        rows: of ``ROWS``. steps: of the schedule. rounds: timed calls of each file.
        threads: for every file; None: all available cores.
        n: images for the FID through each file and in eager mode (Fashion-MNIST features); 0: none.

    Returns:
        what ``json_path`` receives: ``rows`` with bytes, load_ms, ms, peak_rss_bytes, delegates, portable, sqnr_db
        (against full precision, all steps) and, where asked for, fid; a row that cannot be made says ``skipped``.

    Raises:
        ValueError: unknown rows or models, counts below their least.
    """
    rows = list(ROWS if rows is None else rows)
    unknown = [row for row in rows if row not in ROWS]
    if unknown or not rows:
        raise ValueError(f"rows={','.join(unknown) or 'none'!r}: allowed are {', '.join(ROWS)}")
    for name, value, least in (("steps", steps, 1), ("rounds", rounds, 1), ("n", n, 0)):
        check_count(name, value, least)
    target = None if json_path is None else check_writable(json_path)
    threads = machine.check_threads(threads)
    result: dict[str, Any] = {"model": model, "steps": steps, "batch": 1, "seed": seed} | machine.describe(threads)
    with tempfile.TemporaryDirectory() as folder:
        job: dict[str, Any] = {"model": model, "steps": steps, "seed": seed, "threads": threads}
        job |= {"records": str(Path(folder) / "records.safetensors")}
        job["compressed"] = compressed or str(Path(folder) / "model")
        alone(_prepare, job, compressed is None)
        made, paths = [], {}
        for name in rows:
            path = Path(folder) / f"{name}.pte"
            row = _make(name, job, path)
            if ROWS[name].runs and "skipped" not in row:
                paths[name] = str(path)
            made.append(row)
        turns, result["others_cores"] = alone(_race, paths, rounds, job) if paths else ({}, None)
        for row in made:
            if row["name"] in turns:
                row |= _times(turns[row["name"]], turns.get("xnnpack_int8"))
            if n and row["name"] in paths:
                row["fid"] = alone(_fid, row["name"], paths[row["name"]], job, n)
        result["rows"] = made
        if n:
            result["n"] = n
            result["eager"] = {kind: alone(_fid, kind, "", job, n) for kind in ("eager_fp32", "eager_w4a4")}
    if target is not None:
        write_json(target, result)
    return result


def _make(name: str, job: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write a row's file and measure what needs no turns; ``skipped`` says why one of both was not possible."""
    row: dict[str, Any] = {"name": name, "title": ROWS[name].title}
    try:
        begin = time.perf_counter()
        row |= alone(_build, name, job, str(path))
        row |= {"bytes": path.stat().st_size, "export_s": time.perf_counter() - begin}
        if ROWS[name].runs:
            row |= alone(_alone, str(path), job)
    except Exception as error:  # a rival's fault is a line of the table
        row["skipped"] = _reason(error)
    return row


def _times(turns: list[float], rival: list[float] | None) -> dict[str, Any]:
    """Median and quartiles of a row's calls, and the median ratio to the rival's call of the same turn."""
    quartiles = torch.tensor(turns).quantile(torch.tensor([0.25, 0.75])).tolist()
    times: dict[str, Any] = {"ms": median(turns), "ms_quartiles": quartiles}
    if rival:
        times["over_int8"] = median(a / b for a, b in zip(turns, rival, strict=True))
    return times


def _reason(error: Exception) -> str:
    """One line, without the folders of this machine."""
    return re.sub(r"(?:/[^/\s'\"]+)+/", "", " ".join(f"{type(error).__name__}: {error}".split()))[:300]


def _prepare(job: dict[str, Any], quantize: bool) -> None:
    """Inputs on full-precision trajectories and their predictions; the quantized network where none was given."""
    unet, scheduler = unconditional_network(job["model"])
    shape = sample_shape(unet)
    noise = torch.randn(TRAJECTORIES, *shape, generator=torch.Generator().manual_seed(job["seed"]))
    calls = record_calls(unet, scheduler, noise, job["steps"])
    records = {
        "x_t": torch.stack([call.x_t.contiguous() for call in calls]),
        "timesteps": torch.stack([call.timesteps[0] for call in calls]),
        "predictions": torch.stack([call.prediction.contiguous() for call in calls]),
    }
    write_tensors(job["records"], records)
    if quantize:
        quantize_fixed(unet, scheduler, {})
        save_model(unet, scheduler, job["compressed"])
    elif quantized_state(load_model(job["compressed"])[0]) is None:
        raise ValueError(f"compressed={job['compressed']!r} is not quantized: give a folder that quantize_ led to")


def _build(name: str, job: dict[str, Any], path: str) -> dict[str, Any]:
    return ROWS[name].build(job, Path(path))


def _alone(path: str, job: dict[str, Any]) -> dict[str, Any]:
    """Load time, memory, and signal to noise against full precision."""
    met = load_file(job["records"])
    before = machine.rss_bytes()
    machine.reset_peak_rss()
    program = Program(path, job["threads"])
    for _ in range(WARM_UP):
        program.method.execute([met["x_t"][0, :1].contiguous(), torch.tensor([0])])
    peak = machine.peak_rss_bytes()
    signal = noise = 0.0
    for x_t, t, reference in zip(met["x_t"], met["timesteps"], met["predictions"], strict=True):
        for x, expected in zip(x_t, reference, strict=True):
            powers = row_powers(expected[None], program.predict(x[None], t))
            signal, noise = signal + powers[0].item(), noise + powers[1].item()
    return {
        "load_ms": program.load_ms,
        "peak_rss_bytes": peak,
        "peak_rss_above_start_bytes": peak - before,
        "sqnr_db": decibels(signal, noise),
    }


def _race(paths: dict[str, str], rounds: int, job: dict[str, Any]) -> tuple[dict[str, list[float]], float]:
    """Milliseconds of every call, the files taking turns; and the cores that other programs kept busy meanwhile."""
    programs = {name: Program(path, job["threads"]) for name, path in paths.items()}
    inputs = [load_file(job["records"])["x_t"][0, :1].contiguous(), torch.tensor([0])]
    return undisturbed(partial(take_turns, programs, inputs, rounds))


def _fid(kind: str, path: str, job: dict[str, Any], n: int) -> float:
    """FID of ``n`` images from the same noise, of a file or of the network in eager mode."""
    from pqcad_ao.evaluate.features import embedded_features, extract_features
    from pqcad_ao.evaluate.fid import fid_kid

    unet, scheduler = unconditional_network(job["model"])
    noise = torch.randn(n, *sample_shape(unet), generator=torch.Generator().manual_seed(job["seed"]))
    if kind == "pqcad_speed" or kind == "pqcad_size":
        from pqcad_ao.edge.sampler import PTESampler

        images = PTESampler(path).sample(noise)
    elif kind.startswith("eager"):
        if kind == "eager_w4a4":
            unet, scheduler = compressed_network(job)
        images = sample(unet, scheduler, noise, job["steps"])
    else:
        predict_one = Program(path, job["threads"]).predict
        images = sample(predict_one, scheduler, noise, job["steps"], batch_size=1)
    network, real = embedded_features()
    return fid_kid(extract_features(images, network), real, seed=job["seed"])["fid"]
