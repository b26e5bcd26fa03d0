"""Eight threads and one network: each call must give what it gives to one thread alone."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jobs import quantized
from networks import SHAPE, cosine_scheduler
from torch import Tensor

from pqcad_ao import PTESampler, export_pt2, export_pte, load_pt2

THREADS = 8
TIMESTEPS = [10, 300, 510, 999]  # of four timestep groups


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(0)`` ... ``work(count - 1)`` return or raise, begun at once in a thread each."""
    results: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads, interval = [threading.Thread(target=run, args=(index,)) for index in range(count)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that they meet each other more often
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return results


def wrong_calls(call: Callable[[int], Tensor], turns: int) -> list[Any]:
    """Of ``turns`` calls in each of 8 threads, those that are not what one thread alone gets, or raise.

    Args:
        call: the result at one of four timesteps, by its number.
    """
    expected = [call(number) for number in range(4)]

    @torch.no_grad()
    def work(index: int) -> list[Any]:
        wrong: list[Any] = []
        for turn in range(index, index + turns):
            try:
                wrong += [] if torch.equal(call(turn % 4), expected[turn % 4]) else [(index, turn)]
            except Exception as error:
                wrong.append((index, turn, error))
        return wrong

    return [wrong for of_thread in in_threads(THREADS, work) for wrong in of_thread]


def caller(network: Callable[..., Tensor]) -> Callable[[int], Tensor]:
    """``network`` on one batch at a timestep of :data:`TIMESTEPS`, by its number."""
    x_t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    return lambda number: network(x_t, torch.tensor([TIMESTEPS[number]] * 2))


def _eager(folder: Path) -> Callable[[int], Tensor]:
    return caller(quantized())


def _compiled(folder: Path) -> Callable[[int], Tensor]:
    """Not with ``fullgraph=True``: torch 2.13 counts its frames in one variable of the whole process. A call beside
    another one sets it to zero, and the other one then raises that nothing was compiled."""
    return caller(torch.compile(quantized(), backend="pqcad"))


def _program(folder: Path) -> Callable[[int], Tensor]:
    given = {"num_inference_steps": 4, "sample_shape": SHAPE, "batch_size": 2, "progress": False}
    export_pte(quantized(), folder / "a.pte", scheduler=cosine_scheduler(), **given)
    sampler, x_t = PTESampler(folder / "a.pte"), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    return lambda number: sampler.step(x_t, number)


def _package(folder: Path) -> Callable[[int], Tensor]:
    package = load_pt2(export_pt2(quantized(), folder / "a.pt2", sample_shape=SHAPE))
    return caller(lambda x_t, timesteps: package(x_t, timesteps))


SHARED: dict[str, Callable[[Path], Callable[[int], Tensor]]] = {
    "eager": _eager,
    "compiled": _compiled,
    ".pte": _program,
    ".pt2": _package,
}


@torch.no_grad()
def share(kind: str, calls: int, folder: Path) -> list[Any]:
    """The wrong ones of ``calls`` calls of a network that eight threads share."""
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    return wrong_calls(SHARED[kind](folder), -(-calls // THREADS))
