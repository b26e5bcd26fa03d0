"""Finding a network and its scheduler, by name or in a folder of diffusers layout, and writing such a folder."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import nn

from pqcad_ao.diffusion.cache_plan import KEY as CACHE_PLAN
from pqcad_ao.diffusion.cache_plan import cache_plan
from pqcad_ao.diffusion.noise import Sampler
from pqcad_ao.diffusion.process import as_sampler, class_of, read_scheduler
from pqcad_ao.diffusion.schedule import shown, timesteps_of
from pqcad_ao.nn.diffusers_plugin import check_loadable
from pqcad_ao.nn.state import Method, quantized_state
from pqcad_ao.pages.card import NAME as CARD
from pqcad_ao.pages.card import is_users, write_card
from pqcad_ao.utils.assets import asset_path
from pqcad_ao.utils.files import flush, read_json, settle, unfinished_folder
from pqcad_ao.utils.runs import only_run_in
from pqcad_ao.utils.tensor_files import check_tensors, seal_tensors

ARCHITECTURES = ("ddpm-cifar10", "sd15")  # published ones, of which the assets hold the configuration
EMBEDDED = {"demo": "fashion_mnist", "demo-w4a6": "fashion_mnist/w4a6"}  # folders of the assets
NAMES = (*EMBEDDED, *ARCHITECTURES)
UNETS: dict[str, Any] = {  # that a folder may hold, transformers among them
    kind.__name__: kind
    for kind in (
        UNet2DModel,
        UNet2DConditionModel,
        DiTTransformer2DModel,
        PixArtTransformer2DModel,
        SD3Transformer2DModel,
        FluxTransformer2DModel,
    )
}
LARGEST, MOST_LAYERS = 2**16, 100  # numbers of a configuration, and those that count layers; far above any UNet's
SAVED = ".saved"  # a model that was written whole, while it moves to its place
FACTS, WITHOUT_FACTS = "pqcad.json", "without pqcad.json"
INDEX, WITHOUT_INDEX = "model_index.json", "without model_index.json"


def load_model(name_or_dir: str | Path) -> tuple[nn.Module, Sampler]:
    """A UNet in evaluation mode, and the sampler of the noise process it was trained on.

    Args:
        name_or_dir: ``"demo"``, the embedded Fashion-MNIST teacher; ``"demo-w4a6"``, what the default recipe made of
            it: four-bit weights, six-bit activations, ten steps; ``"ddpm-cifar10"`` or ``"sd15"`` (Stable Diffusion
            1.5), published configurations with seeded random weights, for speed and size and never for quality; or a
            folder: DIR with ``unet/`` and ``scheduler/``, or DIR with ``config.json`` and the scheduler's
            ``scheduler_config.json`` in it or in a ``scheduler/`` in or beside it. The network may be a quantized one.

    Raises:
        ValueError: no such name or folder, not of that layout, or damaged.

    Example:
        >>> unet, scheduler = load_model("demo")
        >>> sum(parameter.numel() for parameter in unet.parameters())
        1017265
    """
    if name_or_dir in ARCHITECTURES:
        return _random(str(name_or_dir))
    folder, unet_dir = _places(name_or_dir)
    places = (folder / SAVED / "scheduler", folder / "scheduler", folder, folder.parent / "scheduler")
    scheduler_dir = next((d for d in places if (d / "scheduler_config.json").is_file()), None)
    if scheduler_dir is None:
        raise ValueError(
            f"no scheduler for the network in {unet_dir}: put the one it was trained with beside it, with "
            f"scheduler.save_pretrained({str(unet_dir.parent / 'scheduler')!r})"
        )
    scheduler = read_scheduler(scheduler_dir)
    unet = _read_unet(unet_dir)
    _check_together(unet, scheduler, folder)
    return unet.eval(), scheduler


def load_network(name_or_dir: str | Path) -> nn.Module:
    """The network that :func:`load_model` gives, without its scheduler, which need not be there; errors as there."""
    if name_or_dir in ARCHITECTURES:
        return _random(str(name_or_dir))[0]
    return _read_unet(_places(name_or_dir)[1]).eval()


def _places(name_or_dir: str | Path) -> tuple[Path, Path]:
    """The folder of a model, and the one in it that holds its network."""
    folder = asset_path(EMBEDDED[str(name_or_dir)]) if name_or_dir in EMBEDDED else Path(name_or_dir)
    if not folder.is_dir():
        raise ValueError(
            f"no model {str(name_or_dir)!r}: allowed are {', '.join(map(repr, NAMES))} or a folder that holds unet/ "
            "and scheduler/"
        )
    candidates = (folder / SAVED / "unet", folder / "unet", folder)
    unet_dir = next((place for place in candidates if (place / "config.json").is_file()), None)
    if unet_dir is None:
        raise ValueError(
            f"{folder} holds no diffusers UNet: expected unet/config.json with its weights, or config.json itself"
        )
    return folder, unet_dir


def _read_unet(folder: Path) -> nn.Module:
    """The network of a folder. Raises ValueError: it is not one of ours to read, or damaged."""
    config = folder / "config.json"
    unet_class = class_of(config, UNETS)
    _check_quantizer(config)
    _check_sizes(config, read_json(config))
    try:
        unet, report = unet_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        cache_plan(unet)  # reads it
    except Exception as error:  # what a configuration says reaches every line of diffusers' constructors
        raise ValueError(f"{folder} cannot be read as a {unet_class.__name__}: {error}") from error
    for weights in sorted(folder.glob("*.safetensors")):
        check_tensors(weights)
    if report["missing_keys"]:
        raise ValueError(f"{folder} is damaged: its weights lack {', '.join(sorted(report['missing_keys'])[:3])} ...")
    for name, parameter in unet.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{folder} is damaged: {name} holds NaN or infinity")
    return unet


def _check_sizes(config: Path, values: Any, name: str = "") -> None:
    """Raises ValueError: a number of a configuration would make a network that no weights are for, and take hours."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, entry in entries:
        if key not in ("quantization_config", CACHE_PLAN):
            _check_sizes(config, entry, str(key) if isinstance(values, dict) else name)
    most = MOST_LAYERS if "layers" in name else LARGEST
    if isinstance(values, (int, float)) and not abs(values) <= most:
        raise ValueError(f"{config} is damaged: {name} is {values}, allowed is up to {most}")


def _check_together(unet: nn.Module, scheduler: Sampler, folder: Path) -> None:
    """Raises ValueError: a quantized network and the scheduler beside it were not saved together."""
    state = quantized_state(unet)
    if state is None:
        return
    trained, schedule = scheduler.config.num_train_timesteps, state.timestep.schedule
    if trained != state.timestep.num_train_timesteps:
        raise ValueError(
            f"{folder}: its scheduler has {trained} training timesteps, its network was quantized for "
            f"{state.timestep.num_train_timesteps}: they were not saved together"
        )
    if schedule is not None and timesteps_of(scheduler, len(schedule)) != schedule:
        raise ValueError(
            f"{folder}: its network was distilled for timesteps {shown(schedule)}, its scheduler walks "
            f"{shown(timesteps_of(scheduler, len(schedule)))}: they were not saved together"
        )


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


def save_model(
    unet: nn.Module,
    scheduler: Sampler,
    folder: str | Path,
    *,
    quality: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write ``unet/``, ``scheduler/`` and ``model_index.json``, which ``DDIMPipeline.from_pretrained(folder)`` reads.

    A flow has no such pipeline, and no ``model_index.json``: :func:`load_model` reads its folder.

    A card stands beside them, ``README.md``: bits, plan, sizes, how to load and run it, and its teacher's licence where
    that is known. A README.md that is there and not of ours stays.

    Beside them, of a quantized network, ``pqcad.json`` for other programs: the ``average_bits`` of its quantized
    weights, a ``summary`` of its plan, and the ``timesteps`` that it was distilled for (null if it was not).

    ``unet/`` and ``scheduler/`` are replaced as a whole. A process that is killed meanwhile leaves the model that was
    there before or this one, as :func:`load_model` reads it; the next ``save_model`` tidies up.

    Args:
        quality: of its pictures, for the card: what :func:`~pqcad_ao.evaluate.fid.image_quality` returned, and
            ``steps``. repo_id: ``"owner/name"`` on a hub, for the card's example.

    Returns the file that holds the weights.

    Raises:
        OSError: the folder cannot be written, or there is no room for both models; the one before stays.
        TypeError: the network is no diffusers model.
        ValueError: ``quality`` does not say what the card does; or what is saved could not be loaded, for a layer was
            replaced.

    Example:
        >>> save_model(quantized, scheduler, "model").name
        'diffusion_pytorch_model.safetensors'
        >>> unet, scheduler = load_model("model")
    """
    if not isinstance(unet, ModelMixin):
        raise TypeError(
            f"save_model writes diffusers models, and a {type(unet).__name__} is none: write save_quantized(model, "
            "path)"
        )
    check_loadable(unet, quantized_state(unet))
    folder = Path(folder)
    with only_run_in(folder):
        _finish_saving(folder)
        with unfinished_folder(folder / "model") as unfinished:
            try:
                _write_model(unet, scheduler, unfinished)
                write_card(unet, unfinished, quality=quality, repo_id=repo_id)
            except SafetensorError as error:  # of the operating system
                raise OSError(f"the model cannot be written into {folder}: {error}") from error
            settle(unfinished)
            unfinished.rename(folder / SAVED)  # from now on the new model is the one that is read
            flush(folder)
        _finish_saving(folder)
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def push_to_hub(
    unet: nn.Module,
    scheduler: Sampler,
    repo_id: str,
    *,
    quality: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Put a model on the Hugging Face Hub, with its card: what :func:`save_model` writes, in one commit.

    Args:
        repo_id: ``"owner/name"``; made if it is not there. quality: as for :func:`save_model`.
        private: whether a repository that is made is. token: None: the one that ``hf auth login`` keeps.

    Returns:
        the commit's address.

    Raises:
        ValueError: a name that no repository has. OSError: the hub cannot be reached, or refuses; nothing was changed
            there but that the repository may have been made.
    """
    validate_repo_id(repo_id)
    hub = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_model(unet, scheduler, folder, quality=quality, repo_id=repo_id)  # first: what cannot be saved is not sent
        try:
            hub.create_repo(repo_id, private=private, exist_ok=True)
            commit = hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="A diffusion network")
        except Exception as error:  # of the hub's client: no connection, no token and no right are kinds of their own
            raise OSError(f"{repo_id} cannot be written on {hub.endpoint}: {error}") from error
        return str(commit.commit_url)


def _write_model(unet: nn.Module, scheduler: Sampler, folder: Path) -> None:
    network: Any = unet
    sampler = as_sampler(scheduler)
    if isinstance(sampler, DDIMScheduler):
        pipeline: Any = DDIMPipeline(network, sampler)
        pipeline.save_pretrained(folder)
    else:  # diffusers has no pipeline of a flow that takes a network alone
        network.save_pretrained(folder / "unet")
        sampler.save_pretrained(folder / "scheduler")
        (folder / WITHOUT_INDEX).touch()
    config = read_json(folder / "unet" / "config.json")
    config.pop("_name_or_path", None)  # where on this machine it was read from
    state = quantized_state(unet)
    if state is None:
        if (config.get("quantization_config") or {}).get("quant_method") == Method.PQCAD.value:
            del config["quantization_config"]  # what from_config copied of a quantized network's
        (folder / WITHOUT_FACTS).touch()
        for weights in (folder / "unet").glob("*.safetensors"):
            seal_tensors(weights)
    else:
        contents = {"average_bits": state.plan.average_bits, "summary": state.plan.summary()}
        (folder / FACTS).write_text(json.dumps({**contents, "timesteps": state.timestep.schedule}, indent=2))
    (folder / "unet" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _finish_saving(folder: Path) -> None:
    """Move a model that was saved whole to its place, also where a process was killed while it did so."""
    saved = folder / SAVED
    if not saved.is_dir():
        return
    if (saved / WITHOUT_FACTS).exists():
        (folder / FACTS).unlink(missing_ok=True)  # of another network that was here
    if (saved / WITHOUT_INDEX).exists():
        (folder / INDEX).unlink(missing_ok=True)
    if is_users(folder / CARD):
        (saved / CARD).unlink(missing_ok=True)
    for name in ("unet", "scheduler", FACTS, CARD, INDEX):
        if (saved / name).exists():
            if (folder / name).is_dir():
                (folder / name).rename(saved / f"older {name}")
            (saved / name).replace(folder / name)
    flush(folder)
    shutil.rmtree(saved)
