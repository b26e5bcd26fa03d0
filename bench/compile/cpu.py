"""One UNet step of this project and of its peers on a CPU, timed side by side.

Every contender lives in a process of its own, so that its memory is its own, and the parent lets them run in turn
(A B C, A B C, ...), one at a time, so that a change in the machine's load meets them all. Contenders that wait burn
no CPU: libgomp's and TBB's threads sleep some milliseconds after their last work, libiomp's after 200, and the parent
pauses longer than that between turns; what a waiting process did burn is in the result as ``idle_cpu_s``. A turn that
other programs disturbed is taken again, and what they used of the machine in those that count is in the result, too.
``OMP_WAIT_POLICY=PASSIVE`` is left unset, as it would slow the contenders that are built on OpenMP and not the others.
"""

import importlib.util
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pqcad_ao.bench.compile.contenders import REFERENCE, ROWS
from pqcad_ao.bench.compile.drawing import plot
from pqcad_ao.bench.compile.worker import MACHINE, Failed, Worker
from pqcad_ao.bench.compile.workload import float_model
from pqcad_ao.utils.checks import check_count
from pqcad_ao.utils.files import check_writable, write_json
from pqcad_ao.utils.load import loadavg, undisturbed
from pqcad_ao.utils.machine import check_threads, describe
from pqcad_ao.utils.progress import tqdm

PAUSE = 0.25  # seconds between turns; OpenMP threads of libiomp spin for 0.2 after their last work


def check_rows(rows: Sequence[str] | None, walk: int | None = None) -> list[str]:
    """The rows to measure, the reference first, which is always among them.

    Raises:
        ValueError: an unknown name, a row that is about walks where steps are timed, or a walk that has no such part.
    """
    allowed = [name for name, row in ROWS.items() if walk or not row.walks_only]
    unknown = [name for name in rows or () if name not in ROWS]
    if unknown:
        raise ValueError(f"rows={', '.join(map(repr, unknown))}: allowed are {', '.join(allowed)}")
    if apart := [name for name in rows or () if name not in allowed]:
        raise ValueError(f"rows={', '.join(map(repr, apart))}: these differ in their walk alone, give walk=20 as well")
    names = [name for name in allowed if rows is None or name in rows or name == REFERENCE]
    if walk and (odd := [name for name in names if walk % ROWS[name].part]):
        raise ValueError(f"walk={walk}: {', '.join(odd)} take 1/{ROWS[odd[0]].part} of the steps, give a multiple")
    return names


def check_counts(name: str, values: Sequence[int]) -> list[int]:
    """The values as a list; raises ValueError: none, or one that is no whole number from 1."""
    counts = list(values)
    check_count(name, counts[0] if counts else counts)
    for value in counts[1:]:
        check_count(name, value)
    return counts


def missing_packages(name: str) -> list[str]:
    return [package for package in ROWS[name].requires if importlib.util.find_spec(package) is None]


def bench_compile(
    model: str = "demo",
    *,
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    iterations: int = 3,
    threads: int | None = None,
    rows: Sequence[str] | None = None,
    walk: int | None = None,
    seed: int = 0,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Time one UNet step of every contender, in turn, on this machine's processor.

    Args:
        model: ``demo``, ``ddpm-cifar10`` (random weights: for speed and size, never for quality), or a folder that
            holds a full-precision diffusers UNet; with ``@64`` behind it, for samples of 64x64.
        batches: batch sizes, one after the other.
        rounds: turns of each contender.
        iterations: timed steps in a turn, after one that is not timed.
        threads: for every contender; None: all available cores.
        walk: time whole pictures, in this many steps, half of them in rows for distilled networks; None: single steps.
        rows: names from ``ROWS``; None: all. ``torch_eager_fp32`` is always measured, the others are compared with it.
        seed: of the inputs.
        json_path: where the result goes as JSON.
        plot_path: where a bar chart goes, as PNG or what the ending says.
        progress: show a bar.

    Returns:
        The JSON's content. ``rows`` holds one dict for each name and batch: ``ms`` (median over all timed steps),
        ``ms_min``, ``ms_max``, ``runs`` (timed steps), ``ratio_vs_torch_eager_fp32`` (eager's time over this row's in
        the same round, median over rounds: above 1 is faster), ``ratio_min``, ``ratio_max``, ``gmacs`` (the float
        network's multiply-accumulates, of all of a walk's steps, over ``ms``, in G/s), ``resident_weight_bytes``,
        ``peak_rss_bytes`` (building included),
        ``step_peak_rss_bytes`` (stepping only), ``base_rss_bytes`` (the process before it loads the network),
        ``compile_s`` (from the float network to the first output, calibration included), ``ready_s`` (of that, the
        first call of what ``torch.compile`` returned, or loading the package; None: not measured),
        ``sqnr_db_vs_fp32`` (over batches from sampling trajectories; None: no difference), ``arithmetic``, ``backend``,
        ``idle_cpu_s`` (CPU time burnt while others ran), ``others_cores`` (that programs beside the benchmark kept busy
        in the most disturbed of its turns), ``operators_ms`` (of a profiled step, by operator; empty outside PyTorch);
        or ``skipped`` with the reason. ``roofline`` holds for each batch ``gmac`` and the
        machine's measured ``peak_gmacs_fp32``, ``peak_gmacs_bf16``, ``peak_gmacs_int8`` (None: no such kernel), with
        the ``ms`` that ``gmac`` would take at each.

    Raises:
        ValueError: an unknown model or row, a folder without a full-precision UNet, a count below 1.
        OSError: there is no folder for the files.
        RuntimeError: the reference itself cannot run.
    """
    if walk is not None:
        check_count("walk", walk)
    names, sizes = check_rows(rows, walk), check_counts("batches", batches)
    check_counts("rounds", [rounds])
    check_counts("iterations", [iterations])
    threads = check_threads(threads)
    target = None if json_path is None else check_writable(json_path)  # now, and not after half an hour
    chart = None if plot_path is None else check_writable(plot_path)
    float_model(model)  # what is wrong with it is said before any process starts
    result: dict[str, Any] = {"benchmark": "compile", "model": model, "seed": seed, **describe(threads)}
    result |= {"walk": walk, "rounds": rounds, "iterations": iterations, "roofline": [], "rows": []}
    with tqdm(total=len(sizes) * len(names) * (1 + rounds), desc="bench compile", disable=not progress) as bar:
        for batch in sizes:
            with tempfile.TemporaryDirectory(prefix="pqcad-bench-") as folder:
                spec = {
                    "model": model,
                    "seed": seed,
                    "threads": threads,
                    "batch": batch,
                    "folder": folder,
                    "walk": walk,
                }
                facts, measured = _measure(spec, names, rounds, iterations, bar)
            result["parameters"] = facts.pop("parameters")
            result["roofline"].append(facts)
            result["rows"] += measured
    result["loadavg_end"] = loadavg()
    if target is not None:
        write_json(target, result)
    if chart is not None:
        plot(result, chart)
    return result


def _measure(
    spec: dict[str, Any], names: list[str], rounds: int, iterations: int, bar: tqdm
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One batch size: build all, then go round; the roofline's facts and the rows."""
    peaks: list[dict[str, float]] = []
    with ExitStack() as workers:
        batch = _Batch(spec, names, workers, bar)
        try:
            machine, facts = batch.start(MACHINE)
            facts["gmac"] *= spec["walk"] or 1
        except Failed as error:
            raise RuntimeError(f"the network's inputs could not be made: {error}") from error
        batch.build()
        for turn in range(rounds):
            peaks.append(machine.ask({"run": 1})["peaks"])
            time.sleep(PAUSE)
            batch.go_round(turn, iterations)
        batch.stop()
    for name in batch.running:
        batch.rows[name] |= _statistics(batch.turns[name], batch.turns[REFERENCE], facts["gmac"])
    return {"batch": spec["batch"], **facts} | _roofline(peaks, facts["gmac"]), list(batch.rows.values())


class _Batch:
    """The workers of one batch size, and what they measured.

    Attributes:
        rows: by name; a row that could not be measured says why in ``skipped``.
        turns: by name, the milliseconds of each turn's steps.
        others: by name, the cores that other programs kept busy in the most disturbed of its turns.
    """

    def __init__(self, spec: dict[str, Any], names: list[str], workers: ExitStack, bar: tqdm) -> None:
        self.spec, self.names, self.bar = spec, names, bar
        self.rows = {name: {"name": name, "batch": spec["batch"]} for name in names}
        self.turns: dict[str, list[list[float]]] = {name: [] for name in names}
        self.others = dict.fromkeys(names, 0.0)
        self._ends, self._workers = workers, dict[str, Worker]()

    @property
    def running(self) -> list[str]:
        return [name for name in self.names if "skipped" not in self.rows[name]]

    def start(self, name: str) -> tuple[Worker, dict[str, Any]]:
        """A worker, which ends with the stack of workers, and what it says of itself."""
        worker = self._ends.enter_context(Worker(self.spec | {"name": name}))
        facts = worker.receive()
        time.sleep(PAUSE)
        return worker, facts

    def build(self) -> None:
        """Start a worker for every row."""
        for name in self.names:
            self.bar.set_postfix_str(f"batch {self.spec['batch']}, building {name}")
            missing = missing_packages(name)
            with self._or_skip(name):
                if missing:
                    raise Failed(f"not installed: {', '.join(missing)} (pip install 'pqcad_ao[bench]')")
                self._workers[name], facts = self.start(name)
                self.rows[name] |= facts
            self.bar.update()

    def go_round(self, turn: int, iterations: int) -> None:
        """Let every worker time its steps, one after another."""
        for name in self.names:
            self.bar.set_postfix_str(f"batch {self.spec['batch']}, round {turn + 1}, {name}")
            self.bar.update()
            if "skipped" in self.rows[name]:
                continue
            with self._or_skip(name):
                worker = self._workers[name]
                given, others = undisturbed(partial(worker.ask, {"run": iterations}), [worker.process.pid])
                self.turns[name].append(given["ms"])
                self.others[name] = max(self.others[name], others)
            time.sleep(PAUSE)

    def stop(self) -> None:
        """Ask every worker what it needed in all."""
        for name in self.running:
            with self._or_skip(name):
                self.rows[name] |= self._workers[name].ask({"stop": True}) | {"others_cores": self.others[name]}

    @contextmanager
    def _or_skip(self, name: str) -> Iterator[None]:
        """Let a worker's fault be a line of the table; the reference's is everybody's."""
        try:
            yield
        except Failed as error:
            self.rows[name] = {"name": name, "batch": self.spec["batch"], "skipped": str(error)}
            if name == REFERENCE:
                raise RuntimeError(f"{REFERENCE}, to which all others are compared, failed: {error}") from error


def _roofline(peaks: list[dict[str, float]], gmac: float) -> dict[str, float | None]:
    """The machine's best turn for each kind of number, and the time of a step at it."""
    roofline: dict[str, float | None] = {}
    for kind in ("fp32", "bf16", "int8"):
        peak = max((measured[kind] for measured in peaks if kind in measured), default=None)
        roofline[f"peak_gmacs_{kind}"] = peak
        roofline[f"ms_at_peak_{kind}"] = None if peak is None else gmac / peak * 1e3
    return roofline


def _statistics(turns: list[list[float]], reference: list[list[float]], gmac: float) -> dict[str, float]:
    times = [value for turn in turns for value in turn]
    ratios = [median(theirs) / median(ours) for ours, theirs in zip(turns, reference, strict=True)]
    return {
        "ms": median(times),
        "ms_min": min(times),
        "ms_max": max(times),
        "runs": len(times),
        "ratio_vs_torch_eager_fp32": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "gmacs": gmac / median(times) * 1e3,
    }
