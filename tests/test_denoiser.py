"""How a network is called, and with which conditioning."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from networks import TINY_TEXT_UNET, quick, sqnr

from pqcad_ao import load_quantized, plan, quantize_, save_quantized
from pqcad_ao.denoiser import Denoiser, predict, sample_shape, spread_rows, take_rows

ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
PATCHES = {"in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2}  # noise, and a variance


def class_transformer():
    network = DiTTransformer2DModel(**ATTENTION, **PATCHES, num_embeds_ada_norm=10)
    return network, {"class_labels": torch.arange(10)}


def text_transformer():
    """Its forward takes the text before the timestep."""
    text = {"caption_channels": 12, "cross_attention_dim": 16, "use_additional_conditions": False}
    return PixArtTransformer2DModel(**ATTENTION, **PATCHES, **text), {"encoder_hidden_states": torch.randn(6, 5, 12)}


def inpainting_unet():
    network = UNet2DConditionModel(**TINY_TEXT_UNET | {"in_channels": 9, "out_channels": 4})
    return network, {"encoder_hidden_states": torch.randn(6, 5, 12), "extra_channels": torch.randn(6, 5, 8, 8)}


@pytest.mark.parametrize(
    "make",
    [
        text_transformer,
        pytest.param(class_transformer, marks=pytest.mark.slow),
        pytest.param(inpainting_unet, marks=pytest.mark.slow),
    ],
)
def test_networks_that_are_called_in_other_ways(make, tmp_path):
    torch.manual_seed(0)
    network, conditioning = make()
    network.eval()
    assert sample_shape(network) == (4, 8, 8)
    config = quick(weight_bits=8, activation_bits=8)
    assert all(row.role for row in plan(network, config, conditioning=conditioning))
    reference, fresh = copy.deepcopy(network), copy.deepcopy(network)
    quantize_(network, config, scheduler=DDIMScheduler(clip_sample=False), conditioning=conditioning, progress=False)
    x_t, timesteps = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 900])
    chosen = take_rows(conditioning, torch.tensor([0, 2, 4]))
    with torch.no_grad():
        expected, found = (predict(each, x_t, timesteps, chosen) for each in (reference, network))
        assert found.shape == x_t.shape
        assert sqnr(expected, found) > 20
        compiled = torch.compile(Denoiser(network), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x_t, timesteps, chosen), found)
        save_quantized(network, tmp_path / "network.safetensors")
        load_quantized(fresh, tmp_path / "network.safetensors")
        assert torch.equal(predict(fresh, x_t, timesteps, chosen), found)


@pytest.mark.parametrize("extra", [None, torch.zeros(6, 4, 8, 8)])
def test_channels_beside_the_sample_are_asked_for_before_any_work(extra):
    network, conditioning = inpainting_unet()
    conditioning["extra_channels"] = extra
    if extra is None:
        del conditioning["extra_channels"]
    with pytest.raises(ValueError, match=r"takes 5 channels beside .* pass conditioning=\{'extra_channels'"):
        quantize_(network, quick(), scheduler=DDIMScheduler(), conditioning=conditioning)


@given(st.integers(1, 40), st.integers(1, 40))
def test_samples_share_out_all_rows_of_the_conditioning(count, rows):
    chosen = spread_rows({"nested": {"label": torch.arange(rows)}}, torch.arange(count), count)["nested"]["label"]
    assert len(chosen) == count
    times = torch.bincount(chosen, minlength=rows)
    assert times.max() - times.min() <= 1  # no row oftener than another by more than one
    if count > 1 and rows > count:
        assert (chosen.diff() - rows / count).abs().max() < 1
