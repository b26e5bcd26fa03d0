"""The commands, each a few lines around the library."""

import argparse
import dataclasses
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao import ops
from pqcad_ao.cli.arguments import config_from
from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.data import load_images, some_images
from pqcad_ao.denoiser import check_conditioning, sample_shape
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.diffusion.schedule import default_steps
from pqcad_ao.distill import compress
from pqcad_ao.evaluate.features import RealFeatures, embedded_features, extract_features, load_classifier
from pqcad_ao.evaluate.fid import image_quality
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.plan import plan
from pqcad_ao.quantize import quantize_
from pqcad_ao.report import save_grid
from pqcad_ao.utils.quiet import start_executorch


def load_unconditional(name_or_dir: str) -> tuple[nn.Module, Any]:
    """A network and its scheduler, for the commands that have no way to be given conditioning."""
    unet, scheduler = load_model(name_or_dir)
    try:
        check_conditioning(unet, None)
    except ValueError as error:
        raise NotImplementedError(
            f"the command line samples unconditional networks only, and {type(unet).__name__} in {name_or_dir} needs "
            "conditioning: call pqcad_ao.quantize_(unet, config, conditioning=...) in Python"
        ) from error
    return unet, scheduler


def check_writable(folder: Path) -> None:
    """Make ``folder`` and try to write there, so that a bad place is found out before the work and not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): give another place") from error


def steps_of(unet: nn.Module) -> int:
    """Sampling steps where the command line names none."""
    state = quantized_state(unet)
    return default_steps(None if state is None else state.timestep.schedule)


def sampled(args: argparse.Namespace, unet: nn.Module, scheduler: Any) -> Tensor:
    """``args.n`` images (N, C, H, W) in [-1, 1] from noise that ``args.seed`` and N alone decide."""
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(args.n, *sample_shape(unet), generator=generator).to(args.device)
    unet.to(args.device)
    args.steps = args.steps or steps_of(unet)
    return sample(unet, scheduler, noise, args.steps, batch_size=args.batch_size, progress=sys.stderr.isatty()).cpu()


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    from pqcad_ao.recipes import demo

    if args.distill and args.steps % 2:
        raise ValueError(f"--steps {args.steps} cannot be halved: give an even number, or --no-distill")
    check_writable(args.out)
    return demo.run(
        args.out,
        model=args.model,
        images=args.images,
        steps=args.steps,
        config=PQCADConfig.fast(seed=args.seed) if args.progressive else None,
        cad=CADConfig.fast(steps=args.steps, seed=args.seed) if args.distill else None,
        shipped="demo-w4a6" if (args.model, args.steps) == ("demo", 20) else None,
        seed=args.seed,
        command=shlex.join(["pqcad", *args.argv]),
        progress=sys.stderr.isatty(),
    )


def run_plan(args: argparse.Namespace) -> dict[str, Any]:
    unet, _ = load_unconditional(args.model)
    config = PQCADConfig(
        weight_bits=args.weight_bits, activation_bits=args.activation_bits, overrides=dict(args.override)
    )
    resolved = plan(unet, None if config == PQCADConfig() else config)
    print(resolved)
    return {"rows": resolved.to_list(), "summary": resolved.summary()}


def run_compress(args: argparse.Namespace) -> dict[str, Any]:
    config, cad = config_from(args), None
    if args.halvings > 1 and args.distill is None:
        raise ValueError(f"--halvings {args.halvings} without --distill N: write the steps N that are halved as well")
    if args.data is not None and args.distill is None:
        raise ValueError(f"--data {args.data} without --distill N: quantizing alone takes no pictures")
    if args.distill is not None:
        preset = CADConfig.fast if args.fast else CADConfig
        cad = preset(steps=args.distill, halvings=args.halvings, seed=args.seed)
    for place in (args.out, args.folder):
        if place is not None:
            check_writable(place)
    unet, scheduler = load_unconditional(args.model)
    begin = time.perf_counter()
    progress = sys.stderr.isatty()
    keeps = {"folder": args.folder, "progress": progress}
    unet.to(args.device)
    if cad is None:
        quantize_(unet, config, scheduler=scheduler, **keeps)
    else:
        images = None if args.data is None else some_images(args.data, sample_shape(unet), cad.points, cad.seed)
        unet, scheduler = compress(unet, scheduler, config, cad, images=images, **keeps)
    seconds = time.perf_counter() - begin
    size = save_model(unet, scheduler, args.out).stat().st_size
    resolved, state = plan(unet), quantized_state(unet)
    for t in state.transitions if state else []:
        print(f"{t['stage']}, update {t['step']}: {t['from_bits']} to {t['to_bits']} bits, {t['reason']}")
    print(f"{resolved.summary()}\n{args.out}: {size:,} bytes of weights, made in {seconds:.0f} s")
    if cad is not None:
        print(f"distilled: samples in {steps_of(unet)} steps with the scheduler beside it, not in {cad.steps}")
    return {
        "out": str(args.out),
        "checkpoint_bytes": size,
        "seconds": seconds,
        "steps": None if cad is None else steps_of(unet),
        "summary": resolved.summary(),
        "rows": resolved.to_list(),
        "transitions": state.transitions if state else [],
        "arithmetic": ops.arithmetic(str(args.device)),
    }


def run_sample(args: argparse.Namespace) -> dict[str, Any]:
    check_writable(args.out.parent)
    unet, scheduler = load_unconditional(args.model)
    images = sampled(args, unet, scheduler)
    save_grid(images, args.out)
    print(f"{args.out}: {args.n} images in {args.steps} steps")
    return {"out": str(args.out), "n": args.n, "steps": args.steps, "seed": args.seed}


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    if args.features is not None and args.data is None:
        raise ValueError("--features FILE is a feature network without statistics of real images: give --data DIR too")
    unet, scheduler = load_unconditional(args.model)
    shape = sample_shape(unet)
    network: nn.Module
    if args.data is None:
        network, real = embedded_features()
    else:
        network = load_classifier(args.features) if args.features is not None else embedded_features()[0]
        pictures, _ = load_images(args.data, "test", image_size=shape[1], channels=shape[0])
        real = RealFeatures.from_images(pictures, network)
    extract_features(torch.zeros(2, *shape), network)  # images that do not fit are refused before sampling
    quality = image_quality(sampled(args, unet, scheduler), network, real, seed=args.seed, bootstrap=args.bootstrap)
    interval = f" [{quality['fid_ci'][0]:.2f}, {quality['fid_ci'][1]:.2f}]" if "fid_ci" in quality else ""
    kid = "" if quality["kid"] is None else f", KID {quality['kid']:.5f} ± {quality['kid_std']:.5f}"
    covers = ""
    if quality["recall"] is not None:
        covers = f", precision {quality['precision']:.3f}, recall {quality['recall']:.3f}"
    print(f"FID {quality['fid']:.3f}{interval}{kid}{covers} ({quality['n']} images, {args.steps} steps)")
    return {**quality, "steps": args.steps, "seed": args.seed, "model": args.model}


def run_export(args: argparse.Namespace) -> dict[str, Any]:
    from pqcad_ao.edge.export import export_fp32_pte, export_pte

    check_writable(args.out.parent)
    unet, scheduler = load_unconditional(args.model)
    start_executorch(torch.get_num_threads())
    if args.full_precision:
        made = export_fp32_pte(unet, args.out, batch_size=args.batch_size)
    else:
        args.steps = args.steps or steps_of(unet)
        made = export_pte(
            unet,
            args.out,
            scheduler=scheduler,
            num_inference_steps=args.steps,
            objective=args.objective,
            max_bytes=args.max_bytes,
            batch_size=args.batch_size,
            seed=args.seed,
            progress=sys.stderr.isatty(),
        )
    print(made)
    result = {**dataclasses.asdict(made), "path": str(made.path), "batch_size": args.batch_size}
    return result if args.full_precision else {**result, "steps": args.steps}
