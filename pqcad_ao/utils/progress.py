"""Progress: a bar in a terminal and in a notebook; in a file or a pipe, a line now and then."""

import sys
from typing import Any, TextIO

from tqdm import auto

AFTER = 10  # seconds from which work is worth a line
EVERY = 30  # seconds between two lines


class _Lines:
    """A stream that takes what a bar draws over itself as lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self.stream.flush()


class tqdm(auto.tqdm):  # as it is called everywhere
    """tqdm's own bar, unless standard error is neither a terminal nor a notebook's: there nothing moves a cursor."""

    last_print_t: float

    def __init__(self, *args: Any, **options: Any) -> None:
        self.lines = not sys.stderr.isatty() and "ipykernel" not in sys.modules
        if self.lines:
            shown = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            rarely = {"delay": AFTER, "mininterval": EVERY, "miniters": 1, "leave": True}
            options |= {"file": _Lines(sys.stderr), "bar_format": shown, **rarely}
        super().__init__(*args, **options)

    def refresh(self, *args: Any, **options: Any) -> None:
        """Draw anew; a line is written only when one is due, for what a bar says may change with every update."""
        if self.disable or not self.lines:
            super().refresh(*args, **options)
        elif self._time() >= max(self.start_t + self.delay, self.last_print_t + self.mininterval):
            super().refresh(*args, **options)
            self.last_print_t = self._time()
