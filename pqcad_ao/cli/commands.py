"""The commands: what each takes, says of itself, and does in a few lines around the library.

PyTorch and all that needs it are imported when a command runs, so that ``--help`` answers at once.
"""

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.utils.options import (
    COMMON,
    NONE_GIVEN,
    WRITTEN,
    Count,
    Device,
    Flag,
    Shared,
    Whole,
    Wholes,
    options,
    resumable,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    Planning = dict[str, Any]
    Quantizing = dict[str, Any]
    Distilling = dict[str, Any]
else:  # made at run time, where no type checker looks
    decides = ("weight_bits", "activation_bits", "overrides", "target_bits")
    Planning = options(PQCADConfig, "Bits", only=decides, **WRITTEN)
    Quantizing = options(PQCADConfig, "Quantizing (PQCADConfig)", **WRITTEN)
    Distilling = options(CADConfig, "Distilling (CADConfig)", without=("seed", "steps", "halvings"))

# sd15 is conditional, which of all commands `bench compile` alone can time
Model = Annotated[
    str,
    Parameter(
        help="demo, demo-w4a6, ddpm-cifar10 (random weights), or a folder of diffusers layout (unet/, scheduler/)."
    ),
]
Steps = Annotated[
    Count | None, Parameter(help="Sampling steps; what the network was distilled for, or 20, if not given.")
]
BatchSize = Annotated[Count, Parameter(help="Images a call.")]
Sizes = Annotated[Wholes, Parameter(help="Images a call; 1,4 writes methods for either size, which share the weights.")]
ONE_IMAGE = [1]  # a call
Conditioning = Annotated[
    Path | None,
    Parameter(
        help="For a conditional network: a .safetensors file of tensors with rows to draw from, named as the arguments "
        "of its forward, such as encoder_hidden_states; dots make a dictionary, added_cond_kwargs.text_embeds."
    ),
]


LARGE, GRID = 8, 64  # pictures of a page that a command draws for it, and those of what it draws anyhow


def conditioned(unet: "nn.Module", model: str, file: Path | None) -> dict[str, Any]:
    """The conditioning of a network that ``--model`` names, on its device and in its type.

    Raises:
        ValueError: the network wants what the file does not hold, or there is none.
    """
    from pqcad_ao.data import read_conditioning
    from pqcad_ao.denoiser import cast_floats, check_conditioning, placement

    given = None if file is None else read_conditioning(file)
    try:
        return cast_floats(check_conditioning(unet, given), placement(unet)[1])
    except ValueError as error:
        if file is not None:
            raise ValueError(f"{file}: {error}") from error
        wanted = str(error).partition(": pass ")[0]
        raise ValueError(f"{model}: {wanted}: write --conditioning FILE.safetensors, which holds it") from error


def check_writable(folder: Path) -> None:
    """Make ``folder`` and try to write there, so that a bad place is found out before the work and not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): give another place") from error


def steps_of(unet: "nn.Module") -> int:
    """Sampling steps where the command line names none: those that something of the network was made for, or 20."""
    from pqcad_ao.diffusion.cache_plan import cache_plan
    from pqcad_ao.diffusion.correction import correction_of
    from pqcad_ao.diffusion.schedule import default_steps
    from pqcad_ao.nn.state import quantized_state

    for made in (cache_plan(unet), correction_of(unet)):
        if made is not None:
            return len(made.timesteps)
    state = quantized_state(unet)
    return default_steps(None if state is None else state.timestep.schedule)


def following(unet: "nn.Module") -> "nn.Module":
    """The network as it samples: by its cache plan, where it has one."""
    from pqcad_ao.cached_unet import CachedUNet
    from pqcad_ao.diffusion.cache_plan import cache_plan

    return unet if cache_plan(unet) is None else CachedUNet(unet)


def sampled(
    unet: "nn.Module", scheduler: Any, conditioning: dict[str, Any], n: int, steps: int, batch_size: int, seed: int
) -> "Tensor":
    """``n`` images (N, C, H, W) in [-1, 1] from noise that ``seed`` and N alone decide, and from every row in turn.

    Of several processes each draws some, and all have all.
    """
    import torch

    from pqcad_ao.denoiser import placement, sample_shape, spread_rows
    from pqcad_ao.diffusion.sampling import sample
    from pqcad_ao.utils.processes import rank_and_world

    share = rank_and_world()
    noise = torch.randn(n, *sample_shape(unet), generator=torch.Generator().manual_seed(seed)).to(placement(unet)[0])
    rows = spread_rows(conditioning, torch.arange(n), n)
    options: dict[str, Any] = {"batch_size": batch_size, "conditioning": rows}
    return sample(following(unet), scheduler, noise, steps, **options, share=share, progress=share[0] == 0).cpu()


def demo(
    *,
    model: Model = "demo",
    out: Path = Path("demo-out"),
    images: Count = 256,
    steps: Count = 20,
    progressive: bool = True,
    distill: bool = True,
    common: Shared = COMMON,
) -> dict[str, Any]:
    """Compress the embedded teacher and measure everything on the spot.

    For example, in about five minutes, or in two:
        pqcad demo
        pqcad demo --out quick --images 64 --no-progressive --no-distill

    Args:
        out: folder that receives report.html, samples.png, summary.json, model/ and unet.pte.
        images: behind each FID.
        steps: of the sampler.
        progressive: a row that is learned progressively, about 60 seconds.
        distill: to half the steps, about 30 seconds.
    """
    from pqcad_ao.recipes import demo as recipe

    if distill and steps % 2:
        raise ValueError(f"--steps {steps} cannot be halved: give an even number, or --no-distill")
    if common.report is not None:
        raise ValueError(f"--report {common.report}: the demo writes report.html into its --out folder, {out}")
    check_writable(out)
    with resumable(out / recipe.UNFINISHED):
        return recipe.run(
            out,
            model=model,
            images=images,
            steps=steps,
            config=PQCADConfig.fast(seed=common.seed) if progressive else None,
            cad=CADConfig.fast(steps=steps, seed=common.seed) if distill else None,
            shipped="demo-w4a6" if (model, steps) == ("demo", 20) else None,
            seed=common.seed,
            command=common.command,
            progress=True,
        )


def plan(
    *,
    model: Model,
    conditioning: Conditioning = None,
    pq: Annotated[Planning, Parameter(name="*")] = NONE_GIVEN,
    common: Shared = COMMON,
) -> dict[str, Any]:
    """Print what happens, or happened, to each layer, and why.

    For example, with attention in eight bits and the first and last convolution in floating point:
        pqcad plan --model demo --override attention=8,8 --override 'conv_*=float'
    """
    from pqcad_ao.models import load_network
    from pqcad_ao.nn.state import quantized_state
    from pqcad_ao.plan import plan as plan_of

    unet = load_network(model)
    given = None if quantized_state(unet) else conditioned(unet, model, conditioning)
    resolved = plan_of(unet, PQCADConfig(**pq) if pq else None, conditioning=given)
    print(resolved)
    return {"rows": resolved.to_list(), "summary": resolved.summary()}


def compress(
    *,
    model: Model,
    out: Path,
    distill: Count | None = None,
    halvings: Count = 1,
    data: Path | None = None,
    folder: Path | None = None,
    fast: Flag = False,
    dry_run: Flag = False,
    conditioning: Conditioning = None,
    device: Device = "cpu",
    pq: Annotated[Quantizing, Parameter(name="*")] = NONE_GIVEN,
    cad: Distilling = NONE_GIVEN,
    common: Shared = COMMON,
) -> dict[str, Any]:
    """Quantize a network, teach it to sample in fewer steps where asked to, and save it in diffusers layout.

    For example, in seconds; as it is meant, first asking what it comes to; to five steps; with settings of your own:
        pqcad compress --model demo --out quick --mode ptq
        pqcad compress --model demo --out run --distill 20 --dry-run
        pqcad compress --model demo --out run --distill 20
        pqcad compress --model demo --out five --distill 20 --halvings 2
        pqcad compress --model demo --out a4 --activation-bits 4 --iterations 800

    Args:
        out: folder that receives unet/ and scheduler/.
        distill: N: then teach it to sample in N / 2 steps what full precision samples in N.
        halvings: K: N / 2^K steps instead.
        data: folder with real pictures for up to half of what it learns from then; none are needed.
        folder: keeps checkpoints and a log; the same command goes on where it was killed. Where none is given, what a
            killed command leaves is in unfinished/ of the --out folder until it is done.
        fast: fewer updates: quantizing a network of a million parameters takes less than 90 seconds on two idle cores.
        dry_run: print the plan, bytes before and after, and about how many minutes it would take; write nothing.
    """
    from pqcad_ao import ops
    from pqcad_ao.cli.forecast import forecast, weight_bytes
    from pqcad_ao.data import some_images
    from pqcad_ao.denoiser import sample_shape
    from pqcad_ao.distill import compress as compressed
    from pqcad_ao.models import load_model, save_model
    from pqcad_ao.nn.state import quantized_state
    from pqcad_ao.plan import plan as plan_of
    from pqcad_ao.quantize import quantize_
    from pqcad_ao.utils.processes import rank_and_world

    _check_distilling(distill, halvings, data, cad)
    config = (PQCADConfig.fast if fast else PQCADConfig)(**pq, seed=common.seed)
    halving = None
    if distill is not None:
        preset = CADConfig.fast if fast else CADConfig
        halving = preset(**cad, steps=distill, halvings=halvings, seed=common.seed)
    for kept in () if dry_run else (out, folder or out):
        check_writable(kept)
    work = out / "unfinished" if folder is None else folder
    unet, scheduler = load_model(model)
    unet.to(device)
    given = conditioned(unet, model, conditioning)
    if dry_run:
        return forecast(unet, scheduler, config, halving, given)
    full, pictures, first = weight_bytes(unet), {}, rank_and_world()[0] == 0

    def draw(name: str, steps: int) -> None:
        if common.report is not None:
            images = sampled(unet, scheduler, given, LARGE, steps, LARGE, common.seed)
            pictures[f"{name}, {steps} steps"] = images

    draw("full precision", distill or steps_of(unet))
    keeps: dict[str, Any] = {"folder": work, "conditioning": given, "progress": True}
    begin = time.perf_counter()
    with resumable(work):
        if halving is None:
            quantize_(unet, config, scheduler=scheduler, **keeps)
        else:
            images = None if data is None else some_images(data, sample_shape(unet), halving.points, halving.seed)
            unet, scheduler = compressed(unet, scheduler, config, halving, images=images, **keeps)
        seconds = time.perf_counter() - begin
        size = save_model(unet, scheduler, out).stat().st_size if first else 0
    if folder is None and first:
        shutil.rmtree(work, ignore_errors=True)
    draw("compressed", steps_of(unet))
    resolved, state = plan_of(unet), quantized_state(unet)
    for t in state.transitions if state else []:
        print(f"{t['stage']}, update {t['step']}: {t['from_bits']} to {t['to_bits']} bits, {t['reason']}")
    cosine = state.facts.get("task_cosine") if state else None
    if cosine is not None:
        print(
            "gradients of two ranges of timesteps: mean cosine {:.2f} at the start, {:.2f} at the end".format(*cosine)
        )
    print(f"{resolved.summary()}\n{out}: {size:,} bytes of weights, made in {seconds:.0f} s")
    if halving is not None:
        print(f"distilled: samples in {steps_of(unet)} steps with the scheduler beside it, not in {halving.steps}")
    return {
        "out": str(out),
        "checkpoint_bytes": size,
        "fp32_bytes": full,
        "seconds": seconds,
        "steps": None if halving is None else steps_of(unet),
        "summary": resolved.summary(),
        "rows": resolved.to_list(),
        "transitions": state.transitions if state else [],
        **({} if cosine is None else {"task_cosine": cosine}),
        "arithmetic": ops.arithmetic(device),
        "pictures": pictures,
        "log": [dataclasses.asdict(update) for update in state.log] if state else [],
    }


def _check_distilling(distill: int | None, halvings: int, data: Path | None, cad: dict[str, Any]) -> None:
    """Raises ValueError: options of distillation without it."""
    if distill is not None:
        return
    if halvings > 1:
        raise ValueError(f"--halvings {halvings} without --distill N: write the steps N that are halved as well")
    if data is not None:
        raise ValueError(f"--data {data} without --distill N: quantizing alone takes no pictures")
    if cad:
        name = next(iter(cad)).replace("_", "-")
        raise ValueError(f"--cad.{name} without --distill N: write the steps N that are halved as well")


def sample(
    *,
    model: Model,
    out: Path,
    n: Count = 16,
    steps: Steps = None,
    batch_size: BatchSize = 128,
    conditioning: Conditioning = None,
    device: Device = "cpu",
    common: Shared = COMMON,
) -> dict[str, Any]:
    """Draw images into one picture.

    For example:
        pqcad sample --model demo --out grid.png
        pqcad sample --model run --out grid.png --n 64 --seed 1

    Args:
        out: a picture, such as grid.png.
        n: images.
    """
    from pqcad_ao.models import load_model
    from pqcad_ao.pages.pictures import save_grid

    check_writable(out.parent)
    unet, scheduler = load_model(model)
    unet.to(device)
    given, steps = conditioned(unet, model, conditioning), steps or steps_of(unet)
    save_grid(sampled(unet, scheduler, given, n, steps, batch_size, common.seed), out)
    print(f"{out}: {n} images in {steps} steps")
    return {"out": str(out), "n": n, "steps": steps, "seed": common.seed}


def evaluate(
    *,
    model: Model,
    n: Count = 2000,
    steps: Steps = None,
    batch_size: BatchSize = 128,
    conditioning: Conditioning = None,
    device: Device = "cpu",
    data: Path | None = None,
    features: Path | None = None,
    bootstrap: Whole = 0,
    card: Flag = False,
    common: Shared = COMMON,
) -> dict[str, Any]:
    """FID, KID, precision and recall of sampled images.

    For example, with a 95 % interval, on the model's card as well; and against pictures of your own:
        pqcad eval --model run --n 2000 --bootstrap 100 --card
        pqcad eval --model run --data pictures --features net.safetensors

    Args:
        n: images.
        data: folder with real images to compare with; the embedded statistics of Fashion-MNIST if not given.
        features: feature network that pqcad_ao.recipes.train_classifier wrote; the embedded one if not given. Needs
            --data.
        bootstrap: resamples behind a 95 % interval of FID; none if 0.
        card: write what was measured on the model's card, README.md in its folder.
    """
    import torch

    from pqcad_ao.data import load_images
    from pqcad_ao.denoiser import sample_shape
    from pqcad_ao.evaluate.features import RealFeatures, embedded_features, extract_features, load_classifier
    from pqcad_ao.evaluate.fid import image_quality
    from pqcad_ao.models import load_model
    from pqcad_ao.pages.card import check_replaceable, write_card
    from pqcad_ao.utils.processes import rank_and_world

    if card:
        check_replaceable(Path(model))
    if features is not None and data is None:
        raise ValueError("--features FILE is a feature network without statistics of real images: give --data DIR too")
    unet, scheduler = load_model(model)
    unet.to(device)
    given = conditioned(unet, model, conditioning)
    shape, steps = sample_shape(unet), steps or steps_of(unet)
    network: nn.Module
    if data is None:
        network, real = embedded_features()
    else:
        network = load_classifier(features) if features is not None else embedded_features()[0]
        pictures, _ = load_images(data, "test", image_size=shape[1], channels=shape[0])
        real = RealFeatures.from_images(pictures, network)
    extract_features(torch.zeros(2, *shape), network)  # images that do not fit are refused before sampling
    images = sampled(unet, scheduler, given, n, steps, batch_size, common.seed)
    share = rank_and_world()
    quality = image_quality(images, network, real, seed=common.seed, bootstrap=bootstrap, share=share)
    interval = f" [{quality['fid_ci'][0]:.2f}, {quality['fid_ci'][1]:.2f}]" if "fid_ci" in quality else ""
    kid = "" if quality["kid"] is None else f", KID {quality['kid']:.5f} ± {quality['kid_std']:.5f}"
    covers = ""
    if quality["recall"] is not None:
        covers = f", precision {quality['precision']:.3f}, recall {quality['recall']:.3f}"
    print(f"FID {quality['fid']:.3f}{interval}{kid}{covers} ({quality['n']} images, {steps} steps)")
    if card and share[0] == 0:
        write_card(unet, Path(model), quality={**quality, "steps": steps})
    shown = {f"{model}, {steps} steps": images[:GRID]}
    return {**quality, "steps": steps, "seed": common.seed, "model": model, "pictures": shown}


def export(
    *,
    model: Model,
    out: Path,
    steps: Steps = None,
    batch_size: Sizes = ONE_IMAGE,
    objective: Literal["speed", "size"] = "speed",
    max_bytes: Count | None = None,
    full_precision: Flag = False,
    conditioning: Conditioning = None,
    common: Shared = COMMON,
) -> dict[str, Any]:
    """Write a .pte for ExecuTorch, checked against the eager model.

    For example, fast, and small:
        pqcad export --model run --out unet.pte
        pqcad export --model run --out unet.pte --objective size

    Args:
        out: a file, such as unet.pte.
        objective: what decides a layer's form.
        max_bytes: of the file; takes the objective's place.
        full_precision: write a network that is not quantized: the baseline in float32.
    """
    import torch

    from pqcad_ao.edge.export import export_fp32_pte, export_pte
    from pqcad_ao.models import load_model
    from pqcad_ao.utils.quiet import start_executorch

    size, *further = batch_size or [0]
    if full_precision and further:
        raise ValueError(
            f"--full-precision writes one batch size, {len(batch_size)} are given: write --batch-size {size}"
        )
    check_writable(out.parent)
    unet, scheduler = load_model(model)
    given = conditioned(unet, model, conditioning)
    start_executorch(torch.get_num_threads())
    if full_precision:
        made = export_fp32_pte(unet, out, batch_size=size, conditioning=given)
    else:
        steps = steps or steps_of(unet)
        made = export_pte(
            unet,
            out,
            scheduler=scheduler,
            num_inference_steps=steps,
            objective=objective,
            max_bytes=max_bytes,
            batch_size=batch_size if further else size,
            conditioning=given,
            seed=common.seed,
            progress=True,
        )
    print(made)
    result = {**dataclasses.asdict(made), "path": str(made.path), "batch_size": batch_size if further else size}
    return result if full_precision else {**result, "steps": steps}
