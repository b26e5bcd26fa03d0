"""Pipelines of diffusers with random weights, each of a few thousand parameters, whole with text encoder and VAE."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from networks import TINY_TEXT_UNET

PROMPTS = ["a red house", "two cats", "snow", "a green tree at night"]
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})
LATENTS = {"in_channels": 4, "out_channels": 4}
WIDTH = 12  # of the text


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8, layers_per_block=1
    ).eval()


def shifted_vae() -> AutoencoderKL:
    """One of the pipelines that shift what they decode."""
    autoencoder = vae()
    autoencoder.register_to_config(shift_factor=0.1)
    return autoencoder


def clip(folder: Path, *, projection: bool = False) -> tuple[Any, Any]:
    """A tokenizer that knows letters, and a text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    return tokenizer, kind(config).eval()


def stable_diffusion(folder: Path) -> DiffusionPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = clip(folder)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**TINY_TEXT_UNET | LATENTS).eval(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder: Path) -> DiffusionPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = clip(folder / "one")
    second, text_encoder_2 = clip(folder / "two", projection=True)
    unet = UNet2DConditionModel(
        **TINY_TEXT_UNET
        | LATENTS
        | {
            "cross_attention_dim": 2 * WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
        }
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def t5(width: int = WIDTH) -> tuple[Any, Any]:
    """A tokenizer that knows the words of the prompts, and a text encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS)]
    config = T5Config(vocab_size=len(words), d_model=width, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
    tokenizer = T5Tokenizer(vocab=[(word, 0.0) for word in words], extra_ids=0)
    return tokenizer, T5EncoderModel(config).eval()


def components(texts: list[tuple[Any, Any]]) -> dict[str, Any]:
    """What a pipeline calls its tokenizers and text encoders."""
    named = {}
    for end, (tokenizer, text_encoder) in zip(("", "_2", "_3"), texts, strict=False):
        named |= {f"tokenizer{end}": tokenizer, f"text_encoder{end}": text_encoder}
    return named


def pixart(folder: Path) -> DiffusionPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = t5()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
    )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae(),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def stable_diffusion_3(folder: Path) -> DiffusionPipeline:
    torch.manual_seed(0)
    texts = [clip(folder / name, projection=True) for name in ("one", "two")]
    texts.append(t5(2 * WIDTH))
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_vae(),
        **components(texts),
    )


def flux(folder: Path) -> DiffusionPipeline:
    torch.manual_seed(0)
    texts = [clip(folder), t5()]
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(transformer=transformer.eval(), scheduler=scheduler, vae=shifted_vae(), **components(texts))


def dit() -> DiffusionPipeline:
    """One that is guided by classes, and needs no text."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    return DiTPipeline(transformer.eval(), vae(), DDIMScheduler(clip_sample=False))


TEXT = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "pixart": pixart,
    "sd3": stable_diffusion_3,
    "flux": flux,
}
CALLS: dict[str, dict[str, Any]] = {
    "sd": {},
    "sdxl": {},
    "sd3": {"height": 8, "width": 8, "max_sequence_length": 16},
    "flux": {"height": 8, "width": 8, "max_sequence_length": 16},
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
}
