"""Every public name has an example in its docstring, and every example runs."""

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

import pqcad_ao
from pqcad_ao.diffusion import trajectories
from pqcad_ao.models import load_model, save_model

# the compilers of Inductor and ExecuTorch take their time, and so do captures of a whole network
SLOW = {"cache_", "CachedUNet", "CachePlan", "export_pt2", "load_pt2", "export_pte", "PTESampler"}
PUBLIC = {name: getattr(pqcad_ao, name) for name in pqcad_ao.__all__}
PUBLIC |= {"load_model": load_model, "save_model": save_model}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PUBLIC]
FOLDED = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.fixture
def names(
    tiny_unet: UNet2DModel,
    quantized_unet: UNet2DModel,
    scheduler: DDIMScheduler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """What docs/api.md says that every example has at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trajectories, "FARTHEST", float("inf"))  # random weights denoise nothing
    return {**PUBLIC, "torch": torch, "unet": tiny_unet, "quantized": quantized_unet, "scheduler": scheduler}


def examples(name: str) -> list[doctest.DocTest]:
    subject = PUBLIC[name]
    subject = getattr(subject, "__call__", subject) if name == "plan" else subject  # noqa: B004  (a module, and called)
    return [found for found in doctest.DocTestFinder(recurse=False).find(subject, name) if found.examples]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example_that_runs(name: str, names: dict[str, Any]):
    (found,) = examples(name)
    if "pte" in name.lower():
        pytest.importorskip("executorch", reason="a .pte needs executorch")
    said: list[str] = []
    found.globs = names
    result = doctest.DocTestRunner(optionflags=FOLDED).run(found, out=said.append)
    assert result.attempted
    assert not result.failed, "".join(said)
