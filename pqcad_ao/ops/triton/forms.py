"""Which form a layer takes on a GPU: the largest blocks that still give every processor one.

The order of blocks is that of their speed where they fill an H100 (``bench/results/gpu-kernels.json``). Timing every
shape instead was tried: each trial is a kernel to be compiled, and a network of 60 layers had no first step within
three minutes.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from pqcad_ao.ops.triton import kernels, tma

COPY_ENGINE = (9, 0)  # compute capability
FEW = 1024  # output pixels below which weights are widened block by block: to widen them once is a launch of its own
FULL = 0.75  # programs for each processor that count as enough: fewer, larger blocks beat more, smaller ones


def choose(calls: Sequence[Sequence[Any]]) -> list[str]:
    """The form of each call of ``kernels.conv2d`` on its GPU.

    Args:
        calls: all arguments of each, in order, without ``form``. Tensors may be fake: shapes and the device matter.
    """
    if not calls:
        return []
    device = calls[0][0].device
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    engine = has_copy_engine(device)
    return [form_of(call, processors, engine) for call in calls]


def has_copy_engine(device: torch.device) -> bool:
    """Whether a GPU brings blocks by itself. ROCm counts its capabilities in another way, and has no such engine."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= COPY_ENGINE


def form_of(arguments: Sequence[Any], processors: int, copy_engine: bool) -> str:
    """The form of one call, by name.

    Args:
        arguments: as for :func:`choose`. processors: of the device. copy_engine: whether it has one.
    """
    out_channels = len(arguments[2])
    segments, kernel_size, stride, padding, dilation, groups = arguments[6:12]
    batch, _, *size = _sizes(arguments[0])
    out = [
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, p, d, k, s in zip(size, padding, dilation, kernel_size, stride, strict=True)
    ]
    rows = batch * prod(out)
    fitting = tma.blocks_for(out_channels, segments, kernel_size, stride, groups) if copy_engine else []
    if rows < FEW:
        fitting = kernels.DIRECT
    elif not fitting:
        fitting = [blocks for blocks in kernels.WIDE if blocks.columns <= max(out_channels // groups, 64)]
    full = [blocks for blocks in fitting if _programs(blocks, rows, out_channels, groups) >= FULL * processors]
    return str(full[0] if full else fitting[-1])


def _programs(blocks: kernels.Blocks, rows: int, out_channels: int, groups: int) -> int:
    return -(-rows // blocks.rows) * -(-out_channels // groups // blocks.columns) * groups


def run(form: str, arguments: Sequence[Any]) -> Tensor:
    """``kernels.conv2d`` in this form."""
    return (tma if form in tma.BLOCKS else kernels).conv2d(*arguments, form)


def _sizes(value: Tensor) -> list[int]:
    """A tensor's sizes; of a dynamic one that of the call which is compiled for, without a guard on it."""
    return [size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape]
