"""The batch sizes of a .pte: which a user may ask for, what their methods are called, how images are shared out."""

from collections.abc import Sequence
from typing import Any

from pqcad_ao.utils.checks import is_whole


def check_sizes(batch_size: Any) -> list[int]:
    """The batch sizes that a user gives as a whole number, or as several.

    Raises:
        ValueError: one is no whole number from 1, or is there twice, or none is there.
    """
    sizes = list(batch_size) if isinstance(batch_size, Sequence) else [batch_size]
    if not sizes or not all(map(is_whole, sizes)) or len(set(sizes)) < len(sizes):
        raise ValueError(
            f"batch_size={batch_size!r}: allowed are whole numbers from 1, one or a list without repetition, "
            "such as [1, 4]"
        )
    return sizes


def ending(sizes: Sequence[int], size: int) -> str:
    """What the names of a size's methods end in: nothing for the first size, ``_4`` for a further one of 4."""
    return "" if size == sizes[0] else f"_{size}"


def shared_out(count: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Share ``count`` images out to calls, as many as there can be of the largest size first.

    Returns:
        for each call how many images it draws, and its batch size: the same but in the last call, which has places
        left where fewer images are left than the smallest size.

    Example:
        >>> shared_out(11, [2, 4])
        [(4, 4), (4, 4), (2, 2), (1, 2)]
    """
    calls = []
    for size in sorted(sizes, reverse=True):
        calls += [(size, size)] * (count // size)
        count %= size
    return [*calls, (count, min(sizes))] if count else calls
