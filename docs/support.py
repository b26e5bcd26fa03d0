"""Writes the tables of docs/what-runs-where.md out of the code: ``python docs/support.py``."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pqcad_ao import PQCADConfig, export_pt2, export_pte, plan, quantize_
from pqcad_ao.compile.backend import fuse
from pqcad_ao.diffusion.process import FAMILY
from pqcad_ao.edge.capture import capture_at
from pqcad_ao.edge.export import _rewrite
from pqcad_ao.graph.operators import OPERATORS, call_site, packed_operator
from pqcad_ao.ops.cpu.build import source
from pqcad_ao.ops.dispatch import LEAST_CAPABILITY
from pqcad_ao.ops.triton import kernels
from pqcad_ao.passes.to_triton import to_triton

PAGE = Path(__file__).parent / "what-runs-where.md"
MARK = "<!-- written by docs/support.py -->\n"
SCHEMES = {
    "W4A6": {"weight_bits": 4, "activation_bits": 6},
    "W4A4": {"weight_bits": 4, "activation_bits": 4},
    "W4A8": {"weight_bits": 4, "activation_bits": 8},
    "W8A8": {"weight_bits": 8, "activation_bits": 8},
    "W4": {"weight_bits": 4, "activation_bits": None},
}
CHANNELS, SHAPE = 64, (1, 8, 8)


class EveryKind(nn.Module):
    """A denoiser with one layer of every kind of the table of operators between its first and last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.conv_out = nn.Conv2d(CHANNELS, 1, 3, padding=1)
        for row in OPERATORS.values():
            geometry = {"kernel_size": 3, "padding": 1} if row.spatial else {}
            self.add_module(row.kind, row.module(CHANNELS, CHANNELS, **geometry))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv_in(x) + torch.as_tensor(t).reshape(-1, 1, 1, 1) / 1000
        flat = h.flatten(2)
        inputs = {0: flat.transpose(1, 2), 1: flat, 2: h, 3: h.unsqueeze(2)}
        for row in OPERATORS.values():
            out = self.get_submodule(row.kind)(inputs[row.spatial])
            h = h + (out.transpose(1, 2) if row.spatial == 0 else out).reshape(h.shape)
        return self.conv_out(nn.functional.silu(h))


def packed(graph: GraphModule, kernel: Callable[[str], str]) -> dict[str, str]:
    """What multiplies each quantized layer of a graph, by the layer's name."""
    found = ((site(node), packed_operator(node)) for node in graph.graph.nodes)
    return {name: kernel(row.packed) for name, row in found if row is not None}


def site(node: Node) -> str:
    """The layer in which a node is computed; torch.compile puts the network's own name before the layer's."""
    return call_site(node).rpartition(".")[2]


def on_cpu(operator: str) -> str:
    """Whether the C++ kernels hold an operator."""
    held = re.findall(r'm\.impl\("(\w+)"', source())
    return "integers, AVX512-VNNI" if operator.removeprefix("pqcad::") in held else "the reference kernel"


def in_triton(operator: str) -> str:
    """Whether the Triton kernels hold an operator."""
    return "integers, Triton" if hasattr(kernels, operator.removeprefix("pqcad::")) else "the reference kernel"


def triton_kernels(graph: GraphModule) -> dict[str, str]:
    """What multiplies each quantized layer of a fused graph once its layers are Triton kernels."""
    to_triton(graph)
    return {site(node): "integers, Triton" for node in graph.graph.nodes if "triton_" in str(node.target)}


def dynamo(network: nn.Module, x: Tensor, t: Tensor) -> GraphModule:
    """The graph that torch.compile hands to a backend; what only settles the timestep stands in one of its own."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: list[Any]) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(network, backend=keep, fullgraph=True)(x, t)
    return max(graphs, key=lambda graph: len(graph.graph.nodes))


def refused(export: Callable[..., Any], network: nn.Module, **options: Any) -> str:
    """What an export says to a network that is not on the CPU; on the meta device, which every machine has."""
    try:
        export(network, Path("never-written"), **options)
    except ValueError as error:
        if "CPU" not in str(error):
            raise
        return "refused"
    return "taken"


def cells_of(scheme: str) -> dict[str, tuple[list[str], list[str]]]:
    """For each kind of layer, quantized by one scheme: the cells of the CPU's table, and of the GPU's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = EveryKind().eval()
    scheduler = DDIMScheduler()
    short = {"mode": "ptq", "timestep_groups": 1, "calibration_points": 2, "calibration_steps": 2}
    config = PQCADConfig(**short, **SCHEMES[scheme])
    quantize_(network, config, scheduler=scheduler, sample_shape=SHAPE, progress=False)
    quantized = {row.fqn for row in plan(network).quantized}
    captured = capture_at(network, SHAPE, 1, {}, continuous=False, cached=None).graph
    ahead, graph = copy.deepcopy(captured), dynamo(network, torch.zeros(1, *SHAPE), torch.tensor([500]))
    fuse(ahead)
    fuse(graph)
    on_a_cpu = [packed(captured, on_cpu), packed(graph, on_cpu), packed(ahead, on_cpu)]
    on_a_gpu = [packed(captured, in_triton), triton_kernels(graph)]
    arithmetic = _rewrite(captured, network, torch.tensor([500]), ())[1]
    on_a_cpu.append({kind: text.partition(": ")[2] for kind, text in arithmetic.items()})
    network.to("meta")
    elsewhere = [
        refused(export_pt2, network, sample_shape=SHAPE),
        refused(export_pte, network, scheduler=scheduler, sample_shape=SHAPE),
    ]
    cells = {}
    for kind in OPERATORS:
        rest = "float, of the widened weights" if kind in quantized else "float: not quantized"
        cpu, gpu = ([found.get(kind, rest) for found in side] for side in (on_a_cpu, on_a_gpu))
        cells[kind] = (cpu, [*gpu, *elsewhere])
    return cells


def table(cells: dict[str, dict[str, tuple[list[str], list[str]]]], side: int) -> str:
    """The table of one device as Markdown; schemes of which a kind of layer has the same cells share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for kind in OPERATORS:
        for scheme in SCHEMES:
            rows.setdefault((kind, *cells[scheme][kind][side]), []).append(scheme)
    shown = [[f"`{kind}`", ", ".join(schemes), *row] for (kind, *row), schemes in rows.items()]
    return tabulate(shown, HEADERS, tablefmt="github", disable_numparse=True)


HEADERS = ("layer", "asked for", "eager", "`torch.compile`", "`export_pt2`", "`export_pte`")


def page() -> str:
    """All that is written into the page."""
    cells = {scheme: cells_of(scheme) for scheme in SCHEMES}
    capability = ".".join(map(str, LEAST_CAPABILITY))
    processes = ", ".join(f"`{kind.__name__}`" for kind in FAMILY)
    return (
        f"## On a CPU\n\n{table(cells, 0)}\n\n"
        f"## On an NVIDIA GPU of compute capability {capability} or newer\n\n{table(cells, 1)}\n\n"
        f"## Schedulers\n\n{processes}, and what is built from their configurations. Networks of EDM's schedulers are "
        "quantized, sampled, saved and compiled with `torch.compile`, no more.\n"
    )


if __name__ == "__main__":
    before, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(f"{before}{MARK}\n{page()}")
