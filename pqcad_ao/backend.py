"""``torch.compile(unet, backend="pqcad")`` and AOTInductor packages: the passes that fuse, then Inductor."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn import functional

from pqcad_ao.passes.fuse_addends import fuse_addends
from pqcad_ao.passes.fuse_quantize import fuse_quantize
from pqcad_ao.passes.identities import drop_identities

PRODUCTS = {torch.conv2d, functional.conv2d, functional.linear, torch._C._nn.linear}


def pqcad(graph: GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None) -> Callable:
    """The backend: fuses what stands around the quantized layers, and hands the graph to Inductor.

    Installed under the entry point group ``torch_dynamo_backends``, so that its name alone is enough. Parts that are
    not quantized pass through to Inductor as they are.

    Args:
        options: Inductor's configuration for this call alone, as ``torch.compile(..., options=...)`` takes it.
    """
    from torch._inductor.compile_fx import compile_fx

    if not fuse(graph):
        products = sum(node.target in PRODUCTS for node in graph.graph.nodes)
        if products:
            warnings.warn(
                f"backend 'pqcad' found no layer quantized by pqcad_ao among {products} convolutions and linears: "
                "Inductor compiles them as they are. Call pqcad_ao.quantize_(unet, PQCADConfig()) first",
                stacklevel=2,
            )
    return compile_fx(graph, example_inputs, config_patches=options)


def fuse(graph: GraphModule) -> int:
    """Run the passes over a graph of torch.compile or torch.export, in place; returns how many quantizers there are."""
    drop_identities(graph)
    quantizers = fuse_quantize(graph)
    if quantizers:
        fuse_addends(graph)
    return quantizers
