"""Pipelines of flows, SD3's and Flux's, quantized whole: their own scheduler, guidance and time."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from networks import flux_transformer, quick, sd3_transformer, sqnr
from torch import Tensor

from pqcad_ao import load_quantized, quantize_, save_quantized
from pqcad_ao.nn.state import quantized_state

pytest.importorskip("transformers")

PROMPTS = ["a house", "two cats", "snow"]


def _embedded(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """In place of text encoders, which are not quantized: a text of five tokens for each prompt, and its summary."""
    generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
    text = torch.stack([torch.randn(5, 12, generator=generator) for generator in generators])
    return text, torch.stack([torch.randn(10, generator=generator) for generator in generators])


class Flux(FluxPipeline):
    def encode_prompt(self, prompt, **_):
        return *_embedded(prompt), torch.zeros(5, 3)


class SD3(StableDiffusion3Pipeline):
    def encode_prompt(self, prompt, **_):
        (text, pooled), (no_text, none_pooled) = _embedded(prompt), _embedded([""] * len(prompt))
        return text, no_text, pooled, none_pooled


def _flux(transformer, dynamic):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    return Flux(scheduler, None, None, None, None, None, transformer)


def _sd3(transformer, _):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SD3(transformer, scheduler, None, None, None, None, None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "pipeline", "dynamic", "scale"),
    [
        (flux_transformer, _flux, False, 1 / 1000),
        (flux_transformer, _flux, True, 1 / 1000),
        (sd3_transformer, _sd3, False, 1.0),
    ],
    ids=["Flux", "Flux with a dynamic shift", "SD3 with guidance"],
)
def test_a_pipeline_of_a_flow(network, pipeline, dynamic, scale, tmp_path):
    torch.manual_seed(0)
    transformer, fresh = (network()[0].eval() for _ in range(2))
    pipe = pipeline(transformer, dynamic)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "guidance_scale": 1.5}  # with more, a random network's errors grow

    def draw(**options) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        options = {"num_inference_steps": 4, "output_type": "latent", "generator": generators, **call, **options}
        return pipe(PROMPTS[:2], **options).images

    expected = draw()
    quantize_(pipe, quick(weight_bits=8, activation_bits=8), prompts=PROMPTS, call=call, progress=False)
    found = draw()
    assert sqnr(expected, found) > 20
    known = quantized_state(transformer).timestep
    assert (known.continuous, known.time_scale) == (True, scale)
    save_quantized(transformer, tmp_path / "transformer.safetensors")
    load_quantized(fresh, tmp_path / "transformer.safetensors")
    pipe.transformer = fresh
    assert torch.equal(draw(), found)
