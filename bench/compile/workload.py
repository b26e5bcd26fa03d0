"""What every contender computes: a network, inputs from its own trajectory, and how much work that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pqcad_ao.denoiser import Denoiser, sample_shape
from pqcad_ao.diffusion.recording import record_calls
from pqcad_ao.models import load_model
from pqcad_ao.nn.state import quantized_state

TRAJECTORY_STEPS = 20
CALIBRATION_IMAGES = 160  # for every contender that calibrates
CHECK_BATCHES = 4
TEXT_TOKENS = 77


def float_model(model: str) -> tuple[nn.Module, DDIMScheduler]:
    """The float32 network that the rows start from, and its scheduler.

    Args:
        model: as for :func:`~pqcad_ao.models.load_model`; with ``@64`` behind it, for samples of 64x64.

    Raises:
        ValueError: an unknown name, a folder without a UNet, or a UNet that is quantized already or takes inputs that
            cannot be made up; a size that its halvings do not divide.
    """
    name, _, size = model.rpartition("@")
    if name and size.isdecimal() and not Path(model).exists():
        unet, scheduler = load_model(name)
        _resize(unet, int(size))
    else:
        unet, scheduler = load_model(model)
    if quantized_state(unet) is not None or getattr(unet, "is_quantized", False):
        raise ValueError(f"model={model!r} is quantized: give the full-precision network, the rows quantize it")
    sample_shape(unet)
    random_conditioning(unet, 1, torch.Generator())
    return unet.float(), scheduler


def _resize(unet: Any, size: int) -> None:
    """Let a UNet denoise samples of another size: its weights fit any that its halvings divide."""
    halved = 2 ** (len(unet.config.block_out_channels) - 1)
    if size == 0 or size % halved:
        raise ValueError(f"samples of {size}x{size}: this UNet halves them down to 1/{halved}, give a multiple of that")
    unet.register_to_config(sample_size=size)


def random_conditioning(unet: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random text states and class labels for the networks that take them.

    Raises:
        ValueError: the network takes conditioning of another kind.
    """
    config: Any = unet.config
    if config.get("addition_embed_type") or config.get("class_embed_type"):
        raise ValueError(
            f"{type(unet).__name__} takes added embeddings: only text states and class labels can be made up"
        )
    values = {}
    if config.get("cross_attention_dim") is not None:
        width = config.get("encoder_hid_dim") or config.cross_attention_dim
        values["encoder_hidden_states"] = torch.randn(batch, TEXT_TOKENS, width, generator=generator)
    if config.get("num_class_embeds"):
        values["class_labels"] = torch.randint(config.num_class_embeds, (batch,), generator=generator)
    return values


class Step(Denoiser):
    """A UNet as a function of tensors, ``f(x_t, timesteps, *conditioning)``, which is the form that exporters take."""

    def __init__(self, unet: nn.Module, names: Sequence[str] = ()) -> None:
        super().__init__(unet, lambda *values: dict(zip(names, values, strict=True)))


@dataclass
class Workload:
    """What every contender is given.

    Attributes:
        unet: float32, its contender's own. names: of the conditioning arguments.
        calibration: batches of (x_t, timesteps, *conditioning) from full-precision trajectories.
        check: more of them, from other noise, on which the outputs are compared.
        model: what the network was loaded as. folder: for files of this run.
        steps: of the walk that is timed, or that the single step is one of.
    """

    unet: nn.Module
    scheduler: DDIMScheduler
    names: list[str]
    calibration: list[tuple[Tensor, ...]]
    check: list[tuple[Tensor, ...]]
    threads: int
    model: str
    folder: Path
    steps: int

    @property
    def example(self) -> tuple[Tensor, ...]:
        return self.check[0]


def trajectory_inputs(unet: nn.Module, scheduler: DDIMScheduler, batch: int, seed: int) -> dict[str, Any]:
    """Batches of inputs met on full-precision DDIM trajectories, for calibrating and for checking the contenders."""
    generator = torch.Generator().manual_seed(seed)
    shape = sample_shape(unet)
    names = list(random_conditioning(unet, 1, torch.Generator()))

    def walk(trajectories: int) -> list[tuple[Tensor, ...]]:
        noise = torch.randn(trajectories * batch, *shape, generator=generator)
        given = random_conditioning(unet, len(noise), generator)
        calls = record_calls(unet, scheduler, noise, TRAJECTORY_STEPS, conditioning=given, batch_size=batch)
        return [(call.x_t, call.timesteps, *call.conditioning.values()) for call in calls]

    def evenly(batches: list[tuple[Tensor, ...]], count: int) -> list[tuple[Tensor, ...]]:
        return [batches[(2 * index + 1) * len(batches) // (2 * count)] for index in range(count)]

    count = max(4, math.ceil(CALIBRATION_IMAGES / batch))
    calibration = walk(math.ceil(count / TRAJECTORY_STEPS))
    return {"names": names, "calibration": evenly(calibration, count), "check": evenly(walk(1), CHECK_BATCHES)}


def gmac_per_step(step: nn.Module, example: tuple[Tensor, ...]) -> float:
    """Billions of multiply-accumulates of one call: convolutions, matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        step(*example)
    return counter.get_total_flops() / 2e9
