"""Fields that a dataclass was given later: at their defaults nothing that is kept, or named after it, knows of them."""

from dataclasses import MISSING, asdict, field, fields
from typing import Any

LATER = "later"


def later(default: Any, **options: Any) -> Any:
    """A field that came later: at its default it is neither in :func:`repr_of` nor in :func:`entries`.

    A configuration's repr names its run, and a log's lines are compared: runs begun before there was the field go on.
    """
    return field(default=default, repr=False, metadata={LATER: True}, **options)


def repr_of(value: Any) -> str:
    """A dataclass's repr as Python writes it, and of its later fields those that are not at their defaults."""
    hidden = at_default(value)
    shown = [f"{f.name}={getattr(value, f.name)!r}" for f in fields(value) if f.repr or f.metadata.get(LATER)]
    return f"{type(value).__qualname__}({', '.join(text for text in shown if text.partition('=')[0] not in hidden)})"


def entries(value: Any) -> dict[str, Any]:
    """A dataclass as a dictionary, without later fields that are at their defaults."""
    hidden = at_default(value)
    return {name: entry for name, entry in asdict(value).items() if name not in hidden}


def at_default(value: Any) -> set[str]:
    """The names of a dataclass's later fields that are at their defaults."""
    return {
        f.name
        for f in fields(value)
        if f.metadata.get(LATER) and f.default is not MISSING and getattr(value, f.name) == f.default
    }
