"""The options of ``pqcad bench compile`` and what they run."""

import argparse
import sys
from typing import Any

from pqcad_ao.bench.compile.contenders import ROWS
from pqcad_ao.bench.compile.cpu import bench_compile
from pqcad_ao.bench.compile.drawing import table
from pqcad_ao.models import NAMES


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pqcad bench compile``."""
    parser.add_argument("--model", default="demo", help=f"{', '.join(NAMES)}, or a folder with a diffusers UNet")
    parser.add_argument("--batches", type=whole_numbers, metavar="N,N", help="batch sizes (1,8; on a GPU 1,16,64,256)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the GPU's own contenders (cpu)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (7)")
    parser.add_argument("--iterations", type=int, help="timed steps in a turn (3; on a GPU 10)")
    parser.add_argument("--threads", type=int, help="for every contender (all available cores)")
    parser.add_argument("--rows", type=lambda text: text.split(","), metavar="ROW,ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (0)")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the parsed options ask for and print the table.

    Raises:
        ValueError: as :func:`bench_compile`, or options that the chosen device does not have.
    """
    if args.device != "cpu":
        from pqcad_ao.bench.compile import gpu

        if args.plot or args.threads:
            raise ValueError("--plot and --threads belong to --device cpu")
        asked = {"batches": args.batches, "iterations": args.iterations, "rows": args.rows, "json_path": args.json}
        result = gpu.bench_compile_gpu(
            args.model,
            device=args.device,
            rounds=args.rounds,
            seed=args.seed,
            **{name: value for name, value in asked.items() if value is not None},
        )
        print(gpu.table(result))
        return result
    result = bench_compile(
        args.model,
        batches=args.batches or (1, 8),
        rounds=args.rounds,
        iterations=3 if args.iterations is None else args.iterations,
        threads=args.threads,
        rows=args.rows,
        seed=args.seed,
        json_path=args.json,
        plot_path=args.plot,
    )
    print(table(result))
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pqcad_ao.bench.compile", description="one UNet step, side by side")
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
