"""What multiplies on a CPU without kernels: the reference's results, of weights that are dequantized once."""

import gc
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import convolutions, integers

from pqcad_ao.ops import dequantized, reference
from pqcad_ao.ops.packing import pack


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    bound = 1e-5 * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=bound)
    assert found.stride() == expected.stride()


@settings(max_examples=15)
@given(convolutions(winograd=False), st.booleans())
def test_convolutions_equal_the_reference(arguments, added):
    addend = torch.randn_like(reference.conv2d(*arguments)) if added else None
    _close(dequantized.conv2d(*arguments, addend=addend), reference.conv2d(*arguments, addend=addend))


def _linear(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = pack(integers(generator, 4, 6, 20), 4)
    x, bias = integers(generator, 8, 3, 5, 20), torch.randn(6, generator=generator)
    scales = torch.rand(6, generator=generator), torch.rand(3, 2, generator=generator)
    return [x, weight, *scales, bias, 4, [8, 12], dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_equal_the_reference(dtype):
    arguments, addend = _linear(dtype), torch.randn(3, 5, 6)
    assert dequantized.linear(*arguments).dtype == dtype
    _close(dequantized.linear(*arguments).float(), reference.linear(*arguments).float())
    plain = _linear()
    _close(dequantized.linear(*plain, addend=addend), reference.linear(*plain, addend))


def test_weights_are_dequantized_once_until_they_change(monkeypatch):
    unpacked = []
    unpack = dequantized.unpack
    monkeypatch.setattr(dequantized, "unpack", lambda *given: (unpacked.append(1), unpack(*given))[1])
    arguments = _linear()
    for _ in range(3):
        _close(dequantized.linear(*arguments), reference.linear(*arguments))
    assert len(unpacked) == 1
    arguments[1].bitwise_xor_(3)  # as load_state_dict writes into them
    _close(dequantized.linear(*arguments), reference.linear(*arguments))
    arguments[2].mul_(2)
    _close(dequantized.linear(*arguments), reference.linear(*arguments))
    arguments[2] = arguments[2] * 3
    _close(dequantized.linear(*arguments), reference.linear(*arguments))
    assert len(unpacked) == 4


def test_what_is_kept_goes_with_the_packed_weights():
    before, arguments = len(dequantized._kept), _linear()
    dequantized.linear(*arguments)
    assert len(dequantized._kept) == before + 1
    del arguments
    gc.collect()
    assert len(dequantized._kept) == before


def test_tensors_of_inference_mode_are_taken():
    with torch.inference_mode():
        arguments = _linear()
        for factor in (1, 2):
            arguments[2].mul_(factor)
            _close(dequantized.linear(*arguments), reference.linear(*arguments))


COMPILED_AND_EXPORTED = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from diffusers import UNet2DModel
from networks import SHAPE, TINY_UNET, cosine_scheduler, quick
from pqcad_ao import quantize_
from pqcad_ao.compile.loaded import load_pt2
from pqcad_ao.compile.package import export_pt2
from pqcad_ao.evaluate.sqnr import sqnr_db
from pqcad_ao.ops import dequantized, dispatch, reference

torch.manual_seed(0)
unet, x, t = UNet2DModel(**TINY_UNET).eval(), torch.randn(2, *SHAPE), torch.tensor([100, 700])
load, dispatch.loader.load, dispatch.dequantized = dispatch.loader.load, lambda: "", reference
quantize_(unet, quick(activation_bits=6), scheduler=cosine_scheduler(), progress=False)
with torch.no_grad():
    expected = unet(x, t).sample
    dispatch.loader.load, dispatch.dequantized = load, dequantized
    found = {"eager": unet(x, t).sample, "compiled": torch.compile(unet, backend="pqcad")(x, t).sample}
    found["package"] = load_pt2(export_pt2(unet, Path(sys.argv[2]) / "unet.pt2"))(x, t)
    again = torch.compile(unet, backend="pqcad")(x, t).sample
assert torch.equal(again, found["compiled"])
for name, output in found.items():
    assert sqnr_db(expected, output) > 30, (name, sqnr_db(expected, output))  # but for values between two levels
print(dispatch.arithmetic(), len(dequantized._kept))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("switch", "said"), [("0", "floating-point"), ("avx2", "(AVX2, exact integers)")])
def test_a_network_computes_the_same_on_other_processors(switch, said, tmp_path, monkeypatch, pytestconfig):
    """Eager, compiled and exported; without kernels each layer's weights are kept once for all three."""
    if switch == "avx2" and not torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512")):
        pytest.skip("this machine has no AVX2")
    monkeypatch.setenv("PQCAD_CPU_KERNELS", switch)
    command = [sys.executable, "-c", COMPILED_AND_EXPORTED, str(pytestconfig.rootpath / "tests"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
