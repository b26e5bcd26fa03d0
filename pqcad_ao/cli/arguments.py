"""What the commands' options are, how each is read, and the configurations that they make."""

import argparse
from typing import NoReturn

import torch

from pqcad_ao.config import MODES, PQCADConfig


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pqcad: error: {message} (see {self.prog} --help)\n")


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
    from pqcad_ao.utils.machine import check_device

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
