"""Checks of what users pass: each raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fastsn.variants import VARIANTS, Variant


def weight(value: object, name: str) -> Tensor:
    """``value`` if it is a weight that can be normalised.

    Raises:
        TypeError: not a tensor, not floating point or complex, or a sharded DTensor.
        ValueError: lazy (not initialised yet), without dimensions, or without elements.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if isinstance(value, UninitializedParameter | UninitializedBuffer):
        raise ValueError(f"{name} must be initialised, got a lazy parameter: run one forward of the module first")
    if hasattr(value, "_local_tensor"):
        raise TypeError(
            f"{name} must be a whole tensor, got a sharded DTensor: gather it first, as FSDP's forward does"
        )
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{name} must be floating point or complex, got {value.dtype}")
    if value.ndim == 0 or value.numel() == 0:
        raise ValueError(f"{name} must have at least one dimension and one element, got shape {tuple(value.shape)}")
    return value


def count(value: object, name: str) -> int:
    """``value`` if it is an integer of at least 1; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def eps(value: object) -> float:
    """``value`` if it is a finite float of at least 0; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"eps must be a float, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {value}")
    return float(value)


def scale(value: object, variant: Variant) -> float | Tensor:
    """``value`` if it is a finite positive number that ``variant`` allows: a float, or a tensor of one element.

    Raises:
        TypeError: not a number, or a tensor that requires grad without being a Parameter.
        ValueError: not one element, not finite, not positive, or not 1 for a variant whose scale is fixed.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"scale must be one floating-point number, got {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.requires_grad and not isinstance(value, nn.Parameter):
            raise TypeError("scale must be a float, a Parameter or a tensor without requires_grad, got one that has it")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"scale must be a float or a tensor, got {value!r}")
    if not (isinstance(value, Tensor) and value.is_meta):
        number = float(value.detach() if isinstance(value, Tensor) else value)
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"scale must be finite and positive, got {number}")
    if not variant.free_scale and (isinstance(value, Tensor) or value != 1):
        free = ", ".join(repr(row.name) for row in VARIANTS.values() if row.free_scale)
        came = f"a {type(value).__name__}" if isinstance(value, Tensor) else value
        raise ValueError(f"scale must be 1.0 for variant {variant.name!r}, got {came}; it is free for {free}")
    return value if isinstance(value, Tensor) else float(value)
