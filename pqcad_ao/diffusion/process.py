"""The noise processes that networks are trained on, as deterministic DDIM samplers walk them."""

from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from torch import Tensor, nn

from pqcad_ao.utils.checks import check_count
from pqcad_ao.utils.files import read_json

# Schedulers that walk the variance-preserving process of Ho et al. 2020 on integer timesteps.
FAMILY = (DDIMScheduler, DDPMScheduler, PNDMScheduler)
MOST_TIMESTEPS = 2**20  # of a noise process that is read from a file; of those that are known most have 1000
LEAST_SIGNAL = 1e-6  # power of the image in x_t


def as_ddim(scheduler) -> DDIMScheduler:
    """The deterministic DDIM sampler of a scheduler's noise process.

    Raises:
        ValueError: the scheduler is not of the DDPM/DDIM family.
    """
    if not isinstance(scheduler, FAMILY):
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__}: allowed are {', '.join(kind.__name__ for kind in FAMILY)}. "
            "If the network was trained on a DDPM noise process, pass DDIMScheduler.from_config(scheduler.config)"
        )
    # PNDM never clips, and DDIM does where the configuration does not say
    return DDIMScheduler.from_config(scheduler.config, clip_sample=scheduler.config.get("clip_sample", False))


def settings_of(scheduler) -> str:
    """What a scheduler computes with, the same in every process (diffusers keeps a list in a set's order beside it)."""
    return repr(sorted((name, value) for name, value in scheduler.config.items() if not name.startswith("_")))


def check_signal(scheduler, timesteps: Tensor) -> None:
    """Look whether a network that predicts epsilon can be sampled from the first of these timesteps on.

    Raises:
        ValueError: the signal there is zero, and a prediction of the noise says nothing about the image.
    """
    first = int(timesteps[0])
    if scheduler.config.prediction_type == "epsilon" and float(scheduler.alphas_cumprod[first]) < LEAST_SIGNAL:
        raise ValueError(
            f"at timestep {first} the schedule has no signal, and a prediction of epsilon says nothing about the image "
            "there: such a network predicts v or the sample, or its betas are others (rescale_betas_zero_snr?)"
        )


def matching_ddim(scheduler, num_train_timesteps: int) -> DDIMScheduler:
    """:func:`as_ddim` of the scheduler that a network was quantized with.

    Raises:
        ValueError: as :func:`as_ddim`, or it has another number of training timesteps.
    """
    scheduler = as_ddim(scheduler)
    trained = scheduler.config.num_train_timesteps
    if trained != num_train_timesteps:
        raise ValueError(
            f"the scheduler has {trained} training timesteps, the network was quantized for {num_train_timesteps}: "
            "pass the scheduler it was quantized with"
        )
    return scheduler


def find_scheduler(model: nn.Module) -> DDIMScheduler | None:
    """The scheduler saved beside a network that was loaded from a diffusers folder, if there is one.

    Raises:
        ValueError: as :func:`read_scheduler`.
    """
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not path:
        return None
    for folder in (Path(path) / "scheduler", Path(path), Path(path).parent / "scheduler"):
        if (folder / "scheduler_config.json").is_file():
            return read_scheduler(folder)
    return None


def read_scheduler(folder: Path) -> DDIMScheduler:
    """The DDIM sampler of the scheduler that a folder holds.

    Raises:
        ValueError: it is not of the DDPM/DDIM family, or damaged.
    """
    file = folder / "scheduler_config.json"
    kind, values = class_of(file, {kind.__name__: kind for kind in FAMILY}), read_json(file)
    # before anything is made of them: each becomes as many numbers
    check_count(f"{file}: num_train_timesteps", values.get("num_train_timesteps", 1000), most=MOST_TIMESTEPS)
    try:
        scheduler = as_ddim(kind.from_pretrained(folder))
        sound = all(0 <= power <= 1 for power in [*scheduler.alphas_cumprod.tolist(), scheduler.final_alpha_cumprod])
    except Exception as error:  # what a configuration says reaches every line of diffusers' constructors
        raise ValueError(f"{file} cannot be read as a {kind.__name__}: {error}") from error
    if not sound:
        raise ValueError(f"{file} is damaged: with its betas the signal's power is not from 0 to 1")
    return scheduler


def class_of(config: Path, allowed: dict[str, Any]) -> Any:
    """The class that a diffusers config file names.

    Raises:
        ValueError: it names another than those allowed, or is no such file.
    """
    name = read_json(config).get("_class_name")
    if not isinstance(name, str) or name not in allowed:
        hint = ""
        if config.name == "scheduler_config.json":
            hint = (
                ". If the network was trained on a DDPM noise process, pass "
                f"DDIMScheduler.from_pretrained({str(config.parent)!r})"
            )
        raise ValueError(f"{config} names the class {name}: allowed are {', '.join(allowed)}{hint}")
    return allowed[name]
