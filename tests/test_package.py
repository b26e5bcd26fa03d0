"""What `import pqcad_ao` gives, and what it does not bring along."""

import subprocess
import sys

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
