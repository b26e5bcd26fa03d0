"""Which networks can be captured and quantized; of the others, each with a word on what to hand over instead."""

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, UNet1DModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

WRAPPERS = {nn.DataParallel: "module", DistributedDataParallel: "module", torch._dynamo.OptimizedModule: "_orig_mod"}
TIMES = ("t", "time", "timestep", "timesteps", "sigma", "sigmas")  # names of what a network takes second
PATCHES = "controlnet_cond"  # what a ControlNet takes, and nothing else does


def check_suitable(model: nn.Module) -> None:
    """Look whether a network can be captured as f(x_t, timesteps), and its layers quantized one by one.

    Raises:
        TypeError: it is no network. ValueError: it is wrapped, no denoiser of images, called in another order, or in a
            state in which its layers are not those that it is made of.
    """
    check_network(model)
    _check_kind(model)
    _check_parameters(model)
    for fqn, module in model.named_modules():
        _check_attention(fqn, module)
        _check_adapter(fqn, module)


def check_network(model: Any) -> None:
    """Raises ValueError, TypeError: it is a pipeline, no network at all, or one that is wrapped in something else."""
    kind = type(model).__name__
    if isinstance(model, DiffusionPipeline):
        raise ValueError(
            f"{kind} is a pipeline: hand over the network in it, such as pipeline.unet, with pipeline.scheduler and, "
            "where it takes prompts, conditioning=pqcad_ao.pipeline.conditioning_of(pipeline, prompts)"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"a network is expected and a {kind} was given: hand over an nn.Module or a diffusers pipeline")
    wrappers = {**WRAPPERS, type(model): "unet"} if hasattr(type(model), "begin_walk") else WRAPPERS
    for wrapper, inner in wrappers.items():
        if isinstance(model, wrapper):
            raise ValueError(f"the network is wrapped in a {kind}: hand over model.{inner}, and wrap it afterwards")


def _check_kind(model: nn.Module) -> None:
    """Raises ValueError: the network's forward is not that of a denoiser of images."""
    kind, names = type(model).__name__, list(inspect.signature(model.forward).parameters)
    if PATCHES in names:
        raise ValueError(f"{kind} predicts no sample, it adds to what a UNet computes: it stays, quantize the UNet")
    if (isinstance(model, ModelMixin) and "timestep" not in names) or len(names) < 2:
        raise ValueError(
            f"{kind} is no denoiser, its forward takes {', '.join(names) or 'nothing'}: networks that are called as "
            "f(x_t, timesteps) are quantized"
        )
    if names[0] in TIMES:
        raise ValueError(
            f"{kind} takes {names[0]} before {names[1]}: networks are called as f(x_t, timesteps), wrap it in a module "
            "with a forward of that order"
        )
    volumes = isinstance(model, ModelMixin) and any(isinstance(module, nn.Conv3d) for module in model.modules())
    if volumes or isinstance(model, UNet1DModel):
        raise ValueError(f"{kind} denoises no images: networks of samples (B, C, H, W) are quantized")


def check_whole(model: nn.Module) -> None:
    """Raises ValueError: the network is sharded over processes, and this one has a part of it."""
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor":
            raise ValueError(
                f"{name} is a DTensor, a part of it in each process, as fully_shard leaves it: hand over the whole "
                "network in each, the processes share the work"
            )


def _check_parameters(model: nn.Module) -> None:
    """Raises ValueError: the network holds no values or a part of them, or stores them in eight bits."""
    check_whole(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name} has no shape yet, its layer is lazy: call the network once before")
        if parameter.is_floating_point() and parameter.element_size() == 1:
            raise ValueError(
                f"{name} is stored as {parameter.dtype}, as enable_layerwise_casting does: load the network without it"
            )


def _check_attention(fqn: str, module: nn.Module) -> None:
    """Raises ValueError: an attention layer computes in slices, or with projections that were fused."""
    if type(getattr(module, "processor", None)).__name__.startswith("Sliced"):
        raise ValueError(
            f"{fqn} computes in slices, for batches of one size: call set_attention_slice(None) of the network "
            "(disable_attention_slicing() of its pipeline); a quantized network may slice"
        )
    if getattr(module, "fused_projections", False):
        raise ValueError(
            f"{fqn} has a fused projection, which its configuration does not make: load the network anew, without "
            "fuse_qkv_projections()"
        )


def _check_adapter(fqn: str, module: nn.Module) -> None:
    """Raises ValueError: an adapter of peft's (LoRA and others) would be quantized beside its layer."""
    of_peft = any(kind.__module__.startswith("peft.tuners.") for kind in type(module).__mro__)
    if of_peft and getattr(module, "merged", None) is False and not getattr(module, "disable_adapters", False):
        raise ValueError(
            f"{fqn} has an adapter that is not merged into its weight, and each would be quantized by itself: "
            "call fuse_lora() and then unload_lora() of the network (of a pipeline, fuse_lora() and "
            "unload_lora_weights()) to quantize what they are together, or disable_adapters() to leave it out"
        )
