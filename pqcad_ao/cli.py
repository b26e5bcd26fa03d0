"""The ``pqcad`` command: demo, plan, compress, sample, eval, export and bench, each a few lines around the library."""

import argparse
import dataclasses
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from pqcad_ao import ops
from pqcad_ao.capture import check_conditioning, sample_shape
from pqcad_ao.config import MODES, CADConfig, PQCADConfig
from pqcad_ao.data import load_images, some_images
from pqcad_ao.distill import compress
from pqcad_ao.edge_plan import OBJECTIVES
from pqcad_ao.evaluate import RealFeatures, embedded_features, extract_features, image_quality, load_classifier
from pqcad_ao.models import load_model, save_model
from pqcad_ao.quantize import plan, quantize_
from pqcad_ao.quiet import start_executorch
from pqcad_ao.report import save_grid, write_json
from pqcad_ao.sampling import sample
from pqcad_ao.schedule import default_steps
from pqcad_ao.serialization import quantized_state

# sd15 is conditional, which of all commands `bench compile` alone can time
MODEL_HELP = "demo, ddpm-cifar10 (random weights), or a folder of diffusers layout (unet/ and scheduler/)"
# What bad input raises; anything else is a defect of ours and keeps its traceback.
BAD_INPUT = (
    ValueError,
    TypeError,
    OSError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,
    ImportError,
)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pqcad: error: {message} (see {self.prog} --help)\n")


# --------------------------------------------------------------------------------------------------- arguments


def positive(text: str) -> int:
    """argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def bits(text: str) -> int | None:
    """argparse type: a number of bits, or ``float``; PQCADConfig checks the range."""
    if text == "float":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of bits nor 'float'")
    return int(text)


def device(text: str) -> torch.device:
    """argparse type: a device that is there."""
    from pqcad_ao.bench.machine import check_device

    try:
        return check_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def override(text: str) -> tuple[str, dict[str, int | None]]:
    """argparse type: ``ROLE=W,A`` or ``GLOB=W,A``, each side bits or ``float``; ``ROLE=W`` leaves activations alone."""
    key, equals, value = text.rpartition("=")
    sides = value.split(",")
    if not key or not equals or len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROLE=W,A; write attention=8,8 or 'up_blocks.*=4,6'")
    names = ("weight_bits", "activation_bits")
    return key, {name: bits(side.strip()) for name, side in zip(names, sides, strict=False)}


def add_bits_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides a plan."""
    default = PQCADConfig()
    parser.add_argument(
        "--weight-bits", type=bits, default=default.weight_bits, metavar="W", help="2 to 8 (default: %(default)s)"
    )
    parser.add_argument(
        "--activation-bits",
        type=bits,
        default=default.activation_bits,
        metavar="A",
        help="2 to 8, or float (default: %(default)s)",
    )
    parser.add_argument(
        "--override",
        type=override,
        action="append",
        default=[],
        metavar="ROLE=W,A",
        help="other bits for a role or for layers by name, such as attention=8,8 or 'up_blocks.*=4,6' or "
        "shortcut=float; may be repeated",
    )


def add_learning_arguments(parser: argparse.ArgumentParser) -> None:
    default = PQCADConfig()
    parser.add_argument("--mode", choices=MODES, default=default.mode, help="how (default: %(default)s)")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="learn, and distill, with fewer updates: quantizing a network of a million parameters takes less than 90 "
        "seconds on two idle cores",
    )
    parser.add_argument(
        "--iterations",
        type=positive,
        metavar="N",
        help=f"updates of quantization (default: {default.iterations}, with --fast {PQCADConfig.fast().iterations})",
    )
    parser.add_argument(
        "--target-bits",
        type=float,
        metavar="B",
        help="give sensitive layers more bits, up to this average of the weights (default: none)",
    )
    parser.add_argument(
        "--groups",
        type=positive,
        default=default.timestep_groups,
        metavar="G",
        help="activation scales of a layer over the training timesteps (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration-points",
        type=positive,
        default=default.calibration_points,
        metavar="N",
        help="noisy images that calibrate the activations (default: %(default)s)",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default: cpu)")


def config_from(args: argparse.Namespace) -> PQCADConfig:
    asked = {} if args.iterations is None else {"iterations": args.iterations}
    return (PQCADConfig.fast if args.fast else PQCADConfig)(
        **asked,
        target_bits=args.target_bits,
        weight_bits=args.weight_bits,
        activation_bits=args.activation_bits,
        mode=args.mode,
        timestep_groups=args.groups,
        calibration_points=args.calibration_points,
        overrides=dict(args.override),
        seed=args.seed,
    )


def add_steps_argument(parser: argparse.ArgumentParser) -> None:
    text = "sampling steps (default: what the network was distilled for, or 20)"
    parser.add_argument("--steps", type=positive, help=text)


def add_sampling_arguments(parser: argparse.ArgumentParser, images: int) -> None:
    parser.add_argument("--n", type=positive, default=images, help="images (default: %(default)s)")
    add_steps_argument(parser)
    parser.add_argument("--batch-size", type=positive, default=128, help="images a call (default: %(default)s)")
    add_device_argument(parser)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="pqcad", description="Diffusion UNets with 4-bit weights and 4-bit activations.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], dict[str, Any]], text: str, default_model: str | None = None
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        added.add_argument("--model", default=default_model, required=default_model is None, help=MODEL_HELP)
        added.add_argument("--seed", type=int, default=0, help="seed of every random draw (default: 0)")
        added.add_argument("--threads", type=positive, help="threads that PyTorch computes with (default: its own)")
        added.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
        added.add_argument("--traceback", action="store_true", help="show an error's whole traceback")
        return added

    demo = command(
        "demo", run_demo, "compress the embedded teacher and measure everything on the spot", default_model="demo"
    )
    demo.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="(default: demo-out)")
    demo.add_argument("--images", type=positive, default=256, help="images behind each FID (default: 256)")
    demo.add_argument("--steps", type=positive, default=20, help="sampling steps (default: 20)")

    demo.add_argument(
        "--progressive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a row that is learned progressively, about 60 seconds (default: yes)",
    )

    demo.add_argument(
        "--distill",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="distill to half the steps, about 30 seconds (default: yes)",
    )

    add_bits_arguments(command("plan", run_plan, "print what happens to each layer and why"))

    compress = command("compress", run_compress, "quantize a network and save it in diffusers layout")
    compress.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives unet/ and scheduler/")
    compress.add_argument(
        "--distill",
        type=positive,
        metavar="N",
        help="then teach it to sample in N / 2 steps what full precision samples in N (default: quantize only)",
    )
    compress.add_argument("--halvings", type=positive, default=1, metavar="K", help="N / 2^K steps instead (1)")
    compress.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="real pictures for up to half of what --distill learns from (default: what full precision draws)",
    )
    compress.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="keeps checkpoints and a log; the same command with the same folder goes on where it was killed",
    )
    add_device_argument(compress)
    add_bits_arguments(compress)
    add_learning_arguments(compress)

    sampling = command("sample", run_sample, "draw images into one picture")
    sampling.add_argument("--out", type=Path, required=True, metavar="FILE", help="a picture, such as grid.png")
    add_sampling_arguments(sampling, images=16)

    evaluate = command("eval", run_eval, "FID, KID, precision and recall of sampled images")
    add_sampling_arguments(evaluate, images=2000)
    evaluate.add_argument(
        "--data", type=Path, metavar="DIR", help="real images to compare with (default: the embedded statistics)"
    )
    evaluate.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="feature network written by pqcad_ao.recipes.train_classifier (default: the embedded one); needs --data",
    )
    evaluate.add_argument(
        "--bootstrap", type=int, default=0, metavar="R", help="resamples behind a 95%% interval of FID (default: none)"
    )

    export = command("export", run_export, "write a .pte for ExecuTorch, checked against the eager model")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as unet.pte")
    add_steps_argument(export)
    export.add_argument("--batch-size", type=positive, default=1, help="images a call (default: 1)")
    export.add_argument("--objective", choices=OBJECTIVES, default="speed", help="what decides a layer's form (speed)")
    export.add_argument("--max-bytes", type=positive, metavar="N", help="of the file; takes the objective's place")
    export.add_argument(
        "--full-precision", action="store_true", help="write a network that is not quantized: the baseline in float32"
    )

    from pqcad_ao.bench import compile as bench_compile
    from pqcad_ao.bench import edge as bench_edge
    from pqcad_ao.bench import quality as bench_quality

    bench = commands.add_parser("bench", help="measure this project and its peers side by side")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND")
    quality_parser = kinds.add_parser("quality", help="FID, KID, precision and recall of every way to quantize")
    bench_quality.add_arguments(quality_parser)
    quality_parser.add_argument("--traceback", action="store_true", help="show an error's whole traceback")
    quality_parser.set_defaults(run=lambda args: bench_quality.run(args, sys.stderr.isatty()))
    compile_parser = kinds.add_parser("compile", help="one UNet step under torch.compile and its peers")
    bench_compile.add_arguments(compile_parser)
    compile_parser.add_argument("--traceback", action="store_true", help="show an error's whole traceback")
    compile_parser.set_defaults(run=bench_compile.run)
    edge_parser = kinds.add_parser("edge", help="one sampling step as a .pte on ExecuTorch's stock runtime")
    bench_edge.add_arguments(edge_parser)
    edge_parser.add_argument("--traceback", action="store_true", help="show an error's whole traceback")
    edge_parser.set_defaults(run=bench_edge.run)
    return parser


# ---------------------------------------------------------------------------------------------------- commands


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
    from pqcad_ao import demo

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
    found = image_quality(sampled(args, unet, scheduler), network, real, seed=args.seed, bootstrap=args.bootstrap)
    interval = f" [{found['fid_ci'][0]:.2f}, {found['fid_ci'][1]:.2f}]" if "fid_ci" in found else ""
    kid = "" if found["kid"] is None else f", KID {found['kid']:.5f} ± {found['kid_std']:.5f}"
    covers = "" if found["recall"] is None else f", precision {found['precision']:.3f}, recall {found['recall']:.3f}"
    print(f"FID {found['fid']:.3f}{interval}{kid}{covers} ({found['n']} images, {args.steps} steps)")
    return {**found, "steps": args.steps, "seed": args.seed, "model": args.model}


def run_export(args: argparse.Namespace) -> dict[str, Any]:
    from pqcad_ao.edge import export_fp32_pte, export_pte

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
    found = {**dataclasses.asdict(made), "path": str(made.path), "batch_size": args.batch_size}
    return found if args.full_precision else {**found, "steps": args.steps}


def quiet_dependencies() -> None:
    """This process is ours: keep what our dependencies print about themselves out of the user's terminal."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0, or 2 after one line on stderr that says what was wrong with the input."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv, argparse.Namespace(argv=argv))
    quiet_dependencies()
    try:
        if args.json is not None:
            check_writable(Path(args.json).parent)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        result = args.run(args)
        if args.json is not None:
            write_json(args.json, result)
    except BAD_INPUT as error:
        if args.traceback:
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"pqcad: error: {lines[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pqcad: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
