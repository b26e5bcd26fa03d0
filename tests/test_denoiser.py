"""How a network is called, and with which conditioning."""

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from hypothesis import given
from hypothesis import strategies as st
from networks import TINY_TEXT_UNET, flux_transformer, quick, sd3_transformer, sqnr

from pqcad_ao import CADConfig, PQCADConfig, distill_, load_quantized, plan, quantize_, save_quantized
from pqcad_ao.denoiser import Denoiser, predict, sample_shape, spread_rows, take_rows
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.nn.state import quantized_state

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


SD3, FLUX = (sd3_transformer, (4, 8, 8), 1), (flux_transformer, (16, 4), 1000)


@pytest.mark.parametrize(
    ("make", "shape", "divisor"), [pytest.param(*SD3, marks=pytest.mark.slow), FLUX], ids=["SD3", "Flux"]
)
def test_a_transformer_of_a_flow(make, shape, divisor, tmp_path):
    torch.manual_seed(0)
    network, conditioning = make()
    network.eval()
    config, flow = quick(weight_bits=8, activation_bits=8), FlowMatchEulerDiscreteScheduler(shift=3.0)
    reference = copy.deepcopy(network)
    given = {"conditioning": conditioning, "sample_shape": shape}
    quantize_(network, config, scheduler=flow, **given, progress=False)
    rows = {row.fqn: row for row in plan(network)}
    assert all(row.role and row.reason for row in rows.values())
    block = "transformer_blocks.0"
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
        assert rows[f"{block}.attn.{name}"].role == "attention", name
    for name in (f"{block}.norm1.linear", f"{block}.norm1_context.linear", "norm_out.linear"):
        assert rows[name].role == "time_projection", name
    assert rows[f"{block}.ff.net.2"].role == "body"

    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    chosen = take_rows(conditioning, torch.tensor([0, 2, 4]))
    ways = [sample(each, flow, noise, 4, conditioning=chosen) for each in (reference, network)]
    assert sqnr(*ways) > 25
    timesteps = torch.tensor([1000.0, 437.5, 0.25])
    with torch.no_grad():
        found = predict(network, noise, timesteps, chosen)
        called = network(hidden_states=noise, timestep=timesteps / divisor, **chosen)  # as diffusers' pipelines do
        assert torch.equal(called.sample, found)
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(hidden_states=noise, timestep=timesteps / divisor, **chosen).sample, found)
        network.save_pretrained(tmp_path)
        again = type(network).from_pretrained(tmp_path)
        assert torch.equal(predict(again, noise, timesteps, chosen), found)
    assert quantized_state(again).timestep.time_scale == 1 / divisor


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape", "divisor"), [SD3, FLUX], ids=["SD3", "Flux"])
def test_a_transformer_of_a_flow_learns(make, shape, divisor):
    torch.manual_seed(0)
    network, conditioning = make()
    reference, plain = network.eval(), copy.deepcopy(network)
    student = copy.deepcopy(network)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    given = {"conditioning": conditioning, "sample_shape": shape, "progress": False}
    quantize_(plain, quick(activation_bits=6), scheduler=flow, **given)
    sizes = {"calibration_steps": 4, "timestep_groups": 4, "learning_points": 32, "batch_size": 8}
    quantize_(student, PQCADConfig.fast(iterations=60, **sizes), scheduler=flow, **given)
    noise = torch.randn(6, *shape, generator=torch.Generator().manual_seed(1))
    goal, *ways = (sample(each, flow, noise, 4, conditioning=conditioning) for each in (reference, plain, student))
    assert sqnr(goal, ways[1]) > sqnr(goal, ways[0]) + 1
    config = CADConfig(steps=4, iterations=30, batch_size=8, points=16, check_betas=False)
    before = sqnr(goal, sample(student, flow, noise, 2, conditioning=conditioning))
    sampler = distill_(student, reference, flow, config, **given)
    assert sqnr(goal, sample(student, sampler, noise, 2, conditioning=conditioning)) > before


@pytest.mark.parametrize("wrong", [(), (8,), (1, 0, 8), (1, 8.0, 8), (True, 8)])
def test_a_sample_of_no_shape_is_an_error(wrong):
    with pytest.raises(ValueError, match=r"sample_shape=.*: write \(channels, height, width\), of packed tokens"):
        sample_shape(inpainting_unet()[0], wrong)


def test_positions_have_no_rows():
    conditioning = {"text": torch.arange(12).view(4, 3), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    chosen = take_rows(conditioning, torch.tensor([3, 1]))
    assert list(chosen) == list(conditioning)
    assert chosen["text"].tolist() == [[9, 10, 11], [3, 4, 5]]
    assert chosen["img_ids"] is conditioning["img_ids"]


@given(st.integers(1, 40), st.integers(1, 40))
def test_samples_share_out_all_rows_of_the_conditioning(count, rows):
    chosen = spread_rows({"nested": {"label": torch.arange(rows)}}, torch.arange(count), count)["nested"]["label"]
    assert len(chosen) == count
    times = torch.bincount(chosen, minlength=rows)
    assert times.max() - times.min() <= 1  # no row oftener than another by more than one
    if count > 1 and rows > count:
        assert (chosen.diff() - rows / count).abs().max() < 1
