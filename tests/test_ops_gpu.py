"""The Triton kernels against the reference kernel: in Triton's interpreter, or on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import cosine_scheduler, sqnr
from operators import convolutions, extremes, integers
from torch import Tensor, nn

from pqcad_ao.compile.backend import fuse
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.graph.capture import capture
from pqcad_ao.ops import reference
from pqcad_ao.ops.dispatch import arithmetic, gpu_kernels, has_gpu_kernels
from pqcad_ao.ops.packing import pack
from pqcad_ao.passes.to_triton import to_triton

pytest.importorskip("triton")
gpu = gpu_kernels()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS = 24  # an interpreter is slow


def on_device(arguments):
    return [value.to(DEVICE) if isinstance(value, Tensor) else value for value in arguments]


def same(arguments, addend: Tensor | None = None, form: str = "direct") -> None:
    expected = reference.conv2d(*arguments, addend)
    output = torch.ops.pqcad.triton_conv2d(*on_device(arguments), *on_device([addend]), form).cpu()
    assert output.shape == expected.shape
    assert output.dtype == expected.dtype
    assert output.stride() == expected.stride()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * max(1.0, largest))


@settings(max_examples=25)
@given(convolutions(winograd=False, channels=CHANNELS))
def test_the_direct_form_equals_the_reference(arguments):
    same(arguments)


@settings(max_examples=12)
@given(convolutions(winograd=True, channels=CHANNELS, winograd_bits=5))
def test_the_winograd_form_equals_the_reference(arguments):
    same(arguments, form="winograd")


@settings(max_examples=10)
@given(st.booleans().flatmap(lambda winograd: convolutions(winograd=winograd, channels=CHANNELS)))
def test_integer_sums_are_exact(arguments):
    """With scales of one and no bias the output is the sum itself."""
    x, packed, weight_scale, scale, _, weight_bits, segments, kernel, stride, padding, dilation, groups, *_ = arguments
    ones = (torch.ones_like(weight_scale), torch.ones_like(scale), None)
    geometry = (kernel, stride, padding, dilation, groups)
    sums = reference.conv2d_accumulators(x, packed, weight_bits, segments, *geometry)
    given = on_device((x, packed, *ones, weight_bits, segments, *geometry, torch.float32, arguments[13], None))
    forms = [
        "direct",
        *(["winograd"] if gpu.has_winograd(weight_bits, arguments[13], kernel, stride, dilation, groups) else []),
    ]
    for form in forms:
        output = torch.ops.pqcad.triton_conv2d(*given, form).cpu()
        assert torch.equal(output.double(), sum(part.double() for part in sums))


@pytest.mark.parametrize(("low", "high"), [(-31, 0), (0, 31), (-16, 15)])
@pytest.mark.parametrize("weights", ["lowest", "highest", "signs"])
def test_the_extremes_of_five_bits_do_not_overflow_in_the_winograd_form(low, high, weights):
    same(extremes(low, high, weights), form="winograd")


@pytest.mark.parametrize("form", ["direct", "winograd"])
@pytest.mark.parametrize("pixels", [(6, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", [[8], [4, 3], [2, 3, 4]])
def test_addends(form, pixels, dtype, segments):
    generator = torch.Generator().manual_seed(0)
    x = integers(generator, 4, 2, sum(segments), 6, 5)
    packed = pack(integers(generator, 4, 7, 9 * sum(segments)), 4)
    scales = torch.rand(7, generator=generator), torch.rand(2, len(segments), generator=generator)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1, dtype, 4)
    arguments = (x, packed, *scales, torch.randn(7, generator=generator), 4, segments, *geometry)
    addend = torch.randn(2, 7, *pixels, generator=generator).to(dtype)
    expected = reference.conv2d(*arguments, addend)
    output = torch.ops.pqcad.triton_conv2d(*on_device(arguments), addend.to(DEVICE), form).cpu()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@settings(max_examples=12)
@given(
    st.integers(2, 8),
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_linear_equals_the_reference(bits, segments, shape, out_features, adds, seed):
    generator = torch.Generator().manual_seed(seed)
    arguments = (
        integers(generator, 8, *shape, sum(segments)),
        pack(integers(generator, bits, out_features, sum(segments)), bits),
        torch.rand(out_features, generator=generator) + 0.1,
        torch.rand(shape[0], len(segments), generator=generator) + 0.1,
        torch.randn(out_features, generator=generator),
        bits,
        segments,
        torch.float32,
        torch.randn(*shape, out_features, generator=generator) if adds else None,
    )
    expected = reference.linear(*arguments)
    output = torch.ops.pqcad.triton_linear(*on_device(arguments)).cpu()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * max(1.0, largest))


@settings(max_examples=3)
@given(convolutions(winograd=False, channels=8))
def test_opcheck(arguments):
    # what is interpreted cannot be traced; tracing is checked below
    utils = ("test_schema", "test_faketensor") if DEVICE == "cpu" else torch.library._OPCHECK_DEFAULT_UTILS
    torch.library.opcheck(torch.ops.pqcad.triton_conv2d.default, tuple(on_device(arguments)), test_utils=utils)


@torch.no_grad()
def test_a_network_on_its_own_trajectory_equals_the_reference(quantized_unet):
    """x_t that the sampler visits, in one batch of four timesteps."""
    scheduler, visited = cosine_scheduler(), []
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    sample(quantized_unet, scheduler, noise, 4, callback=lambda first, step, t, x_t: visited.append((x_t.clone(), t)))
    x_t = torch.cat([x for x, _ in visited])
    timesteps = torch.stack([torch.as_tensor(t).reshape(()) for _, t in visited])
    expected = quantized_unet(x_t, timesteps).sample
    graph = capture(quantized_unet, (1, 8, 8), {}).graph
    fuse(graph)
    chosen = []

    def form(arguments):
        bits, inner, geometry = arguments[5], arguments[13], (arguments[7], arguments[8], arguments[10], arguments[11])
        chosen.append("winograd" if gpu.has_winograd(bits, inner, *geometry) else "direct")
        return chosen[-1]

    assert to_triton(graph, form) == 41
    assert chosen.count("winograd") == 17
    assert not any(
        "pqcad::conv2d" in str(node.target) or "pqcad.conv2d" in str(node.target) for node in graph.graph.nodes
    )
    found = graph.to(DEVICE)(x_t.to(DEVICE), timesteps.to(DEVICE), {}).cpu()
    reached = sorted(sqnr(a, b) for a, b in zip(expected, found, strict=True))
    assert reached[len(reached) // 2] > 45


def run_compiled(code: str) -> str:
    """Run code where Triton compiles rather than interprets; it may not need a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


TRACE = """
import torch
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from pqcad_ao.ops.triton import kernels as gpu

with FakeTensorMode():
    x = torch.zeros(2, 8, 6, 6, dtype=torch.int8).to(memory_format=torch.channels_last)
    weight, scale = torch.zeros(4, 36, dtype=torch.uint8), torch.ones(4)
    tensors = (x, weight, scale, torch.ones(2, 1))
    options = (None, 4, [8], [3, 3], [1, 1], [1, 1], [1, 1], 1, torch.bfloat16, 4, None)
    for form in gpu.FORMS:

        def show(graph, inputs):
            print(form, sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
            return graph

        def layer(*tensors):
            return torch.ops.pqcad.triton_conv2d(*tensors, *options, form)

        found = aot_function(layer, fw_compiler=show)(*tensors)
        print(tuple(found.shape), found.dtype, found.is_contiguous(memory_format=torch.channels_last))
"""


def test_a_compiler_sees_the_kernels():
    """Traced with fake tensors, the operator is its kernels: one, or three for the Winograd form."""
    lines = run_compiled(TRACE).splitlines()
    assert lines[0] == "direct 1"
    assert lines[2] == "winograd 3"
    assert lines[1] == lines[3] == "(2, 4, 6, 6) torch.bfloat16 True"


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pqcad_ao.ops.triton import kernels as gpu

KINDS = {name: "*i8" for name in ("input", "inputs", "planes", "weights")}
KINDS |= {name: "*fp32" for name in ("weight_scale", "input_scale", "bias", "addend")}
KINDS |= {"weight": "*u8", "output": "*bf16"}

def compiled(kernel, capability, constants, warps=4, stages=2):
    kernel = kernel.fn if hasattr(kernel, "configs") else kernel
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else KINDS.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(kernel.__name__, capability, *sorted(set(re.findall(r"(?:wgmma|mma)\\S*s8\\.s8\\S*", built.asm["ptx"]))))

END = {"TWO": True, "BIAS": True, "ADDEND": True, "EACH_PIXEL": True}
for capability in (80, 90):
    for bits, pairs in ((4, True), (5, False)):
        shape = {"KERNEL_H": 3, "KERNEL_W": 3, "BITS": bits, "PAIRS": pairs}
        compiled(gpu._direct_kernel, capability, {**shape, **END, **gpu._DIRECT[0].kwargs})
    compiled(gpu._winograd_input, capability, {"ROWS": 32, "DEPTH": 64})
    compiled(gpu._winograd_weights, capability, {"BITS": 4, "PAIRS": True, "COLUMNS": 32, "DEPTH": 64})
    compiled(gpu._winograd_kernel, capability, {**END, **gpu._WINOGRAD[0].kwargs})
"""


def test_the_kernels_compile_to_int8_products():
    """For Ampere and Hopper, with the assembler that Triton brings along: no GPU is needed for it."""
    lines = run_compiled(COMPILE).splitlines()
    assert len(lines) == 10
    for line in lines:
        name, capability, *products = line.split()
        if name in ("_direct_kernel", "_winograd_kernel"):
            wide = name == "_direct_kernel" and capability == "90"
            assert products
            assert all(product.startswith("wgmma" if wide else "mma.sync") for product in products)


def test_the_measured_form_is_kept(tmp_path, monkeypatch):
    """Both forms of a shape are timed once; a damaged file is measured anew, and what has one form is not timed."""
    timed = []

    def do_bench(call):
        timed.append(call.keywords["form"])
        return 1.0 if call.keywords["form"] == "winograd" else 2.0

    monkeypatch.setattr(gpu, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    tensors = (torch.zeros(1, 8, 4, 4, dtype=torch.int8), torch.zeros(4, 36, dtype=torch.uint8), torch.ones(4))
    layer = (*tensors, torch.ones(1, 1), None, 4, [8], *([3, 3], [1, 1], [1, 1], [1, 1], 1), torch.float32, 4, None)
    file = tmp_path / "deep" / "forms.json"
    assert [gpu.faster_form(layer, file) for _ in range(2)] == ["winograd"] * 2
    assert timed == ["direct", "winograd"]
    file.write_text("{")
    assert gpu.faster_form(layer, file) == "winograd"
    assert len(timed) == 4
    assert gpu.faster_form((*layer[:13], 8, None), file) == "direct"
    assert len(timed) == 4


def test_a_gpu_that_is_too_old_is_said_and_not_used(monkeypatch):
    has_gpu_kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    with pytest.warns(UserWarning, match=r"an old GPU has compute capability \(7, 5\)"):
        assert not has_gpu_kernels(torch.device("cuda", 0))
    has_gpu_kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "int8 matrix units" in arithmetic("cuda:0")
    has_gpu_kernels.cache_clear()


def test_without_triton_the_graph_stays(monkeypatch):
    gpu_kernels.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    graph = torch.fx.symbolic_trace(nn.Identity())
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert to_triton(graph) == 0
    monkeypatch.undo()
    gpu_kernels.cache_clear()
