"""The list ops: what they are (schema), who computes them (fallback, csrc/, cuda), their gradients (autograd)."""

from fastsn.ops import autograd, cuda, fallback
from fastsn.ops.schema import DTYPE_CODES, VIEW_BITS, power_iteration, power_iteration_, rescale, rescale_backward

__all__ = [
    "DTYPE_CODES",
    "VIEW_BITS",
    "autograd",
    "cuda",
    "fallback",
    "power_iteration",
    "power_iteration_",
    "rescale",
    "rescale_backward",
]
