"""What is no network to quantize, or not in the state for it, is said in a sentence that says what to write."""

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMPipeline,
    UNet1DModel,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from networks import SHAPE, TINY_TEXT_UNET, Small, cosine_scheduler, quick
from pipelines import vae
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pqcad_ao import CADConfig, distill_, plan, quantize_
from pqcad_ao.models import save_model

TEXT = {"encoder_hidden_states": torch.zeros(3, 4, 12)}
VIDEO = {"down_block_types": ("DownBlock3D",), "up_block_types": ("UpBlock3D",), "block_out_channels": (8,)}


def text_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**TINY_TEXT_UNET)


class TimeFirst(Small):
    def forward(self, t, x):
        return super().forward(x, t)


class Lazy(Small):
    def build(self) -> None:
        super().build()
        self.join = nn.LazyConv2d(8, 3, padding=1)


def sliced() -> UNet2DConditionModel:
    unet = text_unet()
    unet.set_attention_slice("max")
    return unet


def fused() -> UNet2DConditionModel:
    unet = text_unet()
    unet.fuse_qkv_projections()
    return unet


def eight_bit() -> UNet2DConditionModel:
    unet = text_unet()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return unet


UNSUITABLE = {
    "vae": (vae, r"AutoencoderKL is no denoiser, its forward takes sample, sample_posterior"),
    "unet1d": (lambda: UNet1DModel(block_out_channels=(8, 8, 16)), r"UNet1DModel denoises no images"),
    "unet3d": (lambda: UNet3DConditionModel(**VIDEO, norm_num_groups=4), r"UNet3DConditionModel denoises no images"),
    "time first": (TimeFirst, r"TimeFirst takes t before x: networks are called as f\(x_t, timesteps\), wrap it"),
    "one argument": (lambda: nn.Sequential(nn.Linear(4, 4)), r"Sequential is no denoiser, its forward takes input"),
    "data parallel": (lambda: nn.DataParallel(Small()), r"is wrapped in a DataParallel: hand over model\.module"),
    "compiled": (lambda: torch.compile(Small()), r"is wrapped in a OptimizedModule: hand over model\._orig_mod"),
    "controlnet": (lambda: ControlNetModel.from_unet(text_unet()), r"predicts no sample, .* quantize the UNet"),
    "sliced": (sliced, r"attn1 computes in slices, .*: call set_attention_slice\(None\)"),
    "fused": (fused, r"attn1 has a fused projection, .*: load the network anew, without fuse_qkv"),
    "eight bits": (eight_bit, r"conv_in\.weight is stored as torch\.float8_e4m3fn, .*: load the network without it"),
    "lazy": (Lazy, r"join\.weight has no shape yet, its layer is lazy: call the network once before"),
    "pipeline": (lambda: DDIMPipeline(text_unet(), cosine_scheduler()), r"DDIMPipeline is a pipeline: hand over"),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_what_cannot_be_quantized_is_refused_with_a_word_on_what_to_do(case):
    make, message = UNSUITABLE[case]
    model = make()
    with pytest.raises(ValueError, match=message):
        plan(model, sample_shape=SHAPE, conditioning=TEXT)
    if case != "pipeline":
        with pytest.raises(ValueError, match=message):
            quantize_(model, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, conditioning=TEXT)


def test_what_was_refused_is_taken_once_it_is_as_the_message_says():
    slices, lazy = sliced(), Lazy()
    slices.set_attention_slice(None)
    lazy(torch.zeros(1, *SHAPE), torch.tensor([1]))
    assert plan(slices, conditioning=TEXT).quantized
    assert plan(lazy, sample_shape=SHAPE)["join"].quantized


def test_no_network_at_all():
    with pytest.raises(TypeError, match=r"a network is expected and a str was given"):
        plan("unet")


def test_other_outputs_and_missing_arguments_are_named():
    class Output(Small):
        def forward(self, x, t):
            return {"prediction": super().forward(x, t)}

    class Third(Small):
        def forward(self, x, t, context):
            return super().forward(x, t) + context

    with pytest.raises(RuntimeError, match=r"the network returns a dict: expected is a tensor, a tuple"):
        plan(Output(), sample_shape=SHAPE)
    with pytest.raises(ValueError, match=r"Third is conditional and conditioning has no 'context'"):
        plan(Third(), sample_shape=SHAPE)
    assert plan(Third(), sample_shape=SHAPE, conditioning={"context": torch.zeros(2, 1, 1, 1)}).quantized


def test_images_in_place_of_text():
    """As Kandinsky's decoder has it, whose forward takes no text."""
    options = {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 6, "addition_embed_type": "image"}
    unet = UNet2DConditionModel(**TINY_TEXT_UNET, **options).eval()
    conditioning = {"added_cond_kwargs": {"image_embeds": torch.randn(3, 6)}}
    rows = plan(unet, conditioning=conditioning)
    assert any(row.fqn.endswith("attn2.to_k") for row in rows)
    with pytest.raises(ValueError, match=r"has no 'added_cond_kwargs'"):
        plan(unet)


def test_save_model_writes_diffusers_models_only(tmp_path):
    with pytest.raises(TypeError, match=r"a Small is none: write save_quantized\(model, path\)"):
        save_model(Small(), cosine_scheduler(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_sharded_over_processes_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        sharded = fully_shard(Small(), mesh=init_device_mesh("cpu", (1,)))
        for call in (
            lambda: quantize_(sharded, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE),
            lambda: distill_(Small(), sharded, cosine_scheduler(), CADConfig(steps=4), sample_shape=SHAPE),
        ):
            with pytest.raises(
                ValueError, match=r"first\.weight is a DTensor, .*: hand over the whole network in each"
            ):
                call()
    finally:
        dist.destroy_process_group()
