"""The table of operators: every row holds together, and a layer of each kind goes all the way."""

import ast
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SHAPE, Plain, cosine_scheduler, quick, sqnr
from operators import integers
from torch import Tensor, nn
from torch.nn import functional as F

from pqcad_ao import PQCADConfig, export_pte, load_quantized, plan, quantize_, save_quantized
from pqcad_ao.graph.operators import OPERATORS, packed_weight
from pqcad_ao.nn.layers import QuantizedLayer, quantized_class
from pqcad_ao.nn.timestep import Timestep

QUANTIZED = [kind for kind, row in OPERATORS.items() if row.quantized is not None]
ROOT = Path(__file__).parents[1]


class Layered(Plain):
    """A layer in the middle of a network, on an image, a sequence (B, C, L) or tokens (B, L, C)."""

    def __init__(self, layer: nn.Module, form: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.form = layer, form
        self.eval()

    def middle(self, h: Tensor) -> Tensor:
        if self.form == "image":
            return self.layer(h)
        sequence = h.flatten(2)
        tokens = self.form == "tokens"
        mixed = self.layer(sequence.transpose(1, 2)).transpose(1, 2) if tokens else self.layer(sequence)
        return mixed.reshape(h.shape)


class Pooled(Layered):
    """A layer that makes an image twice as large."""

    def middle(self, h: Tensor) -> Tensor:
        return self.layer(F.avg_pool2d(h, 2))


# One layer of every kind that has a quantized form, in a network around it.
LAYERS = {
    "linear": lambda: Layered(nn.Linear(8, 8), "tokens"),
    "conv2d": lambda: Layered(nn.Conv2d(8, 8, 3, padding=1, groups=2), "image"),
    "conv1d": lambda: Layered(nn.Conv1d(8, 8, 3, padding="same"), "sequence"),
    "conv_transpose2d": lambda: Pooled(nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1), "image"),
}


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[kind]()


def quantized(model: nn.Module, config: PQCADConfig | None = None, **options) -> nn.Module:
    config = config or quick(**options)
    quantize_(model, config, scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    return model


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 500, 900])


# The table


def test_every_quantized_kind_has_a_case():
    assert set(LAYERS) == set(QUANTIZED)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_row_names_what_there_is(kind):
    row = OPERATORS[kind]
    form = quantized_class(row)
    assert issubclass(form, QuantizedLayer)
    assert form.kind == kind
    name = row.packed.removeprefix("pqcad::")
    assert OPERATORS[name].packed == row.packed, "a packed operator is named after the layer that it computes"
    assert getattr(torch.ops.pqcad, name).default.name() == row.packed
    assert isinstance(network(kind).layer, row.module)
    assert hasattr(network(kind).layer, row.channels)


def test_no_target_is_in_two_rows():
    targets = [target for row in OPERATORS.values() for target in row.targets]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_weight_and_back(kind, groups):
    layer, row = network(kind).layer, OPERATORS[kind]
    if row.spatial == 0:
        groups = 1
    else:
        layer = row.module(4, 6, (3, 2, 1)[: row.spatial], groups=groups)
    rows = row.layout.rows(layer.weight, groups)
    packed = row.layout.to_packed(layer.weight, groups)
    assert rows.shape == (len(packed), packed[0].numel())
    assert torch.equal(packed_weight(rows, list(packed.shape[2:])), packed)
    assert torch.equal(row.layout.weight(rows, list(packed.shape[2:]), groups), layer.weight)


# What is written of kinds of layers: a module's class, an ATen or pqcad operator of it, or its name as a string.
KIND = re.compile(r"^(torch\.)?(nn\.(Conv|Linear)\w*|(ops\.)?(aten|pqcad)\.(linear|conv\w*)\b.*)$")
# Where that may be: the table, the quantized modules, the operators themselves and the kernels that stand for them,
# those that peft has adapters of, what no network may have, betas that are linear, a network that is built of layers,
# and what ExecuTorch is asked to leave whole.
MAY_NAME_KINDS = (
    "graph/operators.py",
    *(f"nn/{kind}.py" for kind in QUANTIZED),
    "ops/",
    "nn/adapters.py",
    "graph/suitable.py",
    "diffusion/process.py",
    "passes/to_triton.py",
    "passes/sampling_step.py",  # a filter of the prediction, no layer
    "evaluate/features.py",
    "edge/lower.py",
)


def test_nothing_but_the_table_and_its_files_branches_on_kinds_of_layers():
    files = [*(ROOT / "pqcad_ao").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    named = {}
    for path in files:
        place = path.relative_to(ROOT).as_posix().removeprefix("pqcad_ao/")
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            is_name = isinstance(node, ast.Attribute) and KIND.match(ast.unparse(node))
            is_kind = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in OPERATORS
            if is_name or is_kind:
                found.add(ast.unparse(node))
        if found:
            named[place] = found
    assert "graph/operators.py" in named, "the test must see what it looks for"
    assert {place: found for place, found in named.items() if not place.startswith(MAY_NAME_KINDS)} == {}


# Each kind's module against the float layer


def module_of(layer: nn.Module, kind: str, bits: tuple[int, int | None], segments: list[int], seed: int) -> nn.Module:
    """The quantized form of ``layer`` with integers drawn for weights; the layer gets what they stand for."""
    generator, row, timestep = torch.Generator().manual_seed(seed), OPERATORS[kind], Timestep(1, 1000)
    form = quantized_class(row).like(layer, *bits, segments, timestep)
    scale = 2.0 ** torch.randint(-4, 0, (len(form.weight_scale),), generator=generator)
    bias = None if layer.bias is None else torch.randint(-9, 10, layer.bias.shape, generator=generator) / 16
    form.set_weight(integers(generator, bits[0], len(scale), form.reduction), scale, bias)
    if bits[1] is not None:
        low = -(2 ** (bits[1] - 1))
        form.set_grid(torch.full((1, len(segments)), 0.25), torch.full((1, len(segments)), low))
    layer.weight.data = form.dequantized_weight()
    if bias is not None:
        layer.bias.data = bias
    timestep.call.group = torch.zeros(2, dtype=torch.int64)
    return form


@st.composite
def layers(draw, kind: str):
    """A layer of ``kind`` with a geometry, and the sizes of an input that it takes."""
    row = OPERATORS[kind]
    groups = draw(st.sampled_from([1, 2]))
    channels = [groups * draw(st.integers(1, 4)) for _ in range(2)]
    bias = draw(st.booleans())
    if row.spatial == 0:
        return row.module(*channels, bias=bias), [draw(st.integers(1, 5))]
    kernel, stride, dilation = ([draw(st.integers(1, most)) for _ in range(row.spatial)] for most in (4, 3, 2))
    padding = [draw(st.integers(0, 2)) for _ in range(row.spatial)]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    size = [draw(st.integers(6, 9)) for _ in range(row.spatial)]
    if hasattr(row.module(1, 1, 1), "output_padding") and "ranspose" in row.module.__name__:
        options["output_padding"] = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    return row.module(*channels, kernel, **options), size


@pytest.mark.parametrize("kind", QUANTIZED)
@settings(max_examples=40)
@given(data=st.data())
@torch.no_grad()
def test_a_quantized_module_is_its_layer_on_dequantized_values(kind, data):
    """Scales are powers of two, so that the float64 layer's sums are exact, and so is float32's rescaling of them."""
    layer, size = data.draw(layers(kind))
    bits = data.draw(st.integers(2, 8)), data.draw(st.sampled_from([None, *range(2, 8)]))
    channels = getattr(layer, OPERATORS[kind].channels)
    split = data.draw(st.integers(0, channels - 1)) if getattr(layer, "groups", 1) == 1 else 0
    segments = [split, channels - split] if split and bits[1] is not None else [channels]
    seed = data.draw(st.integers(0, 2**31))
    form = module_of(layer, kind, bits, segments, seed)
    shape = [2, *size, channels] if OPERATORS[kind].channel_dim == -1 else [2, channels, *size]
    x = integers(torch.Generator().manual_seed(seed), bits[1] or 4, *shape).float() * 0.25
    expected = layer.double()(x.double())
    output = form(x)
    assert output.shape == expected.shape
    assert torch.equal(output.double(), expected)


# Each kind in a network


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_any_bits_and_the_plan_says_so(kind, bits):
    model = network(kind)
    with torch.no_grad():
        expected = model(*inputs())
        quantized(model, weight_bits=bits, activation_bits=8, calibration_points=64)
        row = plan(model)["layer"]
        assert (row.kind, row.weight_bits, row.activation_bits) == (kind, bits, 8)
        assert row.shape == list(network(kind).layer.weight.shape)
        assert type(model.layer) is quantized_class(OPERATORS[kind])
        output = model(*inputs())
    assert sqnr(expected, output) > {2: 5, 3: 8, 5: 15, 8: 20}[bits]


@pytest.mark.parametrize("kind", QUANTIZED)
@torch.no_grad()
def test_saved_and_loaded(kind, tmp_path):
    model = quantized(network(kind))
    save_quantized(model, tmp_path / "model.safetensors")
    loaded = load_quantized(network(kind), tmp_path / "model.safetensors")
    assert plan(loaded) == plan(model)
    assert torch.equal(loaded(*inputs()), model(*inputs()))


@pytest.mark.parametrize("kind", ["conv1d", "conv_transpose2d"])
def test_learned_in_a_few_updates(kind):
    model, before = network(kind), network(kind)
    config = quick(mode="fixed", iterations=4, batch_size=4)
    with torch.no_grad():
        expected = model(*inputs())
    quantized(model, config)
    with torch.no_grad():
        assert sqnr(expected, model(*inputs())) > 5
        learned = model.layer.dequantized_weight()
    assert learned.shape == before.layer.weight.shape
    assert sqnr(before.layer.weight.detach(), learned) > 5, "weights lie in the layer's own layout"


@pytest.mark.parametrize("backend", ["pqcad", "inductor"])
@pytest.mark.parametrize("kind", ["conv1d", "conv_transpose2d"])
@torch.no_grad()
def test_compiled(kind, backend):
    model = quantized(network(kind))
    expected = model(*inputs())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert sqnr(expected, compiled(*inputs())) > 60


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("conv1d", "size"),
        ("conv_transpose2d", "speed"),
        pytest.param("conv1d", "speed", marks=pytest.mark.slow),
        pytest.param("conv_transpose2d", "size", marks=pytest.mark.slow),
    ],
)
def test_exported_to_executorch(kind, objective, tmp_path):
    pytest.importorskip("executorch.runtime")
    model = quantized(network(kind))
    options = {"scheduler": cosine_scheduler(), "num_inference_steps": 2, "sample_shape": SHAPE, "progress": False}
    report = export_pte(model, tmp_path / "network.pte", objective=objective, min_sqnr_db=60, **options)
    assert "layer" in report.arithmetic
    outside = set(report.portable) - {"aten::index_select", "aten::avg_pool2d"}  # the tables, and Pooled
    assert not outside, "a layer runs in XNNPACK altogether"


def test_an_output_size_of_its_own_is_not_quantized():
    class Sized(Pooled):
        def middle(self, h):
            return self.layer(F.avg_pool2d(h, 2), output_size=[8, 8])

    rows = plan(Sized(nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1), "image"), sample_shape=SHAPE)
    assert rows["layer"].reason == "called with an output_size that its own output_padding does not give"
