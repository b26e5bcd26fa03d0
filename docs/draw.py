"""Draws the pictures of docs/how-it-works.md with the library's own rules: ``python docs/draw.py``."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import DDIMScheduler
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pqcad_ao.learn.transition import MomentumTransition

PICTURES = Path(__file__).parent / "pictures"
BLUE, ORANGE, GREEN, GREY = "#174a7c", "#b3541e", "#4c7a3f", "#8a94a0"


def figure(width: float, height: float, columns: int = 1, rows: int = 1, **options):
    """A figure on white, which reads in light and in dark, and its axes."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(made)
    return made, made.subplots(rows, columns, **options)


def save(made: Figure, name: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        made.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


def rounded(w: np.ndarray, bits: int) -> np.ndarray:
    """Q_b(w) on a symmetric grid over [-1, 1]."""
    scale = 1 / 2 ** (bits - 1)
    return np.clip(np.round(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def blending() -> None:
    """A weight on its way from one width to the next."""
    w = np.linspace(-0.5, 0.5, 2001)
    made, axes = figure(9, 2.9, columns=3, sharey=True)
    for axis, alpha in zip(axes, (0.0, 0.5, 1.0), strict=True):
        axis.plot(w, w, color=GREY, linewidth=0.8, linestyle=":")
        axis.plot(w, (1 - alpha) * rounded(w, 4) + alpha * rounded(w, 3), color=BLUE)
        axis.set_title(f"α = {alpha:g}", fontsize=10)
        axis.set_xlabel("w")
    axes[0].set_ylabel("(1 - α) Q₄(w) + α Q₃(w)")
    save(made, "blending")


def momentum() -> None:
    """A ladder walked by the momentum of a loss that settles at each width."""
    policy = MomentumTransition([8, 6, 5, 4], budget=240, window=8, patience=3)
    generator = np.random.default_rng(0)
    height = {8: 0.004, 6: 0.012, 5: 0.03, 4: 0.08}
    losses, momenta, bits, alphas, since, before = [], [], [], [], 0, 8
    while not policy.done:
        since = since + 1 if policy.bits == before else 0
        before = policy.bits
        losses.append(height[policy.bits] * (0.4 + np.exp(-since / 12)) * generator.uniform(0.8, 1.25))
        policy.update(float(losses[-1]))
        momenta.append(policy.momentum)
        bits.append(policy.bits)
        alphas.append(policy.alpha)
    made, (above, below) = figure(9, 4.2, rows=2, sharex=True, height_ratios=(3, 2))
    above.plot(losses, color=GREY, linewidth=0.8, label="ℓ, the loss of a batch")
    above.plot(momenta, color=BLUE, label="m, its momentum")
    above.set_yscale("log")
    above.legend(fontsize=8, loc="lower right")
    below.plot(bits, color=ORANGE, drawstyle="steps-post")
    below.set_ylabel("bits", color=ORANGE)
    below.set_yticks(policy.ladder)
    below.set_xlabel("update k")
    blend = below.twinx()
    blend.plot(alphas, color=GREEN, linewidth=1)
    blend.set_ylabel("α", color=GREEN)
    for axis in (above, below):
        for transition in policy.transitions:
            axis.axvline(transition.step, color=GREY, linewidth=0.7, linestyle=":")
    save(made, "momentum")


def noise_of(x_t: torch.Tensor, alpha_bar: float) -> torch.Tensor:
    """ε*(x_t): the exact prediction where x_0 is -1 or 1, each half of the time."""
    signal, deviation = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x_0 = torch.tanh(signal * x_t / deviation**2)
    return (x_t - signal * x_0) / deviation


def walk(x: torch.Tensor, steps: int) -> tuple[list[int], torch.Tensor]:
    """DDIM's walk with the exact prediction: the timesteps, and x_t at each and at the end."""
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    path = [x]
    for t in scheduler.timesteps:
        prediction = noise_of(path[-1], float(scheduler.alphas_cumprod[t]))
        path.append(scheduler.step(prediction, t, path[-1]).prev_sample)
    return [*scheduler.timesteps.tolist(), 0], torch.stack(path)


def distillation() -> None:
    """The probability flow of a distribution of two points, and DDIM's steps beside it."""
    noise = torch.tensor([-1.6, -0.7, -0.2, 0.35, 1.1])
    made, axes = figure(9, 3.4, columns=2, sharey=True)
    fine_t, fine = walk(noise, 500)
    for axis, steps in zip(axes, (4, 2), strict=True):
        axis.plot(fine_t, fine, color=GREY, linewidth=1)
        coarse_t, coarse = walk(noise, steps)
        axis.plot(coarse_t, coarse, color=ORANGE, linewidth=1, marker="o", markersize=3)
        axis.set_xlim(1010, -10)
        axis.set_xlabel("timestep t")
        axis.set_title(f"grey: the flow; orange: {steps} steps of DDIM", fontsize=10)
    places = [min(range(len(fine_t)), key=lambda k: abs(fine_t[k] - t)) for t in walk(noise, 2)[0]]
    targets = fine[places]
    axes[1].plot(walk(noise, 2)[0], targets, color=BLUE, linestyle="none", marker="D", markersize=4)
    axes[0].set_ylabel("$x_t$")
    save(made, "distillation")


if __name__ == "__main__":
    matplotlib.rcParams["svg.fonttype"] = "path"
    blending()
    momentum()
    distillation()
