"""Train a full-precision diffusion UNet: ``python -m pqcad_ao.recipes.train_teacher --data DIR --out DIR``.

DDPM training (Ho et al. 2020, algorithm 1) with a v-, epsilon- or sample-target (Salimans & Ho 2022, appendix D), an
exponential moving average of the weights, and checkpoints from which a killed run resumes bit for bit.
"""

import argparse
import copy
import io
import math
import time
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.training_utils import EMAModel
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from pqcad_ao.data import load_images, to_unit
from pqcad_ao.denoiser import predict
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.models import load_model, save_model
from pqcad_ao.pages.pictures import save_grid
from pqcad_ao.recipes.settings import load_settings
from pqcad_ao.utils.files import write_whole
from pqcad_ao.utils.progress import tqdm
from pqcad_ao.utils.runs import only_run_in
from pqcad_ao.utils.tensor_files import write_tensors


def target(scheduler: DDIMScheduler, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network is asked to predict, by ``scheduler.config.prediction_type``. Shapes (B, C, H, W)."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(x_0, noise, timesteps)
    return x_0


def lr_at(step: int, train: DictConfig) -> float:
    """Linear warm-up, then a half cosine that reaches zero at ``train.steps``, or ``train.lr`` to the end."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.get("schedule", "cosine") == "constant":
        return train.lr
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - train.warmup) / max(1, train.steps - train.warmup)))


def averaged_copy(unet: UNet2DModel, ema: EMAModel) -> UNet2DModel:
    """A copy of ``unet`` with the averaged weights, in evaluation mode; draws no random numbers."""
    averaged = copy.deepcopy(unet).eval()
    ema.copy_to(averaged.parameters())
    return averaged


def write_half(unet: UNet2DModel, scheduler: DDIMScheduler, folder: str | Path) -> None:
    """Write a network in half precision and its scheduler, which ``load_model`` reads: three files, each one whole."""
    unet_dir, scheduler_dir = Path(folder, "unet"), Path(folder, "scheduler")
    for place, configured in ((unet_dir / CONFIG_NAME, unet), (scheduler_dir / SCHEDULER_CONFIG_NAME, scheduler)):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, configured.to_json_string().encode())
    weights = {name: value.detach().half().cpu().contiguous() for name, value in unet.state_dict().items()}
    write_tensors(unet_dir / SAFETENSORS_WEIGHTS_NAME, weights)


def initial_weights(unet: UNet2DModel, folder: str | Path) -> dict[str, Tensor]:
    """The weights of the network in a folder of diffusers layout.

    Raises:
        ValueError: no network there, or one of other shapes than ``unet``.
    """
    weights = load_model(folder)[0].state_dict()
    expected = {name: value.shape for name, value in unet.state_dict().items()}
    if {name: value.shape for name, value in weights.items()} != expected:
        raise ValueError(f"{folder} holds another network than this configuration's: give its own, or no start")
    return weights


def train(
    config: DictConfig,
    images: Tensor,
    out: str | Path,
    *,
    device: str = "cpu",
    stop_after: int | None = None,
    start: str | Path | None = None,
    half: str | Path | None = None,
) -> list[float]:
    """Train and return the loss of every step done in this call.

    Args:
        config: as in ``configs/*.yaml``. ``train.schedule``: ``cosine`` (None) or ``constant``. ``train.compile``,
            ``train.channels_last``: for a GPU. ``train.seconds``: leave after so many with a checkpoint written.
        images: (N, C, H, W) uint8.
        out: receives ``checkpoint.pt`` (resumed from if it is there), ``grid-STEP.png``, and the averaged model as
            ``save_model`` leaves it.
        stop_after: leave after this step with a checkpoint written, as if interrupted.
        start: a folder of diffusers layout whose weights are the first ones, where ``out`` has no checkpoint: the
            averaged weights of an earlier run, which are a quarter of its checkpoint.
        half: a folder that receives the averaged model in half precision, too, with each checkpoint: an eighth of one,
            to take away and ``start`` from.

    Raises:
        FloatingPointError: the loss is not finite; the last checkpoint is kept. ValueError: no images, an unknown
            schedule, a damaged checkpoint, or ``start`` holds another network. BlockingIOError: a run is at work in
            ``out``.
    """
    with only_run_in(out):
        return _train(config, images, Path(out), device, stop_after, start, half)


def _train(  # noqa: C901, PLR0912, PLR0915  (a recipe's loop is read in one piece)
    config: DictConfig,
    images: Tensor,
    out: Path,
    device: str,
    stop_after: int | None,
    start: str | Path | None,
    half: str | Path | None,
) -> list[float]:
    """As :func:`train`, in a folder that is this run's."""
    if not len(images):
        raise ValueError("images holds no image: there is nothing to train on")
    if config.train.get("schedule", "cosine") not in ("cosine", "constant"):
        raise ValueError(f"train.schedule={config.train.schedule!r}: allowed are cosine and constant")
    options = config.train
    torch.manual_seed(options.seed)
    architecture: Any = OmegaConf.to_container(config)
    unet = UNet2DModel(**architecture["unet"]).to(device)
    if start is not None:
        unet.load_state_dict(initial_weights(unet, start))
    if options.get("channels_last", False):
        unet = unet.to(memory_format=torch.channels_last)
    network = torch.compile(unet) if options.get("compile", False) else unet
    scheduler = DDIMScheduler(**architecture["scheduler"])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ema = EMAModel(unet.parameters(), decay=options.ema, foreach=True)
    generator = torch.Generator(device).manual_seed(options.seed)
    grid_noise = torch.randn(
        64, unet.config.in_channels, config.data.image_size, config.data.image_size, generator=generator, device=device
    )
    first, checkpoint = 0, out / "checkpoint.pt"
    if checkpoint.exists():
        try:
            with ZipFile(checkpoint) as archive:  # torch.load looks at no checksum
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} in it is not what was written")
            state = torch.load(checkpoint, weights_only=True, map_location=device)
            unet.load_state_dict(state["unet"])
            optimizer.load_state_dict(state["optimizer"])
            ema.load_state_dict(state["ema"])
            first = state["step"]
            generator.set_state(state["generator"].cpu())
            torch.set_rng_state(state["rng"].cpu())  # dropout draws from the global generator
            if "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"].cpu(), device)
        except Exception as error:  # a zip of pickles: what is damaged in it may raise anything
            raise ValueError(
                f"{checkpoint} is damaged or of another network ({error}): delete it to begin anew"
            ) from error

    def save(step: int) -> None:
        averaged = averaged_copy(unet, ema)
        save_model(averaged, scheduler, out)
        if half is not None:
            write_half(averaged, scheduler, half)
        state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"ema": ema.state_dict(), "step": step}
        state |= {"generator": generator.get_state(), "rng": torch.get_rng_state()}
        if torch.device(device).type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(device)
        content = io.BytesIO()  # to a file, torch.save says of a full disk only that it is at an unexpected position
        torch.save(state, content)
        write_whole(checkpoint, content.getvalue())

    losses: list[Tensor] = []
    last = options.steps if stop_after is None else min(stop_after, options.steps)
    unet.train()
    ends_at = time.monotonic() + options.get("seconds", math.inf)
    bar = tqdm(range(first, last), initial=first, total=options.steps, desc="teacher", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, options)
        rows = torch.randint(len(images), (options.batch_size,), generator=generator, device=device)
        x_0 = to_unit(images[rows.to(images.device)].to(device))
        if config.data.flip:
            mirrored = torch.rand(len(x_0), generator=generator, device=device) < 0.5
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(x_0),), generator=generator, device=device)
        x_t = scheduler.add_noise(x_0, noise, timesteps)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=options.bf16):
            prediction = predict(network, x_t, timesteps)
        loss = (prediction.float() - target(scheduler, x_0, noise, timesteps)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), options.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        losses.append(loss.detach())
        done = step + 1
        over = done == last or (done % 50 == 0 and time.monotonic() > ends_at)
        due = done % options.checkpoint_every == 0 or over
        drawn = done % options.grid_every == 0 or (over and last == options.steps)
        if done % 50 == 0 or due or drawn:  # one synchronisation in fifty steps; nothing unsound is saved or drawn
            recent = torch.stack(losses[-50:]).mean().item()
            if not math.isfinite(recent):
                raise FloatingPointError(
                    f"the loss is {recent} near step {done}; lower train.lr (now {options.lr}) and resume"
                )
            bar.set_postfix(loss=f"{recent:.4f}", lr=f"{lr_at(step, options):.1e}")
        # before the checkpoint, from which a killed run goes on without it
        if drawn:
            grid = sample(averaged_copy(unet, ema), scheduler, grid_noise, options.grid_steps)
            save_grid(grid, out / f"grid-{done}.png")
        if due:
            save(done)
        if over:
            break
    return torch.stack(losses).tolist() if losses else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with idx.gz files, CIFAR-10's binary batches, or images")
    parser.add_argument("--out", required=True, help="where checkpoints, grids and the trained model go")
    parser.add_argument("--config", default="fashion_mnist", help="a name in recipes/configs or a YAML file")
    parser.add_argument("--start", help="a folder of diffusers layout: go on from its weights")
    parser.add_argument("--half", help="a folder that receives the model in half precision, too, with each checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("overrides", nargs="*", help="such as train.steps=100 train.bf16=false")
    args = parser.parse_args(argv)
    config = load_settings(args.config, args.overrides)
    images, _ = load_images(args.data, "train", image_size=config.data.image_size, channels=config.unet.in_channels)
    train(config, images, args.out, device=args.device, start=args.start, half=args.half)


if __name__ == "__main__":
    main()
