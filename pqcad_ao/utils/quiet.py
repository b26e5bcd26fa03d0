"""Drops what our dependencies print about themselves and nobody can act on; every other message stays as it is."""

import io
import logging
import os
import sys
from contextlib import redirect_stderr

# Logger and beginning of the message (torch 2.13, torchao 0.18, diffusers 0.42). Levels and handlers are not touched.
HARMLESS = {
    "torchao": "Failed to load ",  # its CUDA libraries, on machines that have none
    "torch.utils._pytree": "%s is an Enum subclass",  # torchao registering enums the old way
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


class DropPrefix(logging.Filter):
    """A logging filter that drops records whose unformatted message starts with ``prefix``."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.prefix)


for _logger, _prefix in HARMLESS.items():
    logging.getLogger(_logger).addFilter(DropPrefix(_prefix))


def start_executorch(threads: int) -> None:
    """Start ExecuTorch's thread pool, which prints what it fails to read about the processor, with stderr closed to it.

    Raises:
        ImportError: executorch is not installed.
    """
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool  # executorch 1.4

    sys.stderr.flush()
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)  # native code writes to the descriptor, not to sys.stderr
    try:
        os.dup2(sink, 2)
        with redirect_stderr(io.StringIO()):  # and parts of it do write to sys.stderr
            _unsafe_reset_threadpool(threads)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
