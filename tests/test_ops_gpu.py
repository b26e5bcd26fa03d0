"""The Triton kernels against the reference kernel: in Triton's interpreter, or on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import cosine_scheduler, sqnr
from operators import convolutions, integers
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
from pqcad_ao.ops.triton import forms, norm, tma  # noqa: E402  (need Triton)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS = 24  # an interpreter is slow
QUANTIZERS = 37  # images that the tiny network quantizes, with a norm in front of them or without


def on_device(arguments):
    return [value.to(DEVICE) if isinstance(value, Tensor) else value for value in arguments]


DIRECT, WIDE = str(gpu.DIRECT[-1]), str(gpu.WIDE[-1])


def run(arguments, addend: Tensor | None, form: str) -> Tensor:
    operator = torch.ops.pqcad.tma_conv2d if form in tma.BLOCKS else torch.ops.pqcad.triton_conv2d
    return operator(*on_device(arguments), *on_device([addend]), form).cpu()


def same(arguments, addend: Tensor | None = None, form: str = DIRECT) -> None:
    expected = reference.conv2d(*arguments, addend)
    output = run(arguments, addend, form)
    assert output.shape == expected.shape
    assert output.dtype == expected.dtype
    assert output.stride() == expected.stride()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * max(1.0, largest))


@settings(max_examples=15)
@given(convolutions(winograd=False, channels=CHANNELS))
def test_the_direct_form_equals_the_reference(arguments):
    same(arguments)


@settings(max_examples=12)
@given(convolutions(winograd=False, channels=CHANNELS))
def test_the_wide_form_equals_the_reference(arguments):
    same(arguments, form=WIDE)


@settings(max_examples=10)
@given(st.booleans().flatmap(lambda winograd: convolutions(winograd=winograd, channels=CHANNELS)))
def test_integer_sums_are_exact(arguments):
    """With scales of one and no bias the output is the sum itself."""
    x, packed, weight_scale, scale, _, weight_bits, segments, kernel, stride, padding, dilation, groups, *_ = arguments
    ones = (torch.ones_like(weight_scale), torch.ones_like(scale), None)
    geometry = (kernel, stride, padding, dilation, groups)
    sums = reference.conv2d_accumulators(x, packed, weight_bits, segments, *geometry)
    given = (x, packed, *ones, weight_bits, segments, *geometry, torch.float32, arguments[13])
    for form in (DIRECT, WIDE):
        assert torch.equal(run(given, None, form).double(), sum(part.double() for part in sums))


@settings(max_examples=12)
@given(
    st.integers(2, 8),
    st.sampled_from([[32], [64], [32, 32], [64, 32], [128]]),
    st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    st.tuples(*[st.integers(0, 2)] * 2),
    st.tuples(*[st.integers(1, 2)] * 2),
    st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 70),
    st.sampled_from(["none", "pixels", "channels"]),
    st.integers(0, 2**31),
)
def test_the_copy_engines_form_is_exact(bits, segments, kernel, padding, dilation, size, out_channels, adds, seed):
    """Boxes that reach over every edge of the image, padding wider than a filter, batches that do not fill a block."""
    generator = torch.Generator().manual_seed(seed)
    batch, *pixels = size
    out = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(pixels, padding, dilation, kernel, strict=True)]
    assume(min(out) > 0)
    channels = sum(segments)
    x = integers(generator, 8, batch, channels, *pixels)
    packed = pack(integers(generator, bits, out_channels, kernel[0] * kernel[1] * channels), bits)
    ones = torch.ones(out_channels), torch.ones(batch, len(segments)), None
    geometry = ([*kernel], [1, 1], [*padding], [*dilation], 1)
    shape = {"pixels": (batch, out_channels, *out), "channels": (batch, out_channels, 1, 1)}.get(adds)
    addend = None if shape is None else torch.randint(-9, 9, shape, generator=generator).float()
    sums = reference.conv2d_accumulators(x, packed, bits, segments, *geometry)
    expected = sum(part.double() for part in sums) + (0 if addend is None else addend)
    names = [str(blocks) for blocks in tma.blocks_for(out_channels, segments, kernel, [1, 1], 1)]
    assert names
    arguments = (x, packed, *ones, bits, segments, *geometry, torch.float32, 8)
    for form in names[-1:]:
        assert torch.equal(run(arguments, addend, form).double(), expected)


def test_what_the_copy_engine_does_not_serve():
    layer = {"out_channels": 64, "segments": [64], "kernel_size": [3, 3], "stride": [1, 1], "groups": 1}
    assert tma.blocks_for(**layer)
    for change in (
        {"stride": [2, 2]},
        {"groups": 2},
        {"segments": [3]},
        {"segments": [64, 48]},
        {"segments": [32] * 3},
    ):
        assert not tma.blocks_for(**{**layer, **change})


@pytest.mark.parametrize("form", [DIRECT, WIDE])
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
    st.sampled_from([DIRECT, WIDE]),
    st.integers(0, 2**31),
)
def test_linear_equals_the_reference(bits, segments, shape, out_features, adds, form, seed):
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
    output = torch.ops.pqcad.triton_linear(*on_device(arguments), form).cpu()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * max(1.0, largest))


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(2, 8),
    st.integers(1, 3),
    st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 2**31),
)
def test_norm_silu_and_quantizer_equal_the_reference(parts, groups, affine, silu, split, bits, upsample, size, seed):
    """Images side by side, groups that lie across their seam, moments far from zero."""
    generator = torch.Generator().manual_seed(seed)
    batch, *pixels = size
    widths = [part * max(groups, 1) if index else 3 * part + 2 for index, part in enumerate(parts)]
    widths[0] += -sum(widths) % max(groups, 1)
    inputs = [3 + 2 * torch.randn(batch, width, *pixels, generator=generator) for width in widths]
    channels = sum(widths)
    weight, bias = torch.randn(2, channels, generator=generator) if affine else (None, None)
    segments = widths if split else [channels]
    scale = torch.rand(batch, len(segments), generator=generator) + 0.05
    low = torch.randint(-(2 ** (bits - 1)), 1, scale.shape, generator=generator, dtype=torch.int16)
    arguments = (inputs, weight, bias, groups, 1e-5, silu, scale, low, segments, bits, upsample)
    assert norm.fits([x.dtype for x in inputs], segments, groups)
    expected = reference.norm_silu_quantize(*arguments)
    given = ([x.to(DEVICE) for x in inputs], *on_device(arguments[1:]))
    output = torch.ops.pqcad.triton_norm_silu_quantize(*given).cpu()
    assert output.shape == expected.shape
    assert output.stride() == expected.stride()
    apart = (output.int() - expected.int()).abs()  # sums in another order move a value over its threshold
    assert apart.numel() == 0 or apart.max() <= 1
    assert apart.sum() <= 0.01 * apart.numel() + 1


def test_what_the_norm_kernel_does_not_take():
    one = torch.float32
    assert norm.fits([one], [128], 2)
    assert not norm.fits([one], [128], 1)  # a group of more than 64 channels
    assert not norm.fits([one, one, one], [384], 32)
    assert not norm.fits([one], [64, 32, 32], 32)
    assert not norm.fits([one, torch.bfloat16], [256], 32)


@settings(max_examples=3)
@given(convolutions(winograd=False, channels=8))
def test_opcheck(arguments):
    # what is interpreted cannot be traced; tracing is checked below
    utils = ("test_schema", "test_faketensor") if DEVICE == "cpu" else torch.library._OPCHECK_DEFAULT_UTILS
    torch.library.opcheck(torch.ops.pqcad.triton_conv2d.default, tuple(on_device(arguments)), test_utils=utils)


@torch.no_grad()
def test_a_network_on_its_own_trajectory_equals_the_reference(quantized_unet):
    """x_t that the sampler visits, in one batch of two timesteps."""
    scheduler, visited = cosine_scheduler(), []
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    sample(quantized_unet, scheduler, noise, 2, callback=lambda first, step, t, x_t: visited.append((x_t.clone(), t)))
    x_t = torch.cat([x for x, _ in visited])
    timesteps = torch.stack([torch.as_tensor(t).reshape(()) for _, t in visited])
    expected = quantized_unet(x_t, timesteps).sample
    graph = capture(quantized_unet, (1, 8, 8), {}).graph
    fuse(graph)

    def choose(calls):
        return [WIDE if index % 2 else DIRECT for index in range(len(calls))]

    assert to_triton(graph, choose) == 41
    left = [str(node.target) for node in graph.graph.nodes if "pqcad" in str(node.target)]
    assert left
    assert all("triton" in name or "pqcad.quantize" in name for name in left)
    assert sum("triton_norm_silu_quantize" in name for name in left) == QUANTIZERS
    found = graph.to(DEVICE)(x_t.to(DEVICE), timesteps.to(DEVICE), {}).cpu()
    reached = sorted(sqnr(a, b) for a, b in zip(expected, found, strict=True))
    assert reached[len(reached) // 2] > 45


class Layers(nn.Module):
    """A convolution of 32 channels, and a linear on its pixels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("conv", pack(integers(generator, 4, 32, 288), 4))
        self.register_buffer("linear", pack(integers(generator, 4, 40, 32), 4))
        self.register_buffer("scale", torch.rand(40, generator=generator))

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ones, scale = [1, 1], x.new_ones(x.shape[0], 1, dtype=torch.float32)
        geometry = (4, [32], [3, 3], ones, ones, ones, 1, torch.float32, 4)
        image = torch.ops.pqcad.conv2d(x, self.conv, self.scale[:32], scale, None, *geometry)
        rows = torch.ops.pqcad.linear(tokens, self.linear, self.scale, scale, self.scale, 4, [32], torch.float32)
        return image, rows


def test_a_graphs_layers_become_the_copy_engines():
    generator = torch.Generator().manual_seed(1)
    inputs = integers(generator, 4, 2, 32, 8, 8), integers(generator, 4, 2, 40, 32)
    layers = Layers()
    graph = torch.export.export(layers, inputs).module(check_guards=False)
    asked = []

    def choose(calls):
        asked.extend(calls)
        return ["tma-64x64x32"] * len(calls)

    assert to_triton(graph, choose) == 2
    assert [tuple(call[0].shape) for call in asked] == [(2, 32, 8, 8), (2, 32, 40, 1)]  # tokens are an image
    assert sum("tma_conv2d" in str(node.target) for node in graph.graph.nodes) == 2
    for output, expected in zip(graph.to(DEVICE)(*on_device(inputs)), layers(*inputs), strict=True):
        torch.testing.assert_close(output.cpu(), expected, rtol=1e-5, atol=1e-4)


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
    for form in (str(gpu.DIRECT[0]), str(gpu.WIDE[0])):

        def show(graph, inputs):
            print(form.split("-")[0], sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
            return graph

        def layer(*tensors):
            return torch.ops.pqcad.triton_conv2d(*tensors, *options, form)

        found = aot_function(layer, fw_compiler=show)(*tensors)
        print(tuple(found.shape), found.dtype, found.is_contiguous(memory_format=torch.channels_last))
"""


def test_a_compiler_sees_the_kernels():
    """Traced with fake tensors, the operator is its kernels: one, or two for the wide form."""
    lines = run_compiled(TRACE).splitlines()
    assert lines[::2] == ["direct 1", "wide 2"]
    assert set(lines[1::2]) == {"(2, 4, 6, 6) torch.bfloat16 True"}


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pqcad_ao.ops.triton import kernels as gpu, norm, tma

KINDS = {name: "*i8" for name in ("input", "inputs", "planes", "weights", "first", "second")}
KINDS |= {name: "*fp32" for name in ("weight_scale", "input_scale", "bias", "addend")}
KINDS |= {"weight": "*u8", "output": "*bf16", "scale": "*fp32", "low": "*i16", "eps": "fp32"}

def compiled(kernel, capability, constants, warps=4, stages=2):
    kernel = kernel.fn if hasattr(kernel, "configs") else kernel
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else KINDS.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(kernel.__name__, capability, *sorted(set(re.findall(r"(?:wgmma|mma)\\S*s8\\.s8\\S*", built.asm["ptx"]))))

SIZES = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 64}
END = {"TWO": True, "BIAS": True, "ADDEND": True, "EACH_PIXEL": True}
for capability in (80, 90):
    for bits, pairs in ((4, True), (5, False), (8, True)):
        shape = {"KERNEL_H": 3, "KERNEL_W": 3, "BITS": bits, "PAIRS": pairs, "DIVISOR": 64, "FAR": False}
        compiled(gpu._direct_kernel, capability, {**shape, **END, **SIZES})
    compiled(gpu.widen, capability, {"BITS": 4, "PAIRS": True, "COLUMNS": 16, "DEPTH": 256})
    shape = {"NORM": True, "WEIGHT": True, "ACTIVATE": True, "UPSAMPLE": 1, "BLOCK": 24}
    shape |= {"PIXELS": 128, "CHANNELS": 32, "WHOLE": capability == 90, "EVEN": False}
    compiled(norm._norm_silu_quantize, capability, {"TWO": True, "BIAS": True, **shape}, 8)
KINDS |= {"image": "tensordesc<i8[1, 4, 32, 128]>", "filters": "tensordesc<i8[128, 128]>"}
shape = {"KERNEL_H": 3, "KERNEL_W": 3, "DILATION_H": 1, "DILATION_W": 1, "COLUMNS": 128, "DEPTH": 128}
compiled(tma._tma_kernel, 90, {**shape, **END, "IMAGES": 1, "TILE_H": 4, "TILE_W": 32}, 8, 4)
"""


def test_the_kernels_compile_to_int8_products():
    """For Ampere and Hopper, with the assembler that Triton brings along: no GPU is needed for it."""
    lines = run_compiled(COMPILE).splitlines()
    assert len(lines) == 11
    for line in lines:
        name, capability, *products = line.split()
        if name in ("_direct_kernel", "_tma_kernel"):
            wide = capability == "90"
            assert products
            assert all(product.startswith("wgmma" if wide else "mma.sync") for product in products)


@pytest.mark.parametrize(
    ("batch", "size", "channels", "stride", "engine", "form"),
    [
        (256, 32, 256, 1, True, "tma-128x256x128"),
        (256, 32, 128, 1, True, "tma-256x128x128"),
        (256, 8, 256, 1, True, "tma-128x256x128"),  # 128 blocks for 132 processors are one each
        (64, 8, 256, 1, True, "tma-64x64x128"),
        (1, 16, 128, 1, True, "direct-16x64x128"),  # 256 pixels: large blocks would leave most processors idle
        (64, 32, 128, 2, True, "wide-64x128x128"),  # the copy engine's boxes are dense
        (64, 32, 96, 1, True, "tma-128x64x32"),
        (64, 32, 20, 1, True, "wide-64x64x64"),
        (256, 32, 256, 1, False, "wide-64x128x128"),
    ],
)
def test_a_shapes_form(batch, size, channels, stride, engine, form):
    x = torch.zeros(batch, channels, size, size, dtype=torch.int8, device="meta")
    packed, scales = torch.zeros(channels, 9 * channels // 2), torch.ones(channels)
    geometry = ([3, 3], [stride] * 2, [1, 1], [1, 1], 1)
    call = (x, packed, scales, torch.ones(batch, 1), None, 4, [channels], *geometry, torch.bfloat16, 4, None)
    assert forms.form_of(call, 132, engine) == form


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


def test_rocm_is_taken_for_no_hopper(monkeypatch):
    """Its capabilities are numbers of its own: (9, 4) is an MI300, which has no copy engine."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert forms.has_copy_engine(torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not forms.has_copy_engine(torch.device("cuda", 0))


def test_without_triton_the_graph_stays(monkeypatch):
    gpu_kernels.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    graph = torch.fx.symbolic_trace(nn.Identity())
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert to_triton(graph) == 0
    monkeypatch.undo()
    gpu_kernels.cache_clear()
