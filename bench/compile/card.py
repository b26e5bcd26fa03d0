"""What a card reaches: in large matrix products, and in our largest convolutions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao.bench.compile.workload import Step
from pqcad_ao.nn.conv2d import QuantizedConv2d
from pqcad_ao.utils.machine import timed

MATRIX = 8192  # side of the product that shows the card's peak
LARGEST = 3  # convolutions that are held against it


def cast(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Floating-point inputs in bfloat16."""
    return tuple(value.bfloat16() if value.is_floating_point() else value for value in inputs)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_tmacs(device: torch.device, side: int | None = None) -> dict[str, float]:
    """Multiply-accumulates in T/s that a large matrix product reaches, the best of ten, by type."""
    side = side or (MATRIX if device.type == "cuda" else 256)
    # random values of four bits, as our layers multiply: a card that multiplies ones draws less power and runs faster
    integers = torch.randint(-8, 8, (side, side), dtype=torch.int8, device=device)
    numbers = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    turned = integers.t().contiguous().t()  # the layout that int8 products want
    calls = {"int8": lambda: torch._int_mm(integers, turned), "bf16": lambda: numbers @ numbers}

    def best(call: Callable[[], Tensor]) -> float:
        def once() -> None:
            call()
            wait(device)

        return min(timed(once, 10))

    return {kind: side**3 / best(call) / 1e9 for kind, call in calls.items()}


@torch.no_grad()
def largest_convolutions(
    network: nn.Module, noise: Tensor, given: dict[str, Tensor], peak: dict[str, float]
) -> list[dict[str, Any]]:
    """The layers with most multiply-accumulates, each timed alone at the largest batch in its form."""
    met: list[tuple[float, str, QuantizedConv2d, Tensor]] = []

    def remember(fqn: str) -> Callable[..., None]:
        def hook(layer: QuantizedConv2d, args: tuple[Tensor, ...], output: Tensor) -> None:
            met.append((float(output[0].numel() * layer.reduction), fqn, layer, args[0]))

        return hook

    hooks = [
        module.register_forward_hook(remember(fqn))
        for fqn, module in network.named_modules()
        if isinstance(module, QuantizedConv2d) and module.activation_bits
    ]
    example = (noise[:1], torch.zeros(1, dtype=torch.int64, device=noise.device), *(v[:1] for v in given.values()))
    Step(network, [*given])(*cast(example))
    for hook in hooks:
        hook.remove()
    found = []
    for macs, fqn, layer, x in sorted(met, key=lambda item: -item[0])[:LARGEST]:
        batch = len(noise)
        integers = torch.randint(-8, 8, (batch, *x.shape[1:]), dtype=torch.int8, device=x.device)
        scale = torch.ones(batch, len(layer.segments), device=x.device)
        arguments = (
            integers.to(memory_format=torch.channels_last),
            layer.weight,
            layer.weight_scale,
            scale,
            layer.bias,
            layer.weight_bits,
            layer.segments,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            torch.bfloat16,
            layer.activation_bits,
        )
        for form, call in forms(arguments).items():
            tmacs = macs * batch / _fastest(call, x.device) / 1e9
            sizes = {"layer": fqn, "form": form, "batch": batch, "input": list(x.shape[1:])}
            found.append({**sizes, "tmacs": tmacs, "part_of_int8_peak": tmacs / peak["int8"]})
    return found


def _fastest(call: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds of a call; on a GPU in a CUDA graph, where what starts it costs nothing."""
    if device.type != "cuda":
        return min(timed(call, 10))
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, return_mode="median")


def forms(arguments: tuple[Any, ...]) -> dict[str, Callable[[], Tensor]]:
    """A convolution in the form that it takes on its device, by that form's name."""
    if arguments[0].device.type != "cuda":
        return {"cpu": lambda: torch.ops.pqcad.conv2d(*arguments)}
    from pqcad_ao.ops.triton import forms as of_gpu

    chosen = of_gpu.choose([(*arguments, None)])
    return {name: functools.partial(of_gpu.run, name, (*arguments, None)) for name in chosen}
