"""Validation of arguments. Every error names the argument, what was expected and what was passed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fastsn import torch_private, views
from fastsn.variants import VARIANTS, Variant

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def module(value: object, name: str) -> None:
    """Raises TypeError unless ``value`` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}")


def weight(value: object, name: str) -> Tensor:
    """``value`` if it is a weight that can be normalized.

    Raises:
        TypeError: not a tensor, not floating point or complex, not dense, or a sharded DTensor.
        ValueError: lazy (not initialized yet), without dimensions, or without elements.
    """
    if type(value) is not nn.Parameter and type(value) is not Tensor:  # the common types need no further check
        _check_kind(value, name)
    assert isinstance(value, Tensor)
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{name} must be floating point or complex, got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got layout {value.layout}: make it dense by to_dense() first")
    if value.ndim == 0 or value.numel() == 0:
        raise ValueError(f"{name} must have at least one dimension and one element, got shape {tuple(value.shape)}")
    return value


def _check_kind(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if isinstance(value, UninitializedParameter | UninitializedBuffer):
        raise ValueError(f"{name} must be initialized, got a lazy parameter: run one forward of the module first")
    if torch_private.is_sharded(value):
        raise TypeError(
            f"{name} must be a whole tensor, got a sharded DTensor: gather it first, as FSDP's forward does"
        )


def count(value: object, name: str) -> int:
    """``value`` as an int of at least 1; TypeError or ValueError otherwise."""
    number = integer(value, name)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return number


def integer(value: object, name: str) -> int:
    """``value`` as an int, numpy's too; TypeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


def dim(value: object, ndim: int) -> int:
    """``value`` as a non-negative dimension of a tensor with ``ndim`` dimensions; TypeError or IndexError otherwise."""
    number = integer(value, "dim")
    if not -ndim <= number < ndim:
        raise IndexError(f"dim must be in [{-ndim}, {ndim - 1}] for a weight of {ndim} dimensions, got {value}")
    return number % ndim


def flag(value: object, name: str) -> bool:
    """``value`` if it is True or False; TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def eps(value: object) -> float:
    """``value`` as a finite float of at least 0; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"eps must be a float, got {value!r}")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {value}")
    return number


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
    elif isinstance(value, bool) or not isinstance(value, Real):
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


def scale_has_values(weight: Tensor, scale: object) -> None:
    """Raises ValueError for a scale on meta with a weight that is not: kernels would read uninitialized memory."""
    if isinstance(scale, Tensor) and scale.is_meta and not weight.is_meta:
        raise ValueError(f"scale must have values as the weight has, got a meta tensor and a weight on {weight.device}")


def vectors_by_view(value: object) -> Mapping[str, Sequence[Tensor]]:
    """``value`` if it is a mapping whose keys are views; TypeError or ValueError otherwise."""
    if not isinstance(value, Mapping):
        raise TypeError(f"vectors must be a mapping of view to (u, v), got {type(value).__name__}")
    unknown = [view for view in value if view not in views.VIEWS]
    if unknown:
        known = " and ".join(map(repr, views.VIEWS))
        raise ValueError(f"vectors must have the views {known} as keys, got {unknown[0]!r}")
    return value


def has_norms(found: object, argument: str) -> None:
    """Raises ValueError for a model in which no norm of fastsn was found."""
    if not found:
        raise ValueError(f"{argument} must have norms of fastsn, got none: call fastsn.convert on it first")


def lengths(found: Sequence[Tensor], sizes: Sequence[int], name: str) -> None:
    """Raises ValueError unless ``found`` are 1-D tensors of these lengths."""
    shapes = [tuple(x.shape) for x in found]
    if shapes != [(n,) for n in sizes]:
        raise ValueError(f"{name} must have shapes {[(n,) for n in sizes]}, got {shapes}")
