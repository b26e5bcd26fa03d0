"""What a process keeps of each call where it loads, compiles, samples or exports again and again."""

import copy
import gc
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import UNet2DModel
from jobs import UNET, quantized
from networks import SHAPE, cosine_scheduler, quick

from pqcad_ao import export_pte, quantize_
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.models import load_model, save_model
from pqcad_ao.utils.machine import rss_bytes

WARM = 1 / 3  # of all calls, in which allocators and caches fill
LEAST = 9  # calls, however long they take


@dataclass
class Growth:
    """What one kind of call left behind: kB a call, the slope of resident memory behind the calls that warm up."""

    kind: str
    calls: int
    slope: float
    allowed: float

    @property
    def sound(self) -> bool:
        return self.slope <= self.allowed


def slope(values: list[float]) -> float:
    """Of the least-squares line through values at 0, 1, 2 ..."""
    at = torch.arange(len(values), dtype=torch.float64)
    at, values_ = at - at.mean(), torch.tensor(values, dtype=torch.float64)
    return float((at * (values_ - values_.mean())).sum() / at.square().sum())


def _load(folder: Path) -> Callable[[], object]:
    torch.manual_seed(0)
    unet = UNet2DModel(**UNET).eval()
    quantize_(unet, quick(), scheduler=cosine_scheduler(), progress=False)
    save_model(unet, cosine_scheduler(), folder / "model")
    return lambda: load_model(folder / "model")


def _sample(folder: Path) -> Callable[[], object]:
    network, noise = quantized(), torch.zeros(2, *SHAPE)
    return lambda: sample(network, cosine_scheduler(), noise, 4)


def _compile(folder: Path) -> Callable[[], object]:
    network, noise = quantized(), torch.zeros(2, *SHAPE)

    def call() -> None:
        compiled = torch.compile(copy.deepcopy(network), backend="pqcad", fullgraph=True)
        with torch.no_grad():
            compiled(noise, torch.tensor([10, 10]))
        torch._dynamo.reset()  # the compiler keeps every graph of a process until it is told

    return call


def _export(folder: Path) -> Callable[[], object]:
    network, options = quantized(), {"num_inference_steps": 4, "sample_shape": SHAPE, "progress": False}
    return lambda: export_pte(network, folder / "a.pte", scheduler=cosine_scheduler(), **options)


Make = Callable[[Path], Callable[[], object]]
# with the kB that others keep of a call, and their share of what is allocated and freed in pieces
ALONE: dict[str, tuple[Make, float]] = {
    # safetensors (0.7, 0.8): 64 bytes of each tensor that it reads, of which there are 275
    "load_model": (_load, 25.0),
    "sample": (_sample, 2.0),
    "torch.compile": (_compile, 2000.0),  # torch (2.13): guards, by finalizers of what they watch; generated code
    "export_pte": (_export, 400.0),  # torch and executorch (1.4): what they know of shapes and operators
}


def _in_turns(folder: Path) -> Callable[[], object]:
    calls = [make(folder) for make, _ in ALONE.values()]
    return lambda: [call() for call in calls]


KINDS = {**ALONE, "all four in turns": (_in_turns, 3000.0)}


def _held(kind: str, seconds: float, folder: Path) -> list[float]:
    """Resident memory in kB behind each of the calls that are made in some seconds."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    call, held, end = KINDS[kind][0](folder), [], time.monotonic() + seconds
    while len(held) < LEAST or time.monotonic() < end:
        call()
        gc.collect()
        held.append(rss_bytes() / 1e3)
    return held


def grow(kind: str, seconds: float, scratch: Path) -> Growth:
    """Call again and again for some seconds, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as child:
        held = child.submit(_held, kind, seconds, scratch).result()
    return Growth(kind, len(held), slope(held[round(WARM * len(held)) :]), KINDS[kind][1])
