"""The ``pqcad::`` operators: schema, shape rule, and which kernel runs them.

Activations arrive as int8 integers on their 4- or 8-bit grid, weights packed (``pqcad_ao.ops.packing``); what comes out
is floating point: ``addend + bias + Σ_s accumulator_s · (input_scale_s · weight_scale)``. Importing this module
registers them with the exact reference kernel (``pqcad_ao.ops.reference``); the first call on a CPU looks for faster
ones, and where there are none PyTorch multiplies dequantized weights (``pqcad_ao.ops.dequantized``).

``pqcad::conv2d``
    input: (B, C, H, W) int8. weight: (O, ceil(kh·kw·(C/groups)·weight_bits/8)) uint8, rows in (kh, kw, in) order.
    weight_scale: (O,). input_scale: (B, segments). bias: (O,). segments: input channels with a scale of their own.
    input_bits: the integers of a sample's segment lie within 2^input_bits - 1 of each other and of zero; from it a
    kernel knows which products cannot overflow. addend: (B, O, H', W') or (B, O, 1, 1). Returns (B, O, H', W'),
    channels last.
``pqcad::linear``
    input: (B, ..., K) int8; weight, scales and bias alike; addend: (B, ..., O).
``pqcad::weight_only_linear``
    A linear layer whose activations stay in floating point. input: (..., K); weight, weight_scale and bias as above, in
    the CPU's kernel sums are float32. For the few rows of a timestep's embedding: it has no gradient, and of many rows
    a product with the weights widened in memory is faster.
``pqcad::quantize``
    Floating point to the integers clamp(round(input / scale), low, low + 2^bits - 1), int8. scale, low: (B, segments);
    channel_dim: along which the segments lie, 1 of 4 dimensions (the result is channels last) or the last. On a CPU
    NaN and infinity are a ValueError; on a GPU they become some integer.
``pqcad::norm_silu_quantize``
    The same of the inputs side by side along dimension 1 (B, Cᵢ, H, W), after GroupNorm where norm_groups is not 0,
    SiLU where silu is set, and nearest upsampling by a whole factor; channels last.
``pqcad::attention``
    softmax(query keyᵀ · scale) value of (B, heads, L, D), (B, heads, S, D) and (B, heads, S, D); the result's memory is
    (B, L, heads, D). The CPU's kernel rounds the factors of both products (query · scale and key; softmax and value) to
    bfloat16; the rest is float32.
``pqcad::chain``
    Calls of the operators above as one, which costs less than each of them by itself. inputs: what they read. program:
    what ``pqcad_ao.ops.chain`` writes. Returns those of the values (the inputs, then each call's result) that are in
    ``results``, of the calls' results only.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch.utils._pytree import tree_leaves

from pqcad_ao.ops import chain, dequantized, reference
from pqcad_ao.ops.cpu import loader

LEAST_CAPABILITY = (8, 0)  # int8 products of m16n8k32 and bfloat16

torch.library.define(
    "pqcad::conv2d",
    "(Tensor input, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor? bias, int weight_bits, "
    "int[] segments, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, ScalarType dtype, "
    "int input_bits=8, Tensor? addend=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "pqcad::linear",
    "(Tensor input, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor? bias, int weight_bits, "
    "int[] segments, ScalarType dtype, Tensor? addend=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "pqcad::weight_only_linear",
    "(Tensor input, Tensor weight, Tensor weight_scale, Tensor? bias, int weight_bits) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "pqcad::quantize",
    "(Tensor input, Tensor scale, Tensor low, int[] segments, int bits, int channel_dim) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "pqcad::norm_silu_quantize",
    "(Tensor[] inputs, Tensor? weight, Tensor? bias, int norm_groups, float eps, bool silu, Tensor scale, Tensor low, "
    "int[] segments, int bits, int upsample) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "pqcad::attention",
    "(Tensor query, Tensor key, Tensor value, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "pqcad::chain",
    "(Tensor[] inputs, str program, int[] results) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@functools.cache
def gpu_kernels() -> ModuleType | None:
    """The Triton kernels, ``pqcad_ao.ops.triton``; None, said once in a warning, where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn("Triton is not installed: on a GPU the slower reference kernel runs", stacklevel=2)
        return None
    from pqcad_ao.ops.triton import kernels

    return kernels


@functools.cache
def has_gpu_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on ``device``; says once in a warning why they do not on a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available() or gpu_kernels() is None:
        return False
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability}, the Triton kernels need "
            f"{LEAST_CAPABILITY}: the slower reference kernel runs in their place",
            stacklevel=2,
        )
        return False
    return True


def arithmetic(device: str = "cpu") -> str:
    """What the machine really multiplies when these operators run on ``device``."""
    instructions = loader.load() if device == "cpu" else ""
    if has_gpu_kernels(torch.device(device)):
        instructions = "Triton, the GPU's int8 matrix units"
    if instructions:
        return f"4-bit weights and activations carried to 8-bit multiply-accumulates ({instructions}, exact integers)"
    exact = ", dequantized once" if device == "cpu" else " (exact integers)"
    return f"4-bit weights and activations carried to floating-point multiply-accumulates{exact}"


def _check_devices(*arguments) -> None:
    """Refuse tensors of an operator that are on several devices."""
    tensors = [value for value in tree_leaves(arguments) if isinstance(value, torch.Tensor)]
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise ValueError(f"tensors on {' and '.join(devices)}: move the network and its inputs to one device")


def _default(name: str, exact: Callable):
    """Register the default kernel: the device's own where there is one, else PyTorch's or ``exact``, the reference.

    Once the CPU's kernels are registered, the dispatcher no longer comes here for tensors on the CPU.
    """

    @torch.library.impl(f"pqcad::{name}", "CompositeExplicitAutograd")
    def kernel(input, *args, **kwargs):
        device = (input if isinstance(input, torch.Tensor) else input[0]).device
        if device.type == "cpu" and loader.load():
            _check_devices(input, *args, *kwargs.values())  # with one elsewhere, the dispatcher would come here again
            return getattr(torch.ops.pqcad, name)(input, *args, **kwargs)
        if name in ("conv2d", "linear") and has_gpu_kernels(device):
            return getattr(gpu_kernels(), name)(input, *args, **kwargs)
        if name in ("conv2d", "linear") and device.type == "cpu":
            return getattr(dequantized, name)(input, *args, **kwargs)
        return exact(input, *args, **kwargs)


for _name in chain.OPERATORS:
    _default(_name, getattr(reference, _name))
_default("chain", chain.run)


@torch.library.register_fake("pqcad::conv2d")
def _(
    input,
    weight,
    weight_scale,
    input_scale,
    bias,
    weight_bits,
    segments,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    dtype,
    input_bits=8,
    addend=None,
):
    size = [
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, p, d, k, s in zip(input.shape[2:], padding, dilation, kernel_size, stride, strict=True)
    ]
    shape = [input.shape[0], weight_scale.shape[0], *size]
    return torch.empty(shape, dtype=dtype, device=input.device, memory_format=torch.channels_last)


@torch.library.register_fake("pqcad::linear")
def _(input, weight, weight_scale, input_scale, bias, weight_bits, segments, dtype, addend=None):
    return input.new_empty([*input.shape[:-1], weight_scale.shape[0]], dtype=dtype)


@torch.library.register_fake("pqcad::weight_only_linear")
def _(input, weight, weight_scale, bias, weight_bits):
    return input.new_empty([*input.shape[:-1], weight_scale.shape[0]])


@torch.library.register_fake("pqcad::quantize")
def _(input, scale, low, segments, bits, channel_dim):
    layout = torch.channels_last if input.dim() == 4 and channel_dim == 1 else torch.contiguous_format
    return torch.empty(input.shape, dtype=torch.int8, device=input.device, memory_format=layout)


@torch.library.register_fake("pqcad::norm_silu_quantize")
def _(inputs, weight, bias, norm_groups, eps, silu, scale, low, segments, bits, upsample):
    batch, _, height, width = inputs[0].shape
    shape = [batch, sum(input.shape[1] for input in inputs), height * upsample, width * upsample]
    return torch.empty(shape, dtype=torch.int8, device=inputs[0].device, memory_format=torch.channels_last)


@torch.library.register_fake("pqcad::attention")
def _(query, key, value, scale):
    batch, heads, length, channels = query.shape
    return query.new_empty(batch, length, heads, channels).transpose(1, 2)


@torch.library.register_fake("pqcad::chain")
def _(inputs, program, results):
    return chain.run(inputs, program, results)
