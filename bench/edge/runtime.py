"""A file in ExecuTorch's runtime, calls that take turns, and functions in processes of their own."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pqcad_ao.utils.quiet import start_executorch

WARM_UP = 3


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that stands in a module, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


class Program:
    """A file in the runtime."""

    def __init__(self, path: str, threads: int) -> None:
        from executorch.runtime import Runtime

        start_executorch(threads)
        self._bytes = Path(path).read_bytes()  # the runtime reads from them and does not keep them alive
        self._program = Runtime.get().load_program(self._bytes)
        self._ours = "unet" in self._program.method_names
        started = time.perf_counter()
        # what a phone calls for a step
        self.method = self._program.load_method("step" if self._ours else "forward")
        self.load_ms = 1000 * (time.perf_counter() - started)

    @cached_property
    def _unet(self) -> Any:
        return self._program.load_method("unet") if self._ours else self.method

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's prediction for one image (1, C, H, W) at one timestep."""
        return self._unet.execute([x_t.contiguous(), t.view(1)])[0].clone()


def take_turns(programs: dict[Any, Program], inputs: list[Tensor], rounds: int) -> dict[Any, list[float]]:
    """Milliseconds of every call after the first few."""
    turns: dict[Any, list[float]] = {key: [] for key in programs}
    for turn in range(WARM_UP + rounds):
        for key, program in programs.items():
            started = time.perf_counter()
            program.method.execute(inputs)
            if turn >= WARM_UP:
                turns[key].append(1000 * (time.perf_counter() - started))
    return turns
