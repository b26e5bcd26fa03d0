"""The passes towards XNNPACK: each keeps the function, and leaves nothing of what it replaces."""

import copy
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SHAPE, Plain, Small, cosine_scheduler, quick, sqnr
from torch import nn
from torch.nn import functional as F

from pqcad_ao import quantize_
from pqcad_ao.denoiser import Denoiser
from pqcad_ao.passes.attention import decompose_attention
from pqcad_ao.passes.cache_split import cache_split
from pqcad_ao.passes.correct_feature import correct_feature
from pqcad_ao.passes.fold_constants import fold_constants
from pqcad_ao.passes.fold_timesteps import fold_timesteps
from pqcad_ao.passes.group_norm import decompose_group_norm
from pqcad_ao.passes.identities import drop_identities
from pqcad_ao.passes.layer_norm import decompose_layer_norm
from pqcad_ao.passes.pieces import SPLITS, decompose_pieces
from pqcad_ao.passes.share_equal import share_equal
from pqcad_ao.passes.to_xnnpack import ROUNDER, _measured, _rounded, _segments, _with_ends, to_xnnpack

aten = torch.ops.aten
SCHEDULE = torch.tensor([999, 400, 3])


class Grouped(Plain):
    """A depthwise and a grouped convolution."""

    def build(self):
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def middle(self, h):
        return h + self.grouped(F.silu(self.depthwise(h)))


class Reader(nn.Module):
    """Reads the timestep beside the image, as it is and as a number in the arithmetic."""

    def forward(self, x, t):
        plane = t.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return (torch.cat([x, plane], 1).sum(1, keepdim=True) + t.view(-1, 1, 1, 1)) * (t.float().sin() + 2).mean()


@pytest.fixture(scope="module")
def quantized() -> Small:
    return quantize(Small())


def quantize(model: nn.Module, **options) -> nn.Module:
    quantize_(model, quick(**options), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    return model


def graph_of(model: nn.Module, *args):
    """The exported graph of ``model`` and its timestep placeholder."""
    with torch.no_grad():
        graph = torch.export.export(model, args).module(check_guards=False)
    return graph, [node for node in graph.graph.nodes if node.op == "placeholder"][1]


def noise(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))


def at(timestep: int, batch: int = 2) -> torch.Tensor:
    return torch.full((batch,), timestep)


def targets(graph) -> set:
    return {node.target for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["float", "quantized"])
@torch.no_grad()
def test_folded_timesteps_give_the_same_function(quantized, kind, batch):
    model = quantized if kind == "quantized" else Small()
    graph, timesteps = graph_of(Denoiser(model), noise(batch), at(500, batch), {})
    assert fold_timesteps(graph, timesteps, SCHEDULE) is graph
    assert [node.target for node in graph.graph.nodes if node.op == "placeholder"] == ["x_t", "step"]
    for step, t in enumerate(SCHEDULE):
        expected = model(noise(batch), at(int(t), batch))
        assert sqnr(expected, graph(noise(batch), torch.tensor([step]), {})) > 100


@torch.no_grad()
def test_folded_timesteps_leave_one_table_of_one_row_for_each_step():
    graph, timesteps = graph_of(Denoiser(Small()), noise(3), at(500, 3), {})
    fold_timesteps(graph, timesteps, SCHEDULE)
    (table,) = (value for name, value in graph.named_buffers() if name.startswith("steps_"))
    assert table.shape == (3, 8, 1, 1), "eight channels of the time layer, once for the whole batch"
    assert not any(str(node.target).startswith("time.") for node in graph.graph.nodes)


@torch.no_grad()
def test_folded_timesteps_that_are_read_as_they_are():
    model = Reader()
    graph, timesteps = graph_of(model, noise(2), at(500, 2))
    fold_timesteps(graph, timesteps, SCHEDULE)
    assert {str(value.dtype) for value in graph.buffers()} == {"torch.int64", "torch.float32"}
    for step, t in enumerate(SCHEDULE):
        assert torch.allclose(graph(noise(2), torch.tensor([step])), model(noise(2), at(int(t), 2)))


@torch.no_grad()
def test_folded_timesteps_are_not_spread_over_an_image():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("plane", torch.ones(1, 1, 8, 8))

        def forward(self, x, t):
            return torch.cat([x, t.float().view(-1, 1, 1, 1) * self.plane], 1)

    graph, timesteps = graph_of(Spread(), noise(1), at(500, 1))
    fold_timesteps(graph, timesteps, SCHEDULE)
    assert graph.steps_float32.shape == (3, 1, 1, 1)
    assert graph(noise(1), torch.tensor([2]))[:, 1].unique().tolist() == [3]


@torch.no_grad()
def test_folded_timesteps_of_a_chunk():
    """As scale-shift norms read it: an operator whose value is a list."""

    class Shifted(Plain):
        def build(self):
            self.both = nn.Linear(1, 16)

        def forward(self, x, t):
            scale, shift = self.both(t.view(-1, 1) / 1000)[:, :, None, None].chunk(2, dim=1)
            return self.last(self.first(x) * (1 + scale) + shift)

    model = Shifted()
    graph, timesteps = graph_of(model, noise(3), at(500, 3))
    fold_timesteps(graph, timesteps, SCHEDULE)
    assert graph.steps_float32.shape == (3, 16, 1, 1)
    assert not targets(graph) & {*SPLITS, aten.linear.default}
    for step, t in enumerate(SCHEDULE):
        assert sqnr(model(noise(3), at(int(t), 3)), graph(noise(3), torch.tensor([step]))) > 100


@torch.no_grad()
def test_folded_constants_are_buffers(quantized):
    graph, _ = graph_of(Denoiser(quantized), noise(), at(400), {})
    expected = graph(noise(), at(400), {})
    fold_constants(graph)
    assert torch.equal(graph(noise(), at(400), {}), expected)
    constant = {node for node in graph.graph.nodes if node.op == "get_attr"}
    for node in graph.graph.nodes:
        if node.op == "call_function":
            assert not constant.issuperset(node.all_input_nodes) or not node.all_input_nodes, f"{node} is a constant"


@torch.no_grad()
def test_xnnpack_form_is_the_same_function(quantized):
    graph, _ = graph_of(Denoiser(quantized), noise(), at(400), {})
    arithmetic = to_xnnpack(graph)
    assert not targets(graph) & {torch.ops.pqcad.conv2d.default, torch.ops.pqcad.linear.default}
    assert sqnr(quantized(noise(), at(400)), graph(noise(), at(400), {})) > 100
    assert arithmetic["first"] == "W8A8: int8 × int8 products, float32 result, exact"
    assert arithmetic["join"] == "W4A4: int8 × int8 products, float32 result, exact"
    assert arithmetic["to_q"] == "W4A4: int8 × int4 products, float32 result, exact"


@pytest.mark.parametrize("bits", range(2, 8))
@torch.no_grad()
def test_xnnpack_form_is_exact_at_every_width(bits):
    model = quantize(Small(), weight_bits=bits, activation_bits=bits)
    graph, _ = graph_of(Denoiser(model), noise(), at(400), {})
    to_xnnpack(graph)
    assert sqnr(model(noise(), at(400)), graph(noise(), at(400), {})) > 100


@torch.no_grad()
def test_xnnpack_form_of_grouped_convolutions_is_float32_and_says_so():
    model = quantize(Grouped())
    graph, _ = graph_of(Denoiser(model), noise(), at(400), {})
    arithmetic = to_xnnpack(graph)
    assert all(arithmetic[name].startswith("W4A4: float32 products") for name in ("depthwise", "grouped"))
    assert sqnr(model(noise(), at(400)), graph(noise(), at(400), {})) > 100


def test_xnnpack_form_refuses_another_quantization(quantized):
    graph, _ = graph_of(Denoiser(quantized), noise(), at(400), {})
    for node in graph.graph.nodes:
        if node.target is torch.ops.pqcad.quantize.default:
            node.target, node.args = aten.floor.default, node.args[:1]
    with pytest.raises(NotImplementedError, match=r"first: its input comes from aten\.floor"):
        to_xnnpack(graph)


@given(st.floats(2.0**-20, 2.0**20, width=32), st.integers(2, 8), st.integers(-128, 127), st.integers(0, 2**31))
@settings(max_examples=300, deadline=None)
def test_values_are_rounded_to_the_grid_as_the_operator_does(scale, bits, first, seed):
    """By what XNNPACK measures between the pinned ends, and in float32."""
    first = min(first, 128 - 2**bits)
    scales, low = torch.tensor([[scale]]), torch.tensor([[first]], dtype=torch.int16)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)) * scale * 2**bits
    x = torch.cat([x, torch.tensor([[1e30, -1e30, 0.0, (first + 0.5) * scale, first * scale]])], 1)
    integers = torch.ops.pqcad.quantize(x, scales, low, [x.shape[1]], bits, 1)
    ((values, found),) = _segments(x, scales, low, bits, [x.shape[1]], 1, 2)
    measured = _measured(_with_ends([values], torch.ones(1, 1), found, 1, 2))
    assert measured[0, -1] > measured[0, -2], "the ends are the last channels"
    for rounded in (measured[:, :-2], _rounded(values, found)):
        torch.testing.assert_close(rounded, integers * scales, rtol=1e-5, atol=0)
    assert ROUNDER + 2**8 < 2**24, "the grid's integers stay exact"


def group_norm(affine: bool) -> nn.Module:
    return nn.GroupNorm(3, 12, affine=affine)


def layer_norm(affine: bool) -> nn.Module:
    return nn.LayerNorm(12, eps=1e-3, elementwise_affine=affine)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("make", "decompose", "shape"),
    [
        (group_norm, decompose_group_norm, (2, 12, 5, 7)),
        (group_norm, decompose_group_norm, (2, 12, 9)),
        (layer_norm, decompose_layer_norm, (2, 5, 12)),
        (layer_norm, decompose_layer_norm, (3, 12)),
    ],
    ids=["group norm of an image", "of a sequence", "layer norm of tokens", "of rows"],
)
@torch.no_grad()
def test_norm(make, decompose, shape, affine):
    norm = make(affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    graph = torch.export.export(norm, (x,)).module(check_guards=False)
    decompose(graph)
    assert not {aten.group_norm.default, aten.layer_norm.default} & set(targets(graph))
    assert torch.allclose(graph(x), norm(x), atol=1e-5)
    shifted = x + 1000  # a mean far above the deviation: a difference of squares would lose it
    exact = copy.deepcopy(norm).double()(shifted.double())
    assert (graph(shifted) - exact).abs().max() < 3 * (norm(shifted) - exact).abs().max() + 1e-4


@torch.no_grad()
def test_layer_norm_over_images_stays():
    norm = nn.LayerNorm((5, 12))
    graph = torch.export.export(norm, (torch.zeros(2, 5, 12),)).module(check_guards=False)
    decompose_layer_norm(graph)
    assert aten.layer_norm.default in targets(graph)


@torch.no_grad()
def test_pieces_are_slices_and_views():
    class Pieces(nn.Module):
        def forward(self, x):
            *first, rest = x.chunk(3, dim=-1)  # of sizes 4, 4 and 2
            one, two = x.split([3, 7], dim=2)
            halves = x.split(2, dim=1)
            return [*(piece.unsqueeze(1) for piece in (*first, one, halves[-1])), rest[:, None], two]

    x = torch.randn(2, 3, 10)
    graph = torch.export.export(Pieces(), (x,)).module(check_guards=False)
    decompose_pieces(graph)
    assert targets(graph) <= {aten.slice.Tensor, aten.view.default}
    for expected, found in zip(Pieces()(x), graph(x), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("lead", [(2, 3), (2,)], ids=["heads", "one head"])
@pytest.mark.parametrize("scale", [None, 0.3])
@torch.no_grad()
def test_attention(lead, scale):
    class Attention(nn.Module):
        def forward(self, query, key, value):
            return F.scaled_dot_product_attention(query, key, value, scale=scale)

    generator = torch.Generator().manual_seed(0)
    args = tuple(torch.randn(*lead, *size, generator=generator) for size in ((5, 8), (7, 8), (7, 6)))
    graph = torch.export.export(Attention(), args).module(check_guards=False)
    decompose_attention(graph)
    assert aten.scaled_dot_product_attention.default not in targets(graph)
    assert torch.allclose(graph(*args), Attention()(*args), atol=1e-6)


@torch.no_grad()
def test_attention_with_a_mask_stays():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    graph = torch.export.export(Masked(), (torch.zeros(1, 2, 4, 8), torch.zeros(4, 4))).module(check_guards=False)
    decompose_attention(graph)
    assert aten.scaled_dot_product_attention.default in targets(graph)


@torch.no_grad()
def test_identities_are_dropped_and_nothing_else():
    class Idle(nn.Module):
        def forward(self, x):
            y = F.dropout(x, 0.5, self.training).to(torch.float32) / 1.0 * 1
            return y * 2 + torch.arange(8).to(torch.float32)

    x = noise()
    graph = torch.export.export(Idle().eval(), (x,)).module(check_guards=False)
    drop_identities(graph)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert sorted(map(str, called)) == ["aten.add.Tensor", "aten.arange.default", "aten.mul.Tensor", "aten.to.dtype"]
    assert torch.equal(graph(x), Idle().eval()(x))


def test_products_by_one_that_do_something_stay():
    def copies(x):
        y = x / 1.0
        y += 3
        return x + y

    def rounds(x):
        return torch.div(x, 1, rounding_mode="floor") + torch.mul(x, other=x)

    for function in (copies, rounds):
        x = noise()
        graph = torch.fx.symbolic_trace(function)
        assert torch.equal(drop_identities(graph)(x.clone()), function(x.clone()))


def test_products_by_one_go_from_dynamos_graphs():
    """Its inputs have names such as L_x_, which is no operator in place."""
    seen = []

    def backend(graph, inputs):
        seen.append(len(drop_identities(graph).graph.nodes))
        return graph.forward

    torch.compile(lambda x: torch.relu(x) / 1.0 + 2, backend=backend)(noise())
    assert seen == [4]  # input, relu, sum, output


@torch.no_grad()
def test_timesteps_changed_in_place_are_refused():
    class Changes(nn.Module):
        def forward(self, x, t):
            scale = t.float()[:, None].repeat(1, 4)
            scale[:, :2].add_(1)
            return x * scale[:, :1, None, None]

    graph, timesteps = graph_of(Changes(), noise(1), at(500, 1))
    with pytest.raises(ValueError, match=r"in place .*add_.* out of place"):
        fold_timesteps(graph, timesteps, SCHEDULE)


def test_every_pass_in_turn_keeps_the_function(quantized):
    graph, timesteps = graph_of(Denoiser(quantized), noise(), at(500), {})
    with torch.no_grad():
        drop_identities(graph)
        fold_constants(graph)
        to_xnnpack(graph)
        fold_timesteps(graph, timesteps, SCHEDULE)
        decompose_group_norm(graph)
        decompose_attention(graph)
        for step, t in enumerate(SCHEDULE):
            reached = sqnr(quantized(noise(), at(int(t))), graph(noise(), torch.tensor([step]), {}))
            assert reached > 80 or math.isinf(reached)


@torch.no_grad()
def test_a_feature_is_corrected_by_the_line_of_its_step(quantized):
    captured, _ = graph_of(Denoiser(quantized), torch.zeros(2, *SHAPE), torch.zeros(2, dtype=torch.int64), {})
    graph = cache_split(captured).shallow
    fold_timesteps(graph, [node for node in graph.graph.nodes if node.op == "placeholder"][1], SCHEDULE)
    before = copy.deepcopy(graph)
    scale, shift = torch.randn(2, len(SCHEDULE), 8)
    correct_feature(graph, scale, shift)
    x_t, feature = torch.randn(2, *SHAPE), torch.randn(2, 8, 8, 8)
    for step in range(len(SCHEDULE)):
        corrected = feature * scale[step].view(1, -1, 1, 1) + shift[step].view(1, -1, 1, 1)
        inputs = (x_t, torch.tensor([step]), {})
        assert torch.equal(graph(*inputs, feature), before(*inputs, corrected))


@torch.no_grad()
def test_what_is_computed_twice_is_computed_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("plane", torch.arange(4.0))

        def forward(self, x):
            first, second = (x[:, 1:] + 1).sigmoid() * self.plane, (x[:, 1:] + 1).sigmoid() * self.plane
            return first + 2 * second - (x[:, 2:] + 1).sum(), torch.rand_like(x), torch.rand_like(x)

    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    graph = torch.export.export(Twice(), (x,)).module(check_guards=False)
    share_equal(graph)
    counts = Counter(node.target for node in graph.graph.nodes)
    assert (counts["plane"], counts[aten.sigmoid.default], counts[aten.add.Tensor]) == (1, 1, 3)
    assert counts[aten.rand_like.default] == 2
    assert torch.equal(graph(x)[0], Twice()(x)[0])


@torch.no_grad()
def test_what_a_graph_changes_in_place_is_not_shared():
    class Changed(nn.Module):
        def forward(self, x):
            first, second = x + 1, x + 1
            return first.mul_(2) + second

    x = torch.ones(2)
    graph = torch.export.export(Changed(), (x,)).module(check_guards=False)
    assert torch.equal(share_equal(graph)(x), torch.full((2,), 6.0))
