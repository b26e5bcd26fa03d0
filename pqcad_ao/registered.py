"""What ``import pqcad_ao`` makes known to others: our operators, layers, configurations and quantizer.

After it ``from_pretrained`` reads a network that was quantized here, and torchao's ``quantize_`` takes a
:class:`~pqcad_ao.config.PQCADConfig`.
"""

import pqcad_ao.utils.quiet
import pqcad_ao.utils.tracing  # noqa: F401  (before torchao, which does not say why PyTorch's compiler fails to import)
from pqcad_ao import distill  # noqa: F401
from pqcad_ao.nn import files  # noqa: F401
