"""pqcad_ao: diffusion UNets in four bits and half the sampling steps, as an ordinary PyTorch 2 workflow."""

import pqcad_ao.quiet  # noqa: F401  (before the imports that it quietens)
from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.distill import compress, distill_
from pqcad_ao.plan import Plan, PlanRow
from pqcad_ao.quantize import is_root, plan, quantize_
from pqcad_ao.serialization import load_quantized, save_quantized

__version__ = "0.1.0"

__all__ = [
    "CADConfig",
    "PQCADConfig",
    "Plan",
    "PlanRow",
    "compress",
    "distill_",
    "is_root",
    "load_quantized",
    "plan",
    "quantize_",
    "save_quantized",
]
