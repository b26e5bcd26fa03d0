"""Checks of the numbers that a user gives, with one wording wherever they are given."""

from typing import Any

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
