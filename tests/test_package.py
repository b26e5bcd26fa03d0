"""What `import pqcad_ao` gives, what it does not bring along, and which PyTorch its environment gets."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import pqcad_ao


@pytest.mark.parametrize("name", pqcad_ao.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(pqcad_ao, name).__name__.rpartition(".")[2] == name


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'export_onnx'"):
        pqcad_ao.export_onnx  # noqa: B018


def test_importing_brings_neither_executorch_nor_the_backend():
    code = (
        "import sys, pqcad_ao; print([name for name in sys.modules if name in ('executorch', "
        "'pqcad_ao.compile.backend', 'torch._inductor.compile_fx', 'torchmetrics', 'matplotlib')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere PyPI's PyTorch brings no CUDA packages")
@pytest.mark.parametrize(
    ("index_answers", "driver", "asked"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_the_cpu_build_is_asked_for_where_no_gpu_is(tmp_path: Path, index_answers: bool, driver: bool, asked: bool):
    # "true" and "false" stand in for an interpreter whose probe of the index succeeds, and one whose probe fails
    for name in ("uname", "grep", "true", "false"):
        (tmp_path / name).symlink_to(
            next(path for path in (Path("/bin") / name, Path("/usr/bin") / name) if path.exists())
        )
    if driver:
        (tmp_path / "nvidia-smi").symlink_to(tmp_path / "true")
    script = Path(__file__).parents[1] / ".ci" / "pip-flags"
    command = ["/bin/sh", str(script), "true" if index_answers else "false"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": str(tmp_path)}
    )
    assert done.stdout.startswith("--extra-index-url https://") == asked
    assert bool(done.stdout) == asked
