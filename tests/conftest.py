"""Fixtures shared by the tests: a UNet small enough to quantize in seconds, its scheduler, and the real data."""

import copy
import os
from pathlib import Path

import pytest
import torch

# read when Triton is imported, which diffusers does
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from diffusers import DDIMScheduler, UNet2DModel
from hypothesis import settings
from networks import LEAST_UNET, SHAPE, TINY_UNET, Small, cosine_scheduler, quick

from pqcad_ao import quantize_
from pqcad_ao.models import save_model

# Tensors this small gain nothing from a second thread, and lose much where another program wants the core.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

# The same examples in every run; a profile of another name can be chosen with HYPOTHESIS_PROFILE.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes on an idle machine may take an hour on a busy one."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def _tiny_unet_prototype() -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**TINY_UNET).eval()


@pytest.fixture
def tiny_unet(_tiny_unet_prototype: UNet2DModel) -> UNet2DModel:
    """A UNet2DModel of (8, 16) channels on 1×8×8 images, seeded weights, eval mode; every test gets its own copy."""
    return copy.deepcopy(_tiny_unet_prototype)


@pytest.fixture(scope="session")
def _quantized_unet_prototype(_tiny_unet_prototype: UNet2DModel) -> UNet2DModel:
    unet = copy.deepcopy(_tiny_unet_prototype)
    quantize_(unet, quick(), scheduler=cosine_scheduler(), progress=False)
    return unet


@pytest.fixture
def quantized_unet(_quantized_unet_prototype: UNet2DModel) -> UNet2DModel:
    """``tiny_unet`` as W4A4 with four timestep groups; every test gets its own copy."""
    return copy.deepcopy(_quantized_unet_prototype)


@pytest.fixture
def scheduler() -> DDIMScheduler:
    """The scheduler of the embedded teacher: DDIM, cosine betas, v-prediction, trailing timesteps."""
    return cosine_scheduler()


@pytest.fixture(scope="session")
def tiny_dir(_tiny_unet_prototype: UNet2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_unet`` and ``scheduler`` in diffusers layout; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(_tiny_unet_prototype, cosine_scheduler(), folder)
    return folder


@pytest.fixture(scope="session")
def _least_unet_prototype() -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**LEAST_UNET).eval()


@pytest.fixture
def quantized_least_unet(_least_unet_prototype: UNet2DModel) -> UNet2DModel:
    """As ``quantized_unet``, of one block without attention, with a third of its layers."""
    unet = copy.deepcopy(_least_unet_prototype)
    quantize_(unet, quick(), scheduler=cosine_scheduler(), progress=False)
    return unet


@pytest.fixture(scope="session")
def least_dir(_least_unet_prototype: UNet2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_dir``, of one block without attention, with a third of its layers."""
    folder = tmp_path_factory.mktemp("models") / "least"
    save_model(_least_unet_prototype, cosine_scheduler(), folder)
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the standard image sets (``PQCAD_DATA``, by default ``../shared/data``)."""
    folder = Path(os.environ.get("PQCAD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no image data at {folder}: set PQCAD_DATA to the folder that holds fashion_mnist/")
    return folder


@pytest.fixture(scope="session")
def _small_prototype() -> Small:
    model = Small()
    quantize_(model, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    return model


@pytest.fixture
def small(_small_prototype: Small) -> Small:
    """A quantized plain module with a skip concatenation, attention and strides; every test gets its own copy."""
    return copy.deepcopy(_small_prototype)


@pytest.fixture(scope="session")
def saved(_quantized_unet_prototype: UNet2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quantized UNet; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("saved")
    _quantized_unet_prototype.save_pretrained(folder)
    return folder
