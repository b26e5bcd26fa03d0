"""Whether every form of every kernel gives the reference's integers on a card."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pqcad_ao.bench.compile.card import name_of
from pqcad_ao.bench.compile.worker import reason
from pqcad_ao.ops import reference
from pqcad_ao.ops.packing import pack
from pqcad_ao.ops.triton import forms, kernels, norm, tma

# batch, segments, output channels, pixels, kernel, stride, dilation, groups, weight bits and kind of addend
LAYERS: list[tuple[Any, ...]] = [
    (64, [128], 128, 32, 3, 1, 1, 1, 4, "pixels"),
    (16, [256, 128], 128, 32, 3, 1, 1, 1, 4, "channels"),
    (64, [256], 256, 16, 3, 1, 1, 1, 4, "none"),
    (64, [256], 256, 16, 1, 1, 1, 1, 4, "pixels"),
    (3, [256, 256], 256, 8, 1, 1, 1, 1, 4, "none"),
    (1, [96], 72, 7, 3, 1, 1, 1, 4, "pixels"),
    (4, [64], 64, 20, 3, 1, 2, 1, 5, "none"),
    (4, [128], 128, 33, 3, 2, 1, 1, 4, "none"),
    (4, [64], 64, 16, 3, 1, 1, 2, 4, "none"),
    (4, [3], 64, 32, 3, 1, 1, 1, 8, "none"),
    (4, [32, 32, 32], 64, 8, 3, 1, 1, 1, 4, "none"),
]
SMALL: list[tuple[Any, ...]] = [(2, [32], 24, 6, 3, 1, 1, 1, 4, "pixels"), (1, [12, 4], 8, 5, 1, 2, 1, 1, 5, "none")]
QUANTIZERS = [  # batch, channels of the images side by side, pixels, groups, upsampling
    *((16, [128], 32, 32, 1), (16, [256, 128], 32, 32, 1), (16, [256], 16, 32, 2), (4, [320], 64, 32, 1)),
    (16, [64, 96], 16, 0, 1),
]
SMALL_QUANTIZERS = [(2, [16, 8], 8, 8, 2)]


def exactness(device: str, small: bool, kept: Callable[[dict[str, Any]], None]) -> None:
    """Hold every form of every layer, and the quantizer, against the reference on the device.

    Args:
        device: a GPU, or the CPU where Triton interprets. small: layers that an interpreter is done with in seconds.
        kept: receives what was found so far, after each form: ``layers``, how many each form computed; ``wrong``, by
            form the layers whose sums were others, or that raised an error; ``quantizers``, each with its largest
            difference and the part of its integers that differ.
    """
    place, start = torch.device(device), time.perf_counter()
    generator = torch.Generator(place).manual_seed(0)
    engine = place.type == "cpu" or forms.has_copy_engine(place)
    names = [str(blocks) for blocks in (*kernels.DIRECT, *kernels.WIDE, *(tma.TMA if engine else ()))]
    layers = [(layer, *_layer(layer, generator)) for layer in (SMALL if small else LAYERS)]
    over = threading.Event()

    def check(name: str) -> tuple[int, list[Any]]:  # a form's layers in turn: kernels of several compile side by side
        count, wrong = 0, list[Any]()
        for layer, given, sums in layers:
            served = map(str, tma.blocks_for(len(given[2]), given[6], given[7], given[8], given[11]))
            if over.is_set() or (name in tma.BLOCKS and name not in served):
                continue
            count += 1
            try:
                found = "same" if torch.equal(forms.run(name, given).double(), sums) else "other sums"
            except Exception as error:  # a kernel that does not run says nothing about the next one
                found = reason(error)
            if found != "same":
                wrong.append([*layer, found])
        return count, wrong

    result: dict[str, Any] = {"device": name_of(place), "torch": torch.__version__, "layers": {}, "wrong": {}}
    with ThreadPoolExecutor(1 if small else os.cpu_count()) as pool:
        try:
            for name, (count, wrong) in zip(names, pool.map(check, names), strict=True):
                result["layers"][name] = count
                if wrong:
                    result["wrong"][name] = wrong
                kept({**result, "seconds": time.perf_counter() - start})
        finally:
            over.set()  # where this was cut, what is under way ends with its layer
    rows = SMALL_QUANTIZERS if small else QUANTIZERS
    quantizers = [_quantizer(row, generator) for row in rows]
    kept({**result, "quantizers": quantizers, "seconds": time.perf_counter() - start})


def _quantizer(row: tuple[Any, ...], generator: Any) -> dict[str, Any]:
    """How many integers of GroupNorm, SiLU and quantizer differ from the reference's, and by how much at most."""
    batch, channels, pixels, groups, upsample = row
    device = generator.device
    options = {"generator": generator, "device": device, "dtype": torch.bfloat16 if device.type == "cuda" else None}
    images = [3 + torch.randn(batch, width, pixels, pixels, **options) for width in channels]
    weight, bias = torch.randn(2, sum(channels), **options) if groups else (None, None)
    scale = torch.rand(batch, len(channels), generator=generator, device=device) + 0.1
    low = torch.full(scale.shape, -4, dtype=torch.int16, device=device)
    given = (images, weight, bias, groups, 1e-5, True, scale, low, channels, 4, upsample)
    apart = (norm.norm_silu_quantize(*given).int() - reference.norm_silu_quantize(*given).int()).abs()
    return {"shape": list(row), "most": int(apart.max()), "part": float((apart > 0).double().mean())}


def _layer(layer: tuple[Any, ...], generator: Any) -> tuple[list[Any], Any]:
    """Arguments of ``pqcad::conv2d`` with scales of one, and its exact integer sums, (B, O, H', W') float64."""
    batch, segments, out_channels, pixels, kernel, stride, dilation, groups, bits, kind = layer
    device, channels = generator.device, sum(segments)
    on_device = {"generator": generator, "device": device, "dtype": torch.int8}
    x = torch.randint(-8, 8, (batch, channels, pixels, pixels), **on_device)
    x = x.contiguous(memory_format=torch.channels_last)
    highest = 2 ** (bits - 1)
    weight = torch.randint(-highest, highest, (out_channels, kernel * kernel * channels // groups), **on_device)
    packed = pack(weight, bits)
    geometry = ([kernel] * 2, [stride] * 2, [dilation * (kernel // 2)] * 2, [dilation] * 2, groups)
    parts = reference.conv2d_accumulators(x, packed, bits, segments, *geometry)
    sums = torch.stack([part.double() for part in parts]).sum(0)
    ones = torch.ones(out_channels, device=device), torch.ones(batch, len(segments), device=device), None
    addend = None
    if kind != "none":
        shape = sums.shape if kind == "pixels" else (*sums.shape[:2], 1, 1)
        addend = torch.randint(-9, 9, shape, generator=generator, device=device).float()
        sums = sums + addend
    return [x, packed, *ones, bits, segments, *geometry, torch.float32, 4, addend], sums
