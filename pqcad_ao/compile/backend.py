"""``torch.compile(unet, backend="pqcad")``: the passes that fuse, then Inductor."""

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from pqcad_ao.graph.operators import OPERATORS
from pqcad_ao.ops import reference
from pqcad_ao.ops.cpu import loader
from pqcad_ao.ops.dispatch import gpu_kernels, has_gpu_kernels
from pqcad_ao.passes.attention_kernel import attention_kernel
from pqcad_ao.passes.chains import gather_chains
from pqcad_ao.passes.fuse_addends import fuse_addends
from pqcad_ao.passes.fuse_quantize import QUANTIZE, fuse_quantize
from pqcad_ao.passes.identities import drop_identities
from pqcad_ao.passes.inline import traced
from pqcad_ao.passes.to_triton import to_triton
from pqcad_ao.utils.checks import check_word

Attention = Literal["float32", "bfloat16"]  # what a float32 network's attention multiplies, on the CPU
LARGEST_CHAINED = 1 << 20  # bytes of a value
PRODUCTS = {function for row in OPERATORS.values() if row.quantized for function in row.functionals}


def pqcad(graph: GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None) -> Callable:
    """The backend: fuses what stands around the quantized layers, and hands the graph to Inductor.

    Installed under the entry point group ``torch_dynamo_backends``, so that its name alone is enough. Parts that are
    not quantized pass through to Inductor as they are.

    Args:
        options: Inductor's configuration for this call alone, as ``torch.compile(..., options=...)`` takes it; and
            ``attention``, as :func:`~pqcad_ao.compile.package.export_pt2` has it.

    Raises:
        ValueError: another ``attention``.
    """
    from torch._inductor.compile_fx import compile_fx

    options = dict(options or {})
    attention = options.pop("attention", "float32")
    check_word("attention", attention, Attention)
    differentiable = any(isinstance(value, Tensor) and value.requires_grad for value in example_inputs)
    if differentiable and torch.is_grad_enabled() and any(node.target in QUANTIZE for node in graph.graph.nodes):
        # the fused operators have no gradient, the layers have
        warnings.warn(
            "gradients are recorded, and backend 'pqcad' fuses nothing: under torch.no_grad() this is far faster",
            stacklevel=2,
        )
        unfused: Any = compile_fx(graph, example_inputs, config_patches=options)
        return unfused
    quantizers, decompositions = fuse(graph, attention), None
    if quantizers and any(has_gpu_kernels(device) for device in devices(graph)):
        decompositions = for_gpu(graph)
    elif quantizers:
        chain_on_cpu(graph)
    if not quantizers:
        products = sum(node.target in PRODUCTS for node in graph.graph.nodes)
        if products:
            warnings.warn(
                f"backend 'pqcad' found no layer quantized by pqcad_ao among {products} convolutions and linears: "
                "Inductor compiles them as they are. Call pqcad_ao.quantize_(unet, PQCADConfig()) first",
                stacklevel=2,
            )
    else:  # at each call, of every weight: Dynamo has looked already, and the operators' shape rules are tested
        options = {"size_asserts": False, **options}
    compiled: Any = compile_fx(graph, example_inputs, config_patches=options, decompositions=decompositions)
    return compiled


def fuse(graph: GraphModule, attention: Attention = "float32") -> int:
    """Run the passes over a graph of torch.compile or torch.export, in place; returns how many quantizers there are."""
    drop_identities(graph)
    quantizers = fuse_quantize(graph)
    if quantizers:
        fuse_addends(graph)
        if attention == "bfloat16":
            attention_kernel(graph)
    return quantizers


def chain_on_cpu(graph: GraphModule) -> None:
    """Let a fused graph call its operators in chains, in place, where they are the CPU's compiled kernels.

    Only where all values are small, where a call's microseconds count. A chain frees and takes each of its values, and
    larger ones scatter over glibc's heap: a process grew from 588 to 1,121 MB within 61 steps of a network whose step
    takes 70 MB at batch 8 (glibc 2.36), and no step was faster.
    """
    if devices(graph) == {torch.device("cpu")} and loader.load() and _largest(graph) <= LARGEST_CHAINED:
        gather_chains(graph)


def _largest(graph: GraphModule) -> float:
    """Bytes of the largest value that a graph computes; infinite where a size is not known."""
    values = (traced(node) for node in graph.graph.nodes if node.op.startswith("call_"))
    sizes = [value.numel() * value.element_size() for value in values if isinstance(value, Tensor)]
    if not all(isinstance(size, int) for size in sizes):
        return math.inf
    return max(sizes, default=0)


def devices(graph: GraphModule) -> set[torch.device]:
    """Where a graph's tensors were while it was traced; what passes know by its shape alone is nowhere."""
    values = (traced(node) for node in graph.graph.nodes)
    return {value.device for value in values if isinstance(value, Tensor) and not value.is_meta}


def for_gpu(graph: GraphModule) -> dict[Any, Callable]:
    """Turn a fused graph's layers into Triton kernels, in place; returns Inductor's table of decompositions for it.

    Quantizers and other operators that no kernel takes become plain PyTorch there, which Inductor fuses with what
    stands in front of them.
    """
    from torch._inductor.decomposition import select_decomp_table

    if gpu_kernels() is not None:
        from pqcad_ao.ops.triton import forms

        to_triton(graph, forms.choose)
    plain: dict[Any, Callable] = {
        torch.ops.pqcad.quantize.default: reference.quantize,
        torch.ops.pqcad.norm_silu_quantize.default: reference.norm_silu_quantize,
        torch.ops.pqcad.weight_only_linear.default: reference.weight_only_linear,
    }
    return {**select_decomp_table(), **plain}
