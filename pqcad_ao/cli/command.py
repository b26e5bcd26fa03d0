"""The ``pqcad`` command: its parser, and what it says of bad input."""

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

from pqcad_ao.cli.arguments import (
    Parser,
    add_bits_arguments,
    add_device_argument,
    add_learning_arguments,
    add_sampling_arguments,
    add_steps_argument,
    positive,
)
from pqcad_ao.cli.commands import check_writable, run_compress, run_demo, run_eval, run_export, run_plan, run_sample
from pqcad_ao.edge.storage import OBJECTIVES
from pqcad_ao.report import write_json

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
        _add_traceback(added)
        return added

    _add_demo_arguments(
        command("demo", run_demo, "compress the embedded teacher and measure everything on the spot", "demo")
    )
    add_bits_arguments(command("plan", run_plan, "print what happens to each layer and why"))
    _add_compress_arguments(command("compress", run_compress, "quantize a network and save it in diffusers layout"))
    sampling = command("sample", run_sample, "draw images into one picture")
    sampling.add_argument("--out", type=Path, required=True, metavar="FILE", help="a picture, such as grid.png")
    add_sampling_arguments(sampling, images=16)
    _add_eval_arguments(command("eval", run_eval, "FID, KID, precision and recall of sampled images"))
    _add_export_arguments(command("export", run_export, "write a .pte for ExecuTorch, checked against the eager model"))
    _add_benchmarks(commands.add_parser("bench", help="measure this project and its peers side by side"))
    return parser


def _add_traceback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traceback", action="store_true", help="show an error's whole traceback")


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="(default: demo-out)")
    parser.add_argument("--images", type=positive, default=256, help="images behind each FID (default: 256)")
    parser.add_argument("--steps", type=positive, default=20, help="sampling steps (default: 20)")
    parser.add_argument(
        "--progressive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a row that is learned progressively, about 60 seconds (default: yes)",
    )
    parser.add_argument(
        "--distill",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="distill to half the steps, about 30 seconds (default: yes)",
    )


def _add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives unet/ and scheduler/")
    parser.add_argument(
        "--distill",
        type=positive,
        metavar="N",
        help="then teach it to sample in N / 2 steps what full precision samples in N (default: quantize only)",
    )
    parser.add_argument("--halvings", type=positive, default=1, metavar="K", help="N / 2^K steps instead (1)")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="real pictures for up to half of what --distill learns from (default: what full precision draws)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="keeps checkpoints and a log; the same command with the same folder goes on where it was killed",
    )
    add_device_argument(parser)
    add_bits_arguments(parser)
    add_learning_arguments(parser)


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser, images=2000)
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="real images to compare with (default: the embedded statistics)"
    )
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="feature network written by pqcad_ao.recipes.train_classifier (default: the embedded one); needs --data",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=0, metavar="R", help="resamples behind a 95%% interval of FID (default: none)"
    )


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as unet.pte")
    add_steps_argument(parser)
    parser.add_argument("--batch-size", type=positive, default=1, help="images a call (default: 1)")
    parser.add_argument("--objective", choices=OBJECTIVES, default="speed", help="what decides a layer's form (speed)")
    parser.add_argument("--max-bytes", type=positive, metavar="N", help="of the file; takes the objective's place")
    parser.add_argument(
        "--full-precision", action="store_true", help="write a network that is not quantized: the baseline in float32"
    )


def _add_benchmarks(parser: argparse.ArgumentParser) -> None:
    from pqcad_ao.bench.compile import command as bench_compile
    from pqcad_ao.bench.edge import command as bench_edge
    from pqcad_ao.bench.quality import command as bench_quality

    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    benchmarks = (
        ("quality", "FID, KID, precision and recall of every way to quantize", bench_quality),
        ("compile", "one UNet step under torch.compile and its peers", bench_compile),
        ("edge", "one sampling step as a .pte on ExecuTorch's stock runtime", bench_edge),
    )
    for kind, text, benchmark in benchmarks:
        added = kinds.add_parser(kind, help=text)
        benchmark.add_arguments(added)
        _add_traceback(added)
        added.set_defaults(run=benchmark.run)


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
