"""Networks, configurations and comparisons that several test files use."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import DDIMScheduler, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from pqcad_ao import PQCADConfig

SHAPE = (1, 8, 8)  # what every network here denoises
TINY_UNET: dict[str, Any] = {  # of a diffusers UNet that is quantized in seconds
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
# one block, without attention: for tests of what is done around a network
LEAST_UNET = {
    **TINY_UNET,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}
# the first, of a text-conditional one
TINY_TEXT_UNET = {
    **TINY_UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
QUICK = {
    "activation_bits": 4,
    "calibration_points": 16,
    "calibration_steps": 4,
    "calibration_batch_size": 8,
    "timestep_groups": 4,
    "mode": "ptq",
    "calibration_timesteps": "normal",
}


def quick(**options) -> PQCADConfig:
    """A configuration that calibrates in a second."""
    return PQCADConfig(**{**QUICK, **options})


def cosine_scheduler() -> DDIMScheduler:
    """The embedded teacher's scheduler: DDIM, cosine betas, v-prediction, trailing timesteps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal to noise in dB; infinite where both are the same."""
    noise = (value.double() - reference.double()).square().mean()
    return float("inf") if noise == 0 else float(10 * torch.log10(reference.double().square().mean() / noise))


class Plain(nn.Module):
    """A denoiser ``f(x, t)`` that is no diffusers model: 8 channels, a hook for one more layer in the middle."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.last = nn.Conv2d(8, 1, 3, padding=1)
        self.build()
        self.eval()

    def build(self) -> None:
        """Make the layers of :meth:`middle`."""

    def middle(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = torch.as_tensor(t, device=x.device).reshape(-1, 1).to(x.dtype) / 1000
        h = self.first(x) + self.time(t)[:, :, None, None]
        return self.last(F.silu(self.middle(h)))


class Small(Plain):
    """What a diffusion UNet has, in miniature: down, attention's linears, up, a skip concatenation, a shortcut."""

    def build(self) -> None:
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(12, 12, bias=False) for _ in range(3))
        self.to_out = nn.Linear(12, 12)
        self.up = nn.Conv2d(12, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.join = nn.Conv2d(16, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(16, 8, 1)

    def middle(self, h: Tensor) -> Tensor:
        inner = F.silu(self.down(h))
        tokens = inner.flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        inner = inner + self.to_out(mixed).transpose(1, 2).reshape(inner.shape)
        inner = self.up(F.interpolate(inner, scale_factor=2.0, mode="nearest"))
        both = torch.cat([inner, 3 * h], 1)
        return self.join(F.silu(self.norm(both))) + self.shortcut(both)


def _stronger(network: nn.Module) -> nn.Module:
    """With weights of blocks that count: as they are made, what they add to the sample is hardly to be seen."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "blocks" in name:
                parameter.mul_(4)
    return network


def sd3_transformer() -> tuple[Any, dict[str, Tensor]]:
    """Two blocks of joint attention over a picture's patches and a text, and six rows of conditioning."""
    text = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    patches = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 2, "pos_embed_max_size": 8}
    conditioning = {"encoder_hidden_states": torch.randn(6, 5, 12), "pooled_projections": torch.randn(6, 10)}
    return _stronger(
        SD3Transformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, **text, **patches)
    ), conditioning


def flux_transformer() -> tuple[Any, dict[str, Tensor]]:
    """Packed tokens, with positions that are the same for every sample; called with a timestep / 1000."""
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    conditioning = {
        "encoder_hidden_states": torch.randn(6, 5, 12),
        "pooled_projections": torch.randn(6, 10),
        "guidance": torch.full((6,), 3.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
    }
    return _stronger(network), conditioning


@contextmanager
def interrupted(run: type, at: int) -> Iterator[None]:
    """Stop a training run (a class with ``update`` and ``log``) as Ctrl-C does, before its update of this number."""
    original = run.update

    def update(self):
        if len(self.log) == at:
            raise KeyboardInterrupt
        return original(self)

    with patch.object(run, "update", update), pytest.raises(KeyboardInterrupt):
        yield
