"""Networks that are nobody's library's: attention as guided-diffusion writes it, in convolutions of width one."""

import math

import pytest
import torch
from networks import SHAPE, Plain, cosine_scheduler, quick, sqnr
from torch import Tensor, nn

from pqcad_ao import load_quantized, plan, quantize_, save_quantized
from pqcad_ao.diffusion.sampling import sample

HEADS = 2


class ConvolvedAttention(Plain):
    """Attention over flattened pixels, whose projections are ``Conv1d``, and products ``einsum``."""

    def build(self) -> None:
        self.norm = nn.GroupNorm(4, 8)
        self.qkv, self.proj_out = nn.Conv1d(8, 24, 1), nn.Conv1d(8, 8, 1)

    def middle(self, h: Tensor) -> Tensor:
        batch, channels = h.shape[:2]
        flat = h.flatten(2)
        heads = self.qkv(self.norm(flat)).reshape(batch * HEADS, 3 * channels // HEADS, -1)
        q, k, v = heads.split(channels // HEADS, dim=1)
        scale = 1 / math.sqrt(math.sqrt(channels / HEADS))
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        mixed = torch.einsum("bts,bcs->bct", weights, v).reshape(batch, channels, -1)
        return (flat + self.proj_out(mixed)).reshape(h.shape)


def test_projections_of_attention_are_in_the_plan():
    rows = plan(ConvolvedAttention(), quick(), sample_shape=SHAPE)
    for name in ("qkv", "proj_out"):
        row = rows[name]
        assert (row.kind, row.role, row.quantized) == ("conv1d", "attention", True)
        assert (row.weight_bits, row.activation_bits) == (4, 4)


@pytest.mark.slow
def test_attention_in_convolutions_is_quantized_saved_and_compiled(tmp_path):
    reference, network = ConvolvedAttention(), ConvolvedAttention()
    config = quick(weight_bits=8, activation_bits=8)
    quantize_(network, config, scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    noise = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = sample(network, cosine_scheduler(), noise, 4)
    assert sqnr(sample(reference, cosine_scheduler(), noise, 4), found) > 30
    save_quantized(network, tmp_path / "network.safetensors")
    again = ConvolvedAttention()
    load_quantized(again, tmp_path / "network.safetensors")
    assert torch.equal(sample(again, cosine_scheduler(), noise, 4), found)
    compiled = torch.compile(network, backend="pqcad")
    with torch.no_grad():
        x, t = noise, torch.tensor([1, 300, 600, 900])
        assert sqnr(network(x, t), compiled(x, t)) > 60
