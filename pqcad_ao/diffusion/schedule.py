"""Sampling schedules: the timesteps that a sampler visits, and which of them can be halved."""

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pqcad_ao.diffusion.noise import Sampler, process_of
from pqcad_ao.diffusion.process import as_sampler, check_counted, check_signal, draws_noise, span_of
from pqcad_ao.utils.checks import check_count


def teachable(scheduler, num_inference_steps: int, halvings: int) -> Sampler:
    """The sampler behind ``scheduler``, where a network can be taught to take its steps two at a time.

    In half the steps, or a quarter, it visits every second, or every fourth, of its timesteps, so that its config says
    all there is to remember. A flow's are so; DDIM's become trailing, whatever they were (Lin et al. 2023, §3.3).

    Raises:
        ValueError: steps that cannot be halved so often, or do not divide the training timesteps, a scheduler that
            draws noise while it samples, another family or EDM's process, dynamic thresholding, a flow with a terminal
            shift, or epsilon prediction where the signal is zero.
    """
    sampler, parts = as_sampler(scheduler), 2**halvings
    check_counted(span_of(sampler), "distillation")
    if draws_noise(scheduler):
        raise ValueError(
            f"{type(scheduler).__name__} draws noise at every step, and a jump over two of them has no one target: "
            "pass the deterministic sampler of its noise process, pqcad_ao.diffusion.process.as_sampler(scheduler)"
        )
    if num_inference_steps < parts or num_inference_steps % parts:
        raise ValueError(
            f"{num_inference_steps} steps cannot be halved {halvings} times: give a multiple of {parts}, such as "
            f"{max(1, round(num_inference_steps / parts)) * parts}"
        )
    if not isinstance(sampler, DDIMScheduler):
        if sampler.config.shift_terminal:
            raise ValueError(
                f"shift_terminal={sampler.config.shift_terminal} moves the timesteps of half as many steps off those "
                "of all: give a FlowMatchEulerDiscreteScheduler without it"
            )
        return sampler
    if sampler.config.num_train_timesteps % num_inference_steps:
        raise ValueError(
            f"{num_inference_steps} steps do not divide the scheduler's {sampler.config.num_train_timesteps} training "
            "timesteps, so every second of them is no schedule: give a number that does"
        )
    if sampler.config.thresholding:
        raise ValueError(
            "thresholding=True clips by each picture's own values, which no jump's target knows: give False"
        )
    ddim = DDIMScheduler.from_config(sampler.config, timestep_spacing="trailing")
    ddim.set_timesteps(num_inference_steps)
    check_signal(ddim, ddim.timesteps)
    return ddim


def timesteps_of(scheduler, num_inference_steps: int) -> list:
    """The timesteps that :func:`~pqcad_ao.diffusion.process.as_sampler` visits, from noise to image."""
    process = process_of(as_sampler(scheduler))
    process.set_timesteps(num_inference_steps)
    return process.sampler.timesteps.tolist()


def refined(sampler: Sampler, num_inference_steps: int, substeps: int) -> list:
    """A sampler's timesteps with others between each two of them, and behind the last one: ``substeps`` as many."""
    process, visited = process_of(sampler), timesteps_of(sampler, num_inference_steps)
    ends = [*visited[1:], process.image]
    return [
        timestep for start, end in zip(visited, ends, strict=True) for timestep in process.between(start, end, substeps)
    ]


def check_substeps(sampler: Sampler, num_inference_steps: int, substeps: int) -> None:
    """Look whether the flow can be walked in ``substeps`` for each step of the sampler, which :func:`teachable` made.

    Raises:
        ValueError: more than the training timesteps hold, or the noise does not grow from one visited timestep to the
            next, so that no solver has a step there.
    """
    if (why := _not_walkable(sampler, num_inference_steps, substeps)) is not None:
        raise ValueError(why)


def substeps_from_anew(sampler: Sampler, num_inference_steps: int, substeps: int) -> int:
    """Of a walk that begins between noise and image, for each step of the sampler: twice ``substeps``, where there is
    room for them, for a solver of several steps knows of none before its first one, and errs most there."""
    return substeps if _not_walkable(sampler, num_inference_steps, 2 * substeps) else 2 * substeps


def _not_walkable(sampler: Sampler, num_inference_steps: int, substeps: int) -> str | None:
    """Why the flow cannot be walked in as many substeps; None: it can."""
    trained = sampler.config.num_train_timesteps
    between = trained // num_inference_steps
    if substeps > between and isinstance(sampler, DDIMScheduler):
        return (
            f"reference_substeps={substeps}: {num_inference_steps} of {trained} training timesteps are {between} "
            f"apart, and the reference stops at training timesteps alone: write at most {between}"
        )
    visited = refined(sampler, num_inference_steps, substeps)
    alphas, _ = process_of(sampler).alphas_sigmas(visited)
    if not (bool((alphas[:-1].diff() > 0).all()) and float(alphas[-2]) < 1):
        return (
            f"the scheduler adds no noise between some of the {len(visited)} timesteps that the reference visits: its "
            "betas must be above 0, or give fewer reference_substeps"
        )
    return None


def default_steps(distilled: list[int] | None) -> int:
    """Steps where the user names none: as many as the network was distilled for, or else 20."""
    return 20 if distilled is None else len(distilled)


def steps_to_bind(scheduler: Sampler, asked: int | None, distilled: list[int] | None) -> int:
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


def signal_and_noise(scheduler: Sampler, num_inference_steps: int) -> tuple[Tensor, Tensor]:
    """Alphas and sigmas of x_t, (2, S) float64 each: at a schedule's timesteps, and where their steps lead to."""
    timesteps = timesteps_of(scheduler, num_inference_steps)
    if not isinstance(scheduler, DDIMScheduler):
        alphas, sigmas = process_of(scheduler).alphas_sigmas(timesteps)
        return torch.stack([alphas[:-1], alphas[1:]]), torch.stack([sigmas[:-1], sigmas[1:]])
    visited = torch.tensor(timesteps)
    # as DDIMScheduler.step counts them, whatever the next timestep of the schedule is
    led_to = visited - scheduler.config.num_train_timesteps // num_inference_steps
    powers = scheduler.alphas_cumprod
    there = torch.where(led_to >= 0, powers[led_to.clamp_min(0)], scheduler.final_alpha_cumprod)
    power = torch.stack([powers[visited], there]).double()
    return power.sqrt(), (1 - power).sqrt()
