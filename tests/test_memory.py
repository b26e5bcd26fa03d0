"""Memory where a process loads, compiles, samples and exports again and again.

``pytest -s -m slow tests/test_memory.py`` prints resident memory after each turn and its slope;
``PQCAD_TURNS=100`` runs for longer.
"""

import gc
import os
from pathlib import Path

import pytest
import torch
from networks import SHAPE, Small, cosine_scheduler, quick

from pqcad_ao import PTESampler, export_pte, load_quantized, quantize_, save_quantized
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.utils.machine import rss_bytes

TURNS = int(os.environ.get("PQCAD_TURNS", "8"))
WARM = 4  # turns in which allocators and caches fill
MOST = 13.0  # MB a turn: ExecuTorch 1.4 and the compiler leave 9, and the sources of an export's graphs were as much


def slope(values: list[float]) -> float:
    """Of the least-squares line through values at 0, 1, 2 ..."""
    at = torch.arange(len(values), dtype=torch.float64)
    at, values_ = at - at.mean(), torch.tensor(values, dtype=torch.float64)
    return float((at * (values_ - values_.mean())).sum() / at.square().sum())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_grows_by_no_more_than_others_leave(tmp_path: Path):
    network, noise = Small(), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    quantize_(network, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    save_quantized(network, tmp_path / "network.safetensors")
    held = []
    for turn in range(TURNS):
        loaded = load_quantized(Small(), tmp_path / "network.safetensors")
        sample(torch.compile(loaded, backend="pqcad", fullgraph=True), cosine_scheduler(), noise, 4)
        options = {"num_inference_steps": 4, "sample_shape": SHAPE, "progress": False}
        export_pte(loaded, tmp_path / "network.pte", scheduler=cosine_scheduler(), **options)
        PTESampler(tmp_path / "network.pte").sample(noise)
        torch._dynamo.reset()  # the compiler keeps every graph of a process until it is told
        gc.collect()
        held.append(rss_bytes() / 1e6)
        print(f"turn {turn}: {held[-1]:.1f} MB")
    found = slope(held[min(WARM, TURNS - 2) :])
    print(f"slope after {WARM} turns: {found:+.2f} MB a turn")
    assert found < MOST
