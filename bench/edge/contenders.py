"""The rows of ``pqcad bench edge``: who makes a .pte of the network, and for which backend."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pqcad_ao.bench.compile.workload import Step, float_model, random_conditioning
from pqcad_ao.denoiser import sample_shape
from pqcad_ao.models import load_model
from pqcad_ao.utils.files import write_whole

TRAJECTORIES = 4  # behind the signal-to-noise ratios
CALIBRATION = 32  # calls behind the stock quantizer's scales


@dataclass(frozen=True)
class Row:
    """What a row is made of: who quantizes, and for which backend."""

    title: str
    build: Callable[..., dict[str, Any]]
    runs: bool = True


def unconditional_network(model: str) -> tuple[nn.Module, Any]:
    unet, scheduler = float_model(model)
    if random_conditioning(unet, 1, torch.Generator()):
        raise ValueError(f"model={model!r} takes conditioning: this benchmark measures unconditional networks")
    return unet.eval(), scheduler


def _example(unet: nn.Module) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, *sample_shape(unet)), torch.tensor([500])


def build_fp32(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """ExecuTorch's recipe, not quantized."""
    from pqcad_ao.edge.export import export_fp32_pte

    report = export_fp32_pte(unconditional_network(job["model"])[0], path)
    return {"delegates": report.delegates, "portable": report.portable, "arithmetic": "float32"}


def build_int8(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """ExecuTorch's recipe for XNNPACK: PT2E, static int8, weights per channel."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from pqcad_ao.edge.lower import lower

    unet, _ = unconditional_network(job["model"])
    met = load_file(job["records"])
    with torch.no_grad():
        graph = torch.export.export(Step(unet), _example(unet)).module()
        prepared = prepare_pt2e(
            graph, XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        )
        calls = [(x, t) for x_t, t in zip(met["x_t"], met["timesteps"], strict=True) for x in x_t]
        for x, t in calls[:: -(-len(calls) // CALIBRATION)]:
            prepared(x[None], t.view(1))
        program, counted = lower(convert_pt2e(prepared), _example(unet), stock=True)
    write_whole(path, program)
    delegates = counted.pop("executorch_call_delegate", 0)
    return {"delegates": delegates, "portable": dict(counted), "arithmetic": "int8 × int8 products, int8 results"}


def compressed_network(job: dict[str, Any]) -> tuple[nn.Module, Any]:
    unet, scheduler = load_model(job["compressed"])
    return unet, scheduler


def _build_pqcad(objective: str) -> Callable[..., dict[str, Any]]:
    def build(job: dict[str, Any], path: Path) -> dict[str, Any]:
        from pqcad_ao.edge.export import export_pte

        unet, scheduler = compressed_network(job)
        options = {"num_inference_steps": job["steps"], "objective": objective, "progress": False}
        report = export_pte(unet, path, scheduler=scheduler, trajectories=TRAJECTORIES, **options)
        packed = sum(row.packed for row in report.plan.layers)
        return {
            "delegates": report.delegates,
            "portable": report.portable,
            "arithmetic": f"int8 × int4 products in {packed} layers, int8 × int8 in "
            f"{len(report.plan.layers) - packed}, float32 results",
            "parity_db": {"worst": min(report.sqnr_db.values()), "median": median(report.sqnr_db.values())},
            "rounding_db": report.rounding_db,
        }

    return build


def build_coreml(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """Ahead of time only: no device is here."""
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    return _ahead_of_time(job, path, CoreMLPartitioner())


def build_vulkan(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """Ahead of time only: no device is here."""
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return _ahead_of_time(job, path, VulkanPartitioner())


def _ahead_of_time(job: dict[str, Any], path: Path, partitioner: Any) -> dict[str, Any]:
    from executorch.exir import to_edge_transform_and_lower

    from pqcad_ao.edge.lower import calls_of

    unet, _ = unconditional_network(job["model"])
    with torch.no_grad():
        exported = torch.export.export(Step(unet), _example(unet))
        edge = to_edge_transform_and_lower(exported, partitioner=[partitioner])
        counted = calls_of(edge.exported_program())
        write_whole(path, edge.to_executorch().buffer)
    delegates = counted.pop("executorch_call_delegate", 0)
    return {"delegates": delegates, "portable": dict(counted), "arithmetic": "not run: no device"}


ROWS = {
    "xnnpack_fp32": Row("XNNPACK fp32", build_fp32),
    "xnnpack_int8": Row("XNNPACK int8, stock", build_int8),
    "pqcad_speed": Row("pqcad W4A4, speed", _build_pqcad("speed")),
    "pqcad_size": Row("pqcad W4A4, size", _build_pqcad("size")),
    "coreml_fp32": Row("Core ML fp32", build_coreml, runs=False),
    "vulkan_fp32": Row("Vulkan fp32", build_vulkan, runs=False),
}
