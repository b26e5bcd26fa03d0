"""The cut at a skip concatenation: the shallow program computes what the full one does, with little of its work."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from networks import SHAPE, TINY_TEXT_UNET, TINY_UNET, Plain, Small, cosine_scheduler, quick
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pqcad_ao import quantize_
from pqcad_ao.diffusion.calibration import CalibrationSet
from pqcad_ao.graph.capture import capture
from pqcad_ao.graph.plan import resolve
from pqcad_ao.graph.work import multiply_adds
from pqcad_ao.learn.ptq import calibrate, prepare
from pqcad_ao.passes.cache_split import cache_split

SMALL = "no diffusers model"
DIFFUSERS = {
    "attention in the middle": lambda: UNet2DModel(**TINY_UNET),
    "attention in the outermost block": lambda: UNet2DModel(
        **{**TINY_UNET, "down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
    ),
    "two resnets a block, classes": lambda: UNet2DModel(**TINY_UNET | {"layers_per_block": 2, "num_class_embeds": 3}),
    "text": lambda: UNet2DConditionModel(**TINY_TEXT_UNET),
}
NETWORKS = {**DIFFUSERS, SMALL: Small}


def conditioning_of(network: nn.Module, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    config: Any = getattr(network, "config", {})
    if config.get("num_class_embeds"):
        return {"class_labels": torch.randint(3, (rows,), generator=generator)}
    if config.get("cross_attention_dim"):
        return {"encoder_hidden_states": torch.randn(rows, 5, 12, generator=generator)}
    return {}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def graph_of(network: nn.Module, form: str) -> torch.fx.GraphModule:
    """The captured graph: in floating point, with calibrated fake quantizers in it, or of the quantized network."""
    conditioning = conditioning_of(network, 3)
    if form == "quantized":
        options = {"scheduler": cosine_scheduler(), "conditioning": conditioning, "progress": False}
        quantize_(network, quick(), sample_shape=SHAPE, **options)
    captured = capture(network, SHAPE, conditioning)
    if form != "prepared":
        return captured.graph
    resolved, config = resolve(captured, network, quick()), quick(calibration_points=8)
    graph = prepare(captured, resolved, config, 1000)
    t = torch.arange(8) * 125
    points = CalibrationSet(torch.randn(8, *SHAPE), t, conditioning_of(network, 8))
    calibrate(graph, resolved, points, config, callback=None, progress=False)
    return graph


@pytest.mark.parametrize("form", ["float", "prepared", "quantized"])
@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in DIFFUSERS), SMALL])
@torch.no_grad()
def test_shallow_is_full_bit_for_bit(name: str, form: str):
    graph = graph_of(made(name), form)
    x_t, timesteps = torch.randn(5, *SHAPE), torch.tensor([0, 250, 500, 999, 3])
    inputs = (x_t, timesteps, conditioning_of(made(name), 5))
    expected, branches = graph(*inputs), 0
    work = 0
    for branch in range(1, 99):
        try:
            cut = cache_split(graph, branch)
        except ValueError:
            break
        prediction, feature = cut.full(*inputs)
        assert torch.equal(prediction, expected)
        assert tuple(feature.shape) == (5, *cut.feature_shape)
        assert torch.equal(cut.shallow(*inputs, feature), expected)
        assert not torch.equal(cut.shallow(*inputs, feature + 1), expected)
        assert work < cut.shallow_macs < cut.full_macs == multiply_adds(graph)
        work, branches = cut.shallow_macs, branch
    config: Any = getattr(made(name), "config", None)
    assert branches == (1 if config is None else 2 * (config.layers_per_block + 1))
    assert torch.equal(graph(*inputs), expected)  # the graph itself is as it was


def test_weights_are_shared_and_the_deep_half_is_gone():
    """torch counts dropout and attention as impure: its own elimination would leave nearly all of the network."""
    network = made("attention in the middle")
    cut = cache_split(capture(network, SHAPE, {}).graph)
    own = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    for program in (cut.full, cut.shallow):
        held = {name.removeprefix("unet."): parameter.data_ptr() for name, parameter in program.named_parameters()}
        assert held.items() <= own.items()
    assert len(list(cut.shallow.parameters())) < len(list(cut.full.parameters())) / 3
    assert cut.shallow_macs < 0.13 * cut.full_macs
    assert not [node for node in cut.shallow.graph.nodes if "scaled_dot_product" in str(node.target)]


@pytest.mark.parametrize("name", [pytest.param("text", marks=pytest.mark.slow), SMALL])
def test_work_is_what_pytorch_counts(name: str):
    network = made(name)
    graph = capture(network, SHAPE, conditioning_of(network, 3)).graph
    inputs = (torch.randn(2, *SHAPE), torch.tensor([3, 7]), conditioning_of(network, 2))
    # that counter does not know the processor's own attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        graph(*inputs)
    assert multiply_adds(graph) == counter.get_total_flops() / 2 / 2  # of two samples, and two operations each


class InPlace(Plain):
    """Activations in place on both sides of the cut; ``harm`` changes the deep image itself, after it was joined."""

    def __init__(self, harm: bool = False) -> None:
        super().__init__()
        self.harm = harm

    def build(self) -> None:
        self.down, self.up = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.join = nn.Conv2d(16, 8, 3, padding=1)

    def middle(self, h: Tensor) -> Tensor:
        h = F.silu(h, inplace=True)
        inner = F.interpolate(F.silu(self.down(h), inplace=True), scale_factor=2.0)
        inner = self.up(inner)
        both = torch.cat([inner, h], 1)
        if self.harm:
            both = both + inner.mul_(2).mean()
        both.flatten(2).mul_(2)  # by way of a view
        return self.join(both)


@torch.no_grad()
def test_what_is_changed_in_place_is_changed_in_both():
    network = InPlace().eval()
    cut = cache_split(capture(network, SHAPE, {}).graph)
    x_t, t = torch.randn(2, *SHAPE), torch.tensor([10, 900])
    prediction, feature = cut.full(x_t, t, {})
    assert torch.equal(prediction, network(x_t, t))
    assert torch.equal(cut.shallow(x_t, t, {}, feature), prediction)
    assert cut.shallow_macs < cut.full_macs


def test_a_feature_that_is_changed_in_place_is_refused():
    with pytest.raises(ValueError, match=r"changes conv2d_\d, which would be kept from step to step, in place"):
        cache_split(capture(InPlace(harm=True).eval(), SHAPE, {}).graph)


class Masked(Plain):
    """Reads a mask beside x_t: joined along the channels, and no skip."""

    def build(self) -> None:
        self.first = nn.Conv2d(2, 8, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x.abs()], 1), t)


@pytest.mark.parametrize("network", [Plain(), Masked()], ids=["plain", "masked"])
def test_a_network_without_skips_is_refused(network: nn.Module):
    with pytest.raises(ValueError, match="branch=1: the network has 0 skip concatenations"):
        cache_split(capture(network, SHAPE, {}).graph)


def test_a_branch_that_is_not_there_is_refused():
    graph = capture(Small(), SHAPE, {}).graph
    for branch in (0, -1, 2):
        with pytest.raises(ValueError, match=f"branch={branch}: the network has 1 .* allowed are 1 to 1"):
            cache_split(graph, branch)
