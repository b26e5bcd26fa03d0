"""The ``pqcad::`` operators; importing this package registers them."""

from pqcad_ao.ops.dispatch import arithmetic, gpu_kernels, has_gpu_kernels

__all__ = ["arithmetic", "gpu_kernels", "has_gpu_kernels"]
