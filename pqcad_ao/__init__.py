"""pqcad_ao: diffusion UNets in four bits and half the sampling steps, as an ordinary PyTorch 2 workflow."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pqcad_ao.utils.quiet
import pqcad_ao.utils.tracing  # noqa: F401  (before torchao, which does not say why PyTorch's compiler fails to import)
from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.distill import compress, distill_
from pqcad_ao.graph.plan import Plan, PlanRow
from pqcad_ao.nn.files import load_quantized, save_quantized
from pqcad_ao.quantize import is_root, quantize_

if TYPE_CHECKING:
    from pqcad_ao.compile.package import export_pt2, load_pt2
    from pqcad_ao.edge.export import export_pte
    from pqcad_ao.edge.sampler import PTESampler
    from pqcad_ao.plan import plan
else:
    from pqcad_ao import plan  # a module that is called as its function

__version__ = "0.1.0"

# Imported when they are asked for: their modules bring what quantizing does not need, executorch among it.
_LATER = {
    "PTESampler": "pqcad_ao.edge.sampler",
    "export_pt2": "pqcad_ao.compile.package",
    "export_pte": "pqcad_ao.edge.export",
    "load_pt2": "pqcad_ao.compile.package",
}

__all__ = [
    "CADConfig",
    "PQCADConfig",
    "PTESampler",
    "Plan",
    "PlanRow",
    "compress",
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
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
