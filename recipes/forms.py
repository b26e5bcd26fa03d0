"""The forms that a network's step takes, eager, compiled and as a ``.pte``: making each, and timing them all."""

import copy
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao.bench.compile.contenders import frozen
from pqcad_ao.bench.compile.workload import Step

WARMUP_CALLS = 3


@torch.no_grad()
def median_ms(call: Callable[[], Any], calls: int) -> float:
    """Median wall time of ``call()`` in milliseconds, after some calls that are not counted."""
    for _ in range(WARMUP_CALLS):
        call()
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1000 * median(times)


def compiled_forms(
    teacher: nn.Module, compressed: nn.Module, x_t: Tensor, timestep: Tensor
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """One step of both networks under ``torch.compile``, and why a form could not be made; as :func:`build`."""
    return build(
        {
            "fp32_compile": lambda: partial(frozen(Step(copy.deepcopy(teacher)), (x_t, timestep)), x_t, timestep),
            "compressed_compile": lambda: partial(
                torch.compile(compressed, backend="pqcad", fullgraph=True), x_t, timestep
            ),
        }
    )


def build(forms: Mapping[str, Callable[[], Callable[[], Any]]]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Each form compiled and called once, and why a form could not be."""
    calls, skipped = {}, {}
    for name, make in forms.items():
        try:
            call = make()
            with torch.no_grad():
                call()
            calls[name] = call
        except torch._dynamo.exc.TorchDynamoException as error:  # Inductor without a C++ compiler, say
            skipped[f"latency_ms.{name}"] = str(error).strip().splitlines()[0]
    return calls, skipped


def load_step(path: Path) -> Callable[[list[Tensor]], Any]:
    """The ``forward`` of a .pte in ExecuTorch's Python runtime."""
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path).load_method("forward").execute


@contextmanager
def exporting(model: Path, pte: Path, *options: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """``pqcad export`` in a process of its own, for lowering is Python on one core; yields what waits for its result.

    Raises (from the call):
        RuntimeError: the export failed; with what it said.
    """
    result = pte.with_suffix(".json")
    command = ["export", "--model", str(model), "--out", str(pte), "--json", str(result), *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "pqcad_ao.cli", *command, "--threads", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def finish() -> dict[str, Any]:
        _, complaint = process.communicate()
        if process.returncode:
            raise RuntimeError(f"pqcad {shlex.join(command)} failed: {complaint.strip()}")
        values = json.loads(result.read_text())
        result.unlink()
        return values

    try:
        yield finish
    finally:
        process.kill()
        process.wait()
