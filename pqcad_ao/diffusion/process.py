"""The noise processes that networks are trained on, as deterministic DDIM samplers walk them."""

import json
from pathlib import Path

from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from torch import Tensor, nn

# Schedulers that walk the variance-preserving process of Ho et al. 2020 on integer timesteps.
FAMILY = (DDIMScheduler, DDPMScheduler, PNDMScheduler)
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
        ValueError: the one that is there is not of the DDPM/DDIM family.
    """
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not path:
        return None
    for folder in (Path(path) / "scheduler", Path(path), Path(path).parent / "scheduler"):
        file = folder / "scheduler_config.json"
        if file.is_file():
            scheduler_class = json.loads(file.read_text()).get("_class_name")
            known = {kind.__name__: kind for kind in FAMILY}
            if scheduler_class not in known:
                raise ValueError(
                    f"the scheduler saved in {folder} is a {scheduler_class}: allowed are {', '.join(known)}. If the "
                    f"network was trained on a DDPM noise process, pass DDIMScheduler.from_pretrained({str(folder)!r})"
                )
            return as_ddim(known[scheduler_class].from_pretrained(folder))
    return None
