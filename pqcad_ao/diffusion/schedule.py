"""Sampling schedules: the timesteps that a sampler visits, and which of them can be halved."""

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from pqcad_ao.diffusion.process import as_ddim, check_signal
from pqcad_ao.utils.checks import check_count


def teachable(scheduler, num_inference_steps: int, halvings: int) -> DDIMScheduler:
    """The DDIM sampler behind ``scheduler``, where a network can be taught to take its steps two at a time.

    Its timesteps are trailing, whatever the scheduler's are (Lin et al. 2023, §3.3): in half the steps, or a quarter,
    it visits every second, or every fourth, of them, so that its config says all there is to remember.

    Raises:
        ValueError: steps that cannot be halved so often, or do not divide the training timesteps, a scheduler that
            draws noise while it samples, another family, dynamic thresholding, or epsilon prediction where the signal
            is zero.
    """
    if isinstance(scheduler, DDPMScheduler):
        raise ValueError(
            "DDPMScheduler draws noise at every step, and a jump over two of them has no one target: pass "
            "DDIMScheduler.from_config(scheduler.config)"
        )
    ddim, parts = as_ddim(scheduler), 2**halvings
    if num_inference_steps < parts or num_inference_steps % parts:
        raise ValueError(
            f"{num_inference_steps} steps cannot be halved {halvings} times: give a multiple of {parts}, such as "
            f"{max(1, round(num_inference_steps / parts)) * parts}"
        )
    if ddim.config.num_train_timesteps % num_inference_steps:
        raise ValueError(
            f"{num_inference_steps} steps do not divide the scheduler's {ddim.config.num_train_timesteps} training "
            "timesteps, so every second of them is no schedule: give a number that does"
        )
    if ddim.config.thresholding:
        raise ValueError(
            "thresholding=True clips by each picture's own values, which no jump's target knows: give False"
        )
    ddim = DDIMScheduler.from_config(ddim.config, timestep_spacing="trailing")
    ddim.set_timesteps(num_inference_steps)
    check_signal(ddim, ddim.timesteps)
    return ddim


def timesteps_of(scheduler: DDIMScheduler, num_inference_steps: int) -> list[int]:
    """The timesteps that a sampler visits, from noise to image."""
    walked = DDIMScheduler.from_config(scheduler.config)
    walked.set_timesteps(num_inference_steps)
    return walked.timesteps.tolist()


def refined(timesteps: list[int], substeps: int) -> list[int]:
    """Timesteps with others between each two of them, and behind the last one: ``substeps`` times as many, evenly
    spaced up to rounding."""
    ends = [*timesteps[1:], -1]
    return [
        start - round(number * (start - end) / substeps)
        for start, end in zip(timesteps, ends, strict=True)
        for number in range(substeps)
    ]


def check_substeps(ddim: DDIMScheduler, num_inference_steps: int, substeps: int) -> None:
    """Look whether the flow can be walked in ``substeps`` for each step of the sampler, which :func:`teachable` made.

    Raises:
        ValueError: more than the training timesteps hold, or the noise does not grow from one visited timestep to the
            next, so that no solver has a step there.
    """
    trained = ddim.config.num_train_timesteps
    between = trained // num_inference_steps
    if substeps > between:
        raise ValueError(
            f"reference_substeps={substeps}: {num_inference_steps} of {trained} training timesteps are {between} "
            f"apart, and the reference stops at training timesteps alone: write at most {between}"
        )
    visited = refined(timesteps_of(ddim, num_inference_steps), substeps)
    signal = ddim.alphas_cumprod[visited]
    if not (bool((signal.diff() > 0).all()) and float(signal[-1]) < 1):
        raise ValueError(
            f"the scheduler adds no noise between some of the {len(visited)} timesteps that the reference visits: its "
            "betas must be above 0, or give fewer reference_substeps"
        )


def default_steps(distilled: list[int] | None) -> int:
    """Steps where the user names none: as many as the network was distilled for, or else 20."""
    return 20 if distilled is None else len(distilled)


def steps_to_bind(scheduler: DDIMScheduler, asked: int | None, distilled: list[int] | None) -> int:
    """How many steps of ``scheduler`` a program is bound to.

    Args:
        asked: what the user wrote; None: :func:`default_steps`.
        distilled: the timesteps that the network was distilled for, if it was.

    Raises:
        ValueError: more steps than training timesteps, or others than the network was distilled for.
    """
    steps = default_steps(distilled) if asked is None else asked
    trained = scheduler.config.num_train_timesteps
    check_count("num_inference_steps", steps, most=trained, otherwise=", the scheduler's training timesteps")
    visited = timesteps_of(scheduler, steps)
    if distilled is not None and visited != distilled:
        raise ValueError(
            f"this network was distilled for {len(distilled)} steps, timesteps {shown(distilled)}, and the scheduler "
            f"walks {shown(visited)} in {steps}: write num_inference_steps={len(distilled)} and pass the scheduler "
            "that distill_ returned, which is saved beside the network"
        )
    return steps


def shown(timesteps: list[int]) -> str:
    """A schedule's first timesteps and its last one."""
    parts = timesteps if len(timesteps) < 5 else [*timesteps[:3], "...", timesteps[-1]]
    return ", ".join(map(str, parts))


def signal_power(scheduler: DDIMScheduler, num_inference_steps: int) -> tuple[Tensor, Tensor]:
    """The cumulative product of alphas, (S,) each: at a schedule's timesteps, and where their DDIM steps lead to."""
    visited = torch.tensor(timesteps_of(scheduler, num_inference_steps))
    # as DDIMScheduler.step counts them, whatever the next timestep of the schedule is
    led_to = visited - scheduler.config.num_train_timesteps // num_inference_steps
    alphas = scheduler.alphas_cumprod
    return alphas[visited], torch.where(led_to >= 0, alphas[led_to.clamp_min(0)], scheduler.final_alpha_cumprod)
