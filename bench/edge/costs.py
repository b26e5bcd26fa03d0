"""What the planner of a .pte goes by: the cost of a product and of a number moved, measured here."""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao.bench.edge.runtime import Program, alone, take_turns
from pqcad_ao.utils import machine
from pqcad_ao.utils.files import check_writable, write_json
from pqcad_ao.utils.load import available_cores


def measure_costs(json_path: str | Path, rounds: int = 25) -> dict[str, Any]:
    """What a multiply-accumulate of an int8 convolution costs here, and what a number moved for the packed form does.

    From stacks of equal quantized layers, exported in both forms; :mod:`pqcad_ao.edge.storage` reads the medians.
    """
    target = check_writable(json_path)
    shapes = [(64, 32), (128, 32), (256, 16), (256, 8)]
    with tempfile.TemporaryDirectory() as folder:
        layers = [alone(_stack_costs, channels, size, folder, rounds) for channels, size in shapes]
    nanoseconds = {key: median(row[key] for row in layers) for key in ("multiply_accumulate", "number")}
    threads = available_cores()
    result = {"nanoseconds": nanoseconds, "layers": layers} | machine.describe(threads)
    write_json(target, result)
    return result


class Stack(nn.Module):
    """``layers`` equal 3×3 convolutions between two others."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(*c, 3, padding=1) for c in ((4, channels), (channels, 4)))
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(nn.functional.silu(x))
        return self.last(x)


def _stack_costs(channels: int, size: int, folder: str, rounds: int) -> dict[str, float]:
    from diffusers import DDIMScheduler

    from pqcad_ao import PQCADConfig, quantize_
    from pqcad_ao.edge.export import export_pte

    scheduler, paths, shape = DDIMScheduler(), {}, (4, size, size)
    for layers in (1, 5):
        torch.manual_seed(0)
        network = Stack(channels, layers).eval()
        config = PQCADConfig(mode="ptq", calibration_points=8, calibration_steps=2, calibration_batch_size=8)
        quantize_(network, config, scheduler=scheduler, sample_shape=shape, progress=False)
        for objective in ("bytes", "size"):
            path = f"{folder}/{channels}-{size}-{layers}-{objective}.pte"
            # nothing has to be saved: convolutions keep a byte for a weight
            budget: dict[str, Any] = {"max_bytes": 2**40} if objective == "bytes" else {"objective": objective}
            options: dict[str, Any] = {"sample_shape": shape, "num_inference_steps": 2, "trajectories": 1}
            export_pte(network, path, scheduler=scheduler, progress=False, **options, **budget)
            paths[layers, objective] = path
    programs = {key: Program(path, available_cores()) for key, path in paths.items()}
    turns = take_turns(programs, [torch.randn(1, *shape), torch.tensor([0])], rounds)
    layer = {kind: 1e6 * (median(turns[5, kind]) - median(turns[1, kind])) / 4 for kind in ("bytes", "size")}
    places = size * size
    return {
        "channels": channels,
        "size": size,
        "layer_ms": layer["bytes"] * 1e-6,
        "extra_ms": (layer["size"] - layer["bytes"]) * 1e-6,
        "multiply_accumulate": layer["bytes"] / (places * channels * channels * 9),
        "number": (layer["size"] - layer["bytes"]) / (places * 2 * channels),
    }
