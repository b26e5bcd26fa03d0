"""Finding a network and its scheduler, by name or in a folder of diffusers layout, and writing such a folder."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from omegaconf import OmegaConf
from torch import nn

from pqcad_ao.diffusion.process import FAMILY, as_ddim
from pqcad_ao.nn.state import Method, quantized_state
from pqcad_ao.utils.assets import asset_path
from pqcad_ao.utils.files import read_json, write_whole

ARCHITECTURES = ("ddpm-cifar10", "sd15")  # published ones, of which the assets hold the configuration
NAMES = ("demo", *ARCHITECTURES)
UNETS: dict[str, Any] = {kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel)}
SCHEDULERS: dict[str, Any] = {kind.__name__: kind for kind in FAMILY}


def load_model(name_or_dir: str | Path) -> tuple[nn.Module, DDIMScheduler]:
    """A UNet in evaluation mode, and the DDIM sampler of the noise process it was trained on.

    Args:
        name_or_dir: ``"demo"``, the embedded Fashion-MNIST teacher; ``"ddpm-cifar10"`` or ``"sd15"`` (Stable Diffusion
            1.5), published configurations with seeded random weights, for speed and size and never for quality; or a
            folder: DIR with ``unet/`` and
            ``scheduler/``, or DIR with ``config.json`` and the scheduler's ``scheduler_config.json`` in it or in a
            ``scheduler/`` in or beside it. The network may be a quantized one.

    Raises:
        ValueError: no such name or folder, not of that layout, or damaged.
    """
    if name_or_dir in ARCHITECTURES:
        return _random(str(name_or_dir))
    folder = asset_path("fashion_mnist") if name_or_dir == "demo" else Path(name_or_dir)
    if not folder.is_dir():
        raise ValueError(
            f"no model {str(name_or_dir)!r}: allowed are {', '.join(map(repr, NAMES))} or a folder that holds unet/ "
            "and scheduler/"
        )
    unet_dir = next((d for d in (folder / "unet", folder) if (d / "config.json").is_file()), None)
    if unet_dir is None:
        raise ValueError(
            f"{folder} holds no diffusers UNet: expected unet/config.json with its weights, or config.json itself"
        )
    places = (folder / "scheduler", folder, folder.parent / "scheduler")
    scheduler_dir = next((d for d in places if (d / "scheduler_config.json").is_file()), None)
    if scheduler_dir is None:
        raise ValueError(
            f"no scheduler for the network in {unet_dir}: put the one it was trained with beside it, with "
            f"scheduler.save_pretrained({str(unet_dir.parent / 'scheduler')!r})"
        )
    unet_class = _class_of(unet_dir / "config.json", UNETS)
    _check_quantizer(unet_dir / "config.json")
    scheduler = _class_of(scheduler_dir / "scheduler_config.json", SCHEDULERS).from_pretrained(scheduler_dir)
    try:
        unet, report = unet_class.from_pretrained(
            unet_dir, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{unet_dir} cannot be read as a {unet_class.__name__}: {error}") from error
    if report["missing_keys"]:
        raise ValueError(f"{unet_dir} is damaged: its weights lack {', '.join(sorted(report['missing_keys'])[:3])} ...")
    return unet.eval(), as_ddim(scheduler)


def _check_quantizer(config: Path) -> None:
    """Raises ValueError: the network of a config file was quantized by another library, whose loader is not ours."""
    quantization = read_json(config).get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != Method.PQCAD.value:
        raise ValueError(
            f"{config} names the quantizer {method!r}: load_model reads full-precision networks and those that "
            "pqcad_ao quantized; load others with their own library"
        )


def _class_of(config: Path, allowed: dict[str, Any]) -> Any:
    """The class that a diffusers config file names."""
    name = read_json(config).get("_class_name")
    if not isinstance(name, str) or name not in allowed:
        raise ValueError(f"{config} names the class {name}: allowed are {', '.join(allowed)}")
    return allowed[name]


def architecture(name: str) -> dict[str, Any]:
    """The configuration of a published network: ``unet`` and ``scheduler`` as diffusers' classes take them.

    Args:
        name: of ``ARCHITECTURES``.

    Returns:
        also ``unet_class``, where it is not ``UNet2DModel``.

    Raises:
        ValueError: no such name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"no architecture {name!r}: allowed are {', '.join(map(repr, ARCHITECTURES))}")
    config: Any = OmegaConf.to_container(OmegaConf.load(asset_path("architectures", f"{name}.yaml")))
    return config


def _random(name: str) -> tuple[nn.Module, DDIMScheduler]:
    """A published network with seeded random weights."""
    config = architecture(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet: Any = UNETS[config.get("unet_class", "UNet2DModel")](**config["unet"])
    return unet.eval(), DDIMScheduler(**config["scheduler"])


def save_model(unet: nn.Module, scheduler: DDIMScheduler, folder: str | Path) -> Path:
    """Write ``unet/``, ``scheduler/`` and ``model_index.json``, which ``DDIMPipeline.from_pretrained(folder)`` reads.

    Beside them, of a quantized network, ``pqcad.json`` for other programs: the ``average_bits`` of its quantized
    weights, a ``summary`` of its plan, and the ``timesteps`` that it was distilled for (null if it was not).

    Returns the file that holds the weights.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline: Any = DDIMPipeline(unet, scheduler)
    pipeline.save_pretrained(folder)
    state = quantized_state(unet)
    facts = folder / "pqcad.json"
    if state is None:
        facts.unlink(missing_ok=True)  # of another network that was here
    else:
        contents = {"average_bits": state.plan.average_bits, "summary": state.plan.summary()}
        write_whole(facts, json.dumps({**contents, "timesteps": state.timestep.schedule}, indent=2).encode())
    return folder / "unet" / "diffusion_pytorch_model.safetensors"
