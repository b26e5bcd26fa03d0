"""Tracing by one thread at a time: what torch.export and torch.compile trace with is state of the whole process."""

import functools
import linecache
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from torch.fx import graph_module

try:
    from torch._dynamo.convert_frame import compile_lock  # held by every torch.compile; reentrant (torch 2.13, 2.14)
except OSError as error:
    raise OSError(
        error.errno,
        f"PyTorch cannot make a cache folder for its compiler ({error.strerror}): set TORCHINDUCTOR_CACHE_DIR to a "
        "folder that can be written",
        error.filename,
    ) from error

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def one_at_a_time(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let ``function``, which traces, run in one thread at a time, and not beside a compilation.

    torch.export keeps the module hierarchy and its dispatch mode where every thread finds them, and patches classes
    while it traces: of two exports at once both fail, and one beside a compilation loses the names of its layers.

    What other threads compute meanwhile may differ in the last bit of floating-point layers: torch.export switches
    oneDNN off, in the whole process, while it traces. Integers of quantized layers are not touched by that.
    """

    @functools.wraps(function)
    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with compile_lock:
            return function(*args, **kwargs)

    return alone


@contextmanager
def forgetting_sources() -> Iterator[None]:
    """Drop, on leaving, the text of the graphs that were compiled meanwhile, and are no more.

    torch.fx keeps the source of every graph for tracebacks, as long as the process lives: an export of a small network
    leaves some hundred of them behind, several megabytes.
    """
    sources = graph_module._loader.eval_cache  # torch 2.13, 2.14
    before = set(sources)
    try:
        yield
    finally:
        for name in sources.keys() - before:
            del sources[name]
            linecache.cache.pop(name, None)
