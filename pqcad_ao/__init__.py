"""pqcad_ao: diffusion UNets in four bits and half the sampling steps, as an ordinary PyTorch 2 workflow."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqcad_ao.cache import cache_
    from pqcad_ao.cached_unet import CachedUNet
    from pqcad_ao.compile.loaded import load_pt2
    from pqcad_ao.compile.package import export_pt2
    from pqcad_ao.config import CacheConfig, CADConfig, Correction, PQCADConfig
    from pqcad_ao.correct import correct_
    from pqcad_ao.diffusion.cache_plan import CachePlan
    from pqcad_ao.distill import compress, distill_
    from pqcad_ao.edge.export import export_pte
    from pqcad_ao.edge.sampler import PTESampler
    from pqcad_ao.graph.plan import Plan, PlanRow
    from pqcad_ao.nn.files import load_quantized, save_quantized
    from pqcad_ao.plan import plan
    from pqcad_ao.quantize import is_root, quantize_

__version__ = "0.1.0"

# Each name is imported when it is asked for: some bring what quantizing does not need, executorch among it.
_HOMES = {
    "CADConfig": "pqcad_ao.config",
    "CacheConfig": "pqcad_ao.config",
    "CachePlan": "pqcad_ao.diffusion.cache_plan",
    "CachedUNet": "pqcad_ao.cached_unet",
    "Correction": "pqcad_ao.config",
    "PQCADConfig": "pqcad_ao.config",
    "PTESampler": "pqcad_ao.edge.sampler",
    "Plan": "pqcad_ao.graph.plan",
    "PlanRow": "pqcad_ao.graph.plan",
    "cache_": "pqcad_ao.cache",
    "compress": "pqcad_ao.distill",
    "correct_": "pqcad_ao.correct",
    "distill_": "pqcad_ao.distill",
    "export_pt2": "pqcad_ao.compile.package",
    "export_pte": "pqcad_ao.edge.export",
    "is_root": "pqcad_ao.quantize",
    "load_pt2": "pqcad_ao.compile.loaded",
    "load_quantized": "pqcad_ao.nn.files",
    "quantize_": "pqcad_ao.quantize",
    "save_quantized": "pqcad_ao.nn.files",
}

__all__ = [
    "CADConfig",
    "CacheConfig",
    "CachePlan",
    "CachedUNet",
    "Correction",
    "PQCADConfig",
    "PTESampler",
    "Plan",
    "PlanRow",
    "cache_",
    "compress",
    "correct_",
    "distill_",
    "export_pt2",
    "export_pte",
    "is_root",
    "load_pt2",
    "load_quantized",
    "plan",
    "quantize_",
    "save_quantized",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "plan":  # a module that is called as its function
        return import_module("pqcad_ao.plan")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Importing this package makes PyTorch, torchao and diffusers know ours, which takes seconds. The ``pqcad`` command,
# which is to answer --help at once, does that when it has something to run.
if "pqcad_command" not in sys.modules:
    import pqcad_ao.registered  # noqa: F401
