"""Checks of the numbers that a user gives, with one wording wherever they are given."""

from typing import Any, get_args

NOT_FINITE = "NaN or infinity in what is quantized"  # so begin the errors of the operators, in C++ as well


def is_whole(value: Any, least: int = 1, most: int | None = None) -> bool:
    """Whether ``value`` is an int (no bool) from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return least <= value and (most is None or value <= most)


def check_count(name: str, value: Any, least: int = 1, most: int | None = None, *, otherwise: str = "") -> None:
    """Raise ValueError where ``value`` is no whole number in the range; the message ends with ``otherwise``."""
    if not is_whole(value, least, most):
        upwards = "" if most is None else f" to {most}"
        raise ValueError(f"{name}={value!r}: allowed are whole numbers from {least}{upwards}{otherwise}")


def check_counts(**counts: Any) -> None:
    """:func:`check_count` of each, from 1."""
    for name, value in counts.items():
        check_count(name, value)


def check_fields(config: Any, names: tuple[str, ...], most: int | None = None) -> None:
    """:func:`check_count` of a configuration's fields, from 1 to ``most``."""
    for name in names:
        check_count(name, getattr(config, name), most=most)


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether ``value`` is a number (no bool) from ``least`` to ``most``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def check_numbers(config: Any, names: tuple[str, ...], most: float = 1) -> None:
    """Raise ValueError where a configuration's field of ``names`` is no number from 0 to ``most``."""
    for name in names:
        if not is_number(getattr(config, name), 0, most):
            raise ValueError(f"{name}={getattr(config, name)!r}: allowed are numbers from 0 to {most:g}")


def check_word(name: str, value: Any, words: Any) -> None:
    """Raise ValueError where ``value`` is none of a Literal's words."""
    allowed = get_args(words)
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(map(repr, allowed))}")


def check_seed(seed: Any) -> None:
    """Raise ValueError where ``seed`` is no seed of PyTorch's generators."""
    if not is_whole(seed, 0, 2**63 - 1):
        raise ValueError(f"seed={seed!r}: allowed are whole numbers from 0 to 2^63 - 1")
