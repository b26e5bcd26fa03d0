"""Convolutions as linears, upsampling as products, sampling steps: the same function, of any geometry."""

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import SHAPE, Plain, cosine_scheduler, quick, sqnr
from torch import nn
from torch.nn import functional as F

from pqcad_ao import quantize_
from pqcad_ao.denoiser import Denoiser
from pqcad_ao.edge.storage import check_objective, plan_edge
from pqcad_ao.passes.fold_constants import fold_constants
from pqcad_ao.passes.nearest import TARGETS, decompose_nearest
from pqcad_ao.passes.sampling_step import add_sampling_step, step_table
from pqcad_ao.passes.shifted_conv import ShiftedConv, to_image, to_tokens
from pqcad_ao.passes.to_xnnpack import to_xnnpack

SCHEDULE = torch.tensor([999, 400, 3])


@st.composite
def geometries(draw):
    def pair(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    kernel, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 2)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    image = tuple(n + draw(st.integers(0, 5)) for n in least)
    shifted = ShiftedConv(kernel, stride, padding, dilation, image)
    # it meets more than padding
    assume(any(-shifted.output[1] < shift < shifted.places[1] for shift in shifted.shifts()))
    return shifted


@given(geometries(), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_a_shifted_linear_is_the_convolution(shifted, batch, channels, outputs, chance):
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    x = torch.randint(-8, 8, (batch, channels, *shifted.image), generator=generator).float()
    weight = torch.randint(-8, 8, (outputs, channels, *shifted.kernel_size), generator=generator).float()
    expected = F.conv2d(x, weight, None, shifted.stride, shifted.padding, shifted.dilation)
    assert tuple(expected.shape[2:]) == shifted.output
    values = torch.cat(shifted.gather(x, channels), 1)
    assert values.shape[1] == shifted.inputs(channels)
    tokens = to_tokens(values, values.shape[1], shifted.places)
    images = [to_image(F.linear(tokens, of_column), outputs, shifted.places) for of_column in shifted.weights(weight)]
    assert torch.equal(shifted.scatter(images), expected), "integers: not a bit may differ"
    column = shifted.unshifted()
    assert column is None or shifted.shifts()[column] == 0


class Odd(Plain):
    """Kernels and strides that no UNet has, an odd number of channels, and a group."""

    def build(self):
        self.wide = nn.Conv2d(8, 5, (1, 3), padding=(0, 2))
        self.tall = nn.Conv2d(5, 6, (3, 2), dilation=(1, 2))
        self.down = nn.Conv2d(6, 8, 2, stride=2)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def middle(self, h):
        inner = self.grouped(F.silu(self.down(F.silu(self.tall(F.silu(self.wide(h)))))))
        return h + F.interpolate(inner, size=h.shape[2:], mode="nearest")


def captured(model: nn.Module, batch: int = 2):
    quantize_(model, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    x, t = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.full((batch,), 400)
    with torch.no_grad():
        graph = torch.export.export(Denoiser(model), (x, t, {})).module(check_guards=False)
        return fold_constants(graph), x, t, model(x, t)


@torch.no_grad()
def test_layers_of_any_geometry_are_packed():
    graph, x, t, expected = captured(Odd())
    plan = plan_edge(graph, "size")
    packed = {"wide", "tall", "down"}
    assert plan.packed == packed
    reasons = {layer.fqn: layer.reason for layer in plan.layers}
    assert (reasons["grouped"], reasons["first"]) == ("grouped", "weights of 8 bits")
    arithmetic = to_xnnpack(graph, packed)
    assert {fqn for fqn, text in arithmetic.items() if "int4" in text} == packed
    groups = {node.args[6] for node in graph.graph.nodes if node.target is F.conv2d}
    assert groups == {1, 2}, "windows are gathered without a depthwise convolution and its weights"
    assert sqnr(expected, graph(x, t, {})) > 100


@torch.no_grad()
def test_layers_that_cannot_be_packed_are_named():
    with pytest.raises(ValueError, match="grouped has no form with weights of two a byte"):
        to_xnnpack(captured(Odd())[0], ["grouped"])
    with pytest.raises(ValueError, match="no quantized layers elsewhere"):
        to_xnnpack(captured(Odd())[0], ["elsewhere"])


@torch.no_grad()
def test_a_plan_saves_what_it_is_asked_for_and_no_more_than_it_must():
    graph = captured(Odd())[0]
    every, speed = plan_edge(graph, "size"), plan_edge(graph, "speed")
    assert speed.saved <= every.saved
    for to_save in range(0, every.saved + 1, 7):
        plan = plan_edge(graph, "speed", to_save)
        assert plan.saved >= to_save
        paid = [row for row in plan.layers if row.packed and row.extra_ms > 0]
        assert not paid or min(plan.saved - (row.byte_weights - row.bytes) for row in paid) < to_save
    with pytest.raises(ValueError, match=r"saves [\d,]+ bytes, [\d,]+ are asked for"):
        plan_edge(graph, "speed", every.saved + 1)
    with pytest.raises(ValueError, match="max_bytes=True"):
        check_objective("size", True)


@given(st.tuples(*[st.integers(1, 3)] * 4), st.tuples(st.integers(1, 4), st.integers(1, 4)))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_nearest_upsampling(shape, factors):
    class Up(nn.Module):
        def forward(self, x):
            return F.interpolate(x + 1, scale_factor=[float(f) for f in factors], mode="nearest")

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    graph = torch.export.export(Up(), (x,)).module(check_guards=False)
    decompose_nearest(graph)
    assert not any(node.target in TARGETS for node in graph.graph.nodes)
    assert torch.equal(graph(x), Up()(x))


@torch.no_grad()
def test_nearest_upsampling_by_part_of_a_pixel_stays():
    class Up(nn.Module):
        def forward(self, x):
            return F.interpolate(x, size=(5, 6), mode="nearest")

    x = torch.randn(1, 2, 3, 4)
    graph = torch.export.export(Up(), (x,)).module(check_guards=False)
    decompose_nearest(graph)
    assert any(node.target in TARGETS for node in graph.graph.nodes)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [None, 0.7])
@torch.no_grad()
def test_a_sampling_step_behind_the_prediction(prediction_type, clip):
    scheduler = DDIMScheduler(
        prediction_type=prediction_type, clip_sample=clip is not None, clip_sample_range=clip or 1.0, steps_offset=1
    )
    scheduler.set_timesteps(4)

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.linspace(0.3, 0.9, 4).view(4, 1, 1, 1))

        def forward(self, x_t, step):
            return x_t.roll(1, -1) * torch.index_select(self.table, 0, step)

    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    graph = torch.export.export(Folded(), (x, torch.tensor([0]))).module(check_guards=False)
    graph = torch.fx.GraphModule(graph, graph.graph)  # without the check of the inputs that it was exported with
    add_sampling_step(graph, scheduler.timesteps, step_table(scheduler, 4), clip)
    zero, first = torch.tensor([0]), scheduler.timesteps[:1]
    for index, t in enumerate(scheduler.timesteps):
        prediction = Folded()(x, torch.tensor([index]))
        expected = scheduler.step(prediction, t, x).prev_sample
        by_index, same = graph(x, torch.tensor([index]), first)
        assert torch.equal(same, prediction)
        assert torch.allclose(by_index, expected, atol=2e-5)
        assert torch.equal(graph(x, zero, t.view(1))[0], by_index)
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        graph(x, zero, first - 1)


def test_thresholding_is_refused():
    with pytest.raises(ValueError, match="thresholds x_0 dynamically"):
        step_table(DDIMScheduler(thresholding=True), 4)
