"""What diffusers makes out of a quantized network: of its configuration, of its weights, of a pipeline's folder."""

import copy

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMPipeline,
    PipelineQuantizationConfig,
    UNet2DConditionModel,
    UNet2DModel,
    UNetMotionModel,
)
from networks import TINY_TEXT_UNET, cosine_scheduler, quick

from pqcad_ao import PQCADConfig, quantize_
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.state import quantized_state


def test_a_network_of_a_quantized_ones_configuration_is_saved_as_what_it_is(quantized_unet, scheduler, tmp_path):
    fresh = UNet2DModel.from_config(quantized_unet.config)
    save_model(fresh, scheduler, tmp_path)
    again, _ = load_model(tmp_path)
    assert quantized_state(again) is None
    for name, value in fresh.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    save_model(quantized_unet, scheduler, tmp_path)
    assert quantized_state(load_model(tmp_path)[0]) is not None


@pytest.mark.slow
def test_what_copies_a_unets_weights_gets_those_that_integers_stand_for():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY_TEXT_UNET).eval()
    text = {"encoder_hidden_states": torch.randn(4, 5, 12)}
    quantize_(unet, quick(), scheduler=cosine_scheduler(), conditioning=text, progress=False)
    whole = copy.deepcopy(unet).dequantize()
    made = ControlNetModel.from_unet(unet, conditioning_channels=1)
    expected = ControlNetModel.from_unet(whole, conditioning_channels=1)
    copied = set(whole.state_dict()) & set(made.state_dict())
    assert len(copied) > 50
    for name in copied:
        assert torch.equal(made.state_dict()[name], expected.state_dict()[name]), name
    assert torch.equal(made.conv_in.weight, unet.conv_in.dequantized_weight())
    assert "quantization_config" not in made.config
    assert quantized_state(unet) is not None
    motion = UNetMotionModel.from_unet2d(unet=unet)
    assert torch.equal(motion.conv_in.weight, made.conv_in.weight)


def test_quantizing_while_a_pipeline_is_loaded_is_refused_with_a_word_on_what_to_write(tiny_dir):
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": PQCADConfig()})
    with pytest.raises(ValueError, match=r"load it without quantization_config, then write quantize_\(unet, PQCADCon"):
        DDIMPipeline.from_pretrained(tiny_dir, quantization_config=mapping)
