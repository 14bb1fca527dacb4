"""Checks of what users pass: each raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fastsn import reference, views
from fastsn.variants import VARIANTS, Variant

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def weight(value: object, name: str) -> Tensor:
    """``value`` if it is a weight that can be normalised.

    Raises:
        TypeError: not a tensor, not floating point or complex, not dense, or a sharded DTensor.
        ValueError: lazy (not initialised yet), without dimensions, or without elements.
    """
    if type(value) is not nn.Parameter and type(value) is not Tensor:  # the usual kinds are asked no further
        _whole(value, name)
    assert isinstance(value, Tensor)
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{name} must be floating point or complex, got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got layout {value.layout}: make it dense by to_dense() first")
    if value.ndim == 0 or value.numel() == 0:
        raise ValueError(f"{name} must have at least one dimension and one element, got shape {tuple(value.shape)}")
    return value


def _whole(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if isinstance(value, UninitializedParameter | UninitializedBuffer):
        raise ValueError(f"{name} must be initialised, got a lazy parameter: run one forward of the module first")
    if hasattr(value, "_local_tensor"):
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


def scale_beside(weight: Tensor, scale: object) -> None:
    """Raises ValueError for a scale on the meta device whose weight is not there: kernels would read garbage."""
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


# The arguments of the list ops: errors name the argument and the position in the list. csrc/ checks the same.


def weights(found: Sequence[Tensor], dims: Sequence[int], view_bits: Sequence[int]) -> None:
    """Raises TypeError, ValueError or IndexError unless all can be normalised together."""
    if not found:
        raise ValueError("weights must have at least one entry, got none")
    for name, numbers in (("dims", dims), ("views", view_bits)):
        if len(numbers) != len(found):
            raise ValueError(f"{name} must have {len(found)} entries, one per entry of weights, got {len(numbers)}")
    for i, w in enumerate(found):
        if w.layout != torch.strided:
            raise TypeError(f"weights[{i}] must be dense, got layout {w.layout}")
        if w.dtype not in REAL:
            raise TypeError(f"weights[{i}] must be float32, float64, float16 or bfloat16, got {w.dtype}")
        if w.ndim < 2:
            raise ValueError(f"weights[{i}] must have at least 2 dimensions, got shape {list(w.shape)}")
        if w.numel() == 0:
            raise ValueError(f"weights[{i}] must have at least one element, got shape {list(w.shape)}")
        if w.device != found[0].device:
            raise ValueError(f"weights[{i}] must be on the device of weights[0], {found[0].device}, got {w.device}")
        width = reference.wide(found[0].dtype)
        if reference.wide(w.dtype) != width:
            raise TypeError(f"weights[{i}] must have sums in {width} as weights[0], got {w.dtype}")
        if not 0 <= dims[i] < w.ndim:
            raise IndexError(f"dims[{i}] must be in [0, {w.ndim - 1}], got {dims[i]}")
        if not 1 <= view_bits[i] <= 3:
            raise ValueError(f"views[{i}] must be 1 (out), 2 (in) or 3 (both), got {view_bits[i]}")


def vectors(
    found: Sequence[Tensor],
    dims: Sequence[int],
    pairs: Sequence[tuple[int, str]],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
) -> None:
    """Raises TypeError or ValueError unless u and v have an entry that fits for every (position of weight, view)."""
    for name, list_ in (("u", u), ("v", v)):
        if len(list_) != len(pairs):
            raise ValueError(f"{name} must have {len(pairs)} entries, one per weight and view, got {len(list_)}")
    width = reference.wide(found[0].dtype)
    for at, (i, view) in enumerate(pairs):
        sizes = views.vector_sizes(views.as_oik(found[i], dims[i]), view)
        for name, x, size in (("u", u[at], sizes[0]), ("v", v[at], sizes[1])):
            flat(x, size, width, f"{name}[{at}]")
            if x.device != found[0].device:
                raise ValueError(f"{name}[{at}] must be on {found[0].device}, got {x.device}")


def numbers(
    length: int,
    scales: Sequence[Tensor],
    which: Sequence[int],
    factors: Sequence[float],
    dtypes: Sequence[int],
    codes: Sequence[int],
) -> None:
    """Raises TypeError, ValueError or IndexError unless there is a sound scale and dtype for every weight."""
    for name, list_ in (("which", which), ("factors", factors), ("dtypes", dtypes)):
        if len(list_) != length:
            raise ValueError(f"{name} must have {length} entries, one per weight, got {len(list_)}")
    for i, s in enumerate(scales):
        if s.numel() != 1:
            raise ValueError(f"scales[{i}] must be one number, got shape {list(s.shape)}")
        if not s.is_floating_point():
            raise TypeError(f"scales[{i}] must be floating point, got {s.dtype}")
    for i in range(length):
        if which[i] >= len(scales):
            raise IndexError(f"which[{i}] must be less than {len(scales)}, the number of scales, got {which[i]}")
        if not math.isfinite(factors[i]):
            raise ValueError(f"factors[{i}] must be finite, got {factors[i]}")
        if dtypes[i] not in codes:
            raise TypeError(f"dtypes[{i}] must be one of {codes}, got {dtypes[i]}")


def flat(value: Tensor, size: int, dtype: torch.dtype, name: str) -> None:
    """Raises ValueError or TypeError unless ``value`` has ``size`` entries in one dimension and the dtype."""
    if value.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}], got {list(value.shape)}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")


def gradients(found: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
    """Raises ValueError or TypeError unless there is a gradient for every base."""
    if len(found) != len(bases):
        raise ValueError(f"gradients must have {len(bases)} entries, one per entry of bases, got {len(found)}")
    for i, (g, base) in enumerate(zip(found, bases, strict=True)):
        if g.shape != base.shape:
            raise ValueError(f"gradients[{i}] must have shape {list(base.shape)}, got {list(g.shape)}")
        if g.dtype not in REAL:
            raise TypeError(f"gradients[{i}] must be float32, float64, float16 or bfloat16, got {g.dtype}")
