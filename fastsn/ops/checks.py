"""Checks of the arguments of the list ops: errors name the argument and its position. csrc/ checks the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsn import reference, views
from fastsn.checks import REAL
from fastsn.ops.schema import DTYPES, VIEW_BITS


def check_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    view_masks: Sequence[int],
    v_first: Sequence[int],
    n: int,
) -> list[tuple[int, str]]:
    """(position of the weight, view) of every pair of vectors; raises if an argument is not as it must be."""
    _check_weights(weights, dims, view_masks)
    if len(v_first) != len(weights):
        raise ValueError(f"v_first must have {len(weights)} entries, one per entry of weights, got {len(v_first)}")
    for i, order in enumerate(v_first):
        if order not in (0, 1):
            raise ValueError(f"v_first[{i}] must be 0 (u first) or 1 (v first), got {order}")
    pairs = [(i, view) for i, bits in enumerate(view_masks) for view, bit in VIEW_BITS.items() if bits & bit]
    _check_vectors(weights, dims, pairs, u, v)
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    return pairs


def check_rescale(*arguments: Any) -> None:
    """Raises if an argument of ``rescale`` is not as it must be."""
    weights, scales, sigma, vectors, dims, view_masks, scale_index, scale_factor, dtypes = arguments
    _check_weights(weights, dims, view_masks)
    _check_numbers(len(weights), scales, scale_index, scale_factor, dtypes)
    _check_state(weights, sigma, vectors, dims, view_masks, sum(bits.bit_count() for bits in view_masks))


def _check_state(
    weights: Sequence[Tensor],
    sigma: Tensor,
    vectors: Tensor,
    dims: Sequence[int],
    view_masks: Sequence[int],
    sigmas: int,
) -> None:
    _check_flat(sigma, sigmas, reference.wide(sigma.dtype), "sigma")
    entries = sum(vector_size(*weight) for weight in zip(weights, dims, view_masks, strict=True))
    _check_flat(vectors, entries, sigma.dtype, "vectors")


def check_backward(*arguments: Any) -> None:
    """Raises if an argument of ``rescale_backward`` is not as it must be."""
    gradients, grad_sigma, bases, scales, sigma, vectors, dims, view_masks, scale_index, scale_factor, dtypes = (
        arguments
    )
    _check_weights(bases, dims, view_masks)
    _check_gradients(gradients, bases)
    _check_numbers(len(bases), scales, scale_index, scale_factor, dtypes)
    _check_state(bases, sigma, vectors, dims, view_masks, len(bases))
    if grad_sigma is not None:
        _check_flat(grad_sigma, len(bases), sigma.dtype, "grad_sigma")


def vector_size(weight: Tensor, dim: int, bits: int) -> int:
    """How many entries u and v of a weight have, those of all of its views together."""
    o, i, n = weight.shape[dim], weight.shape[1 if dim == 0 else 0], weight.numel()
    return (o + n // o) * (bits & 1) + (n // i + i) * (bits >> 1)


def _check_weights(found: Sequence[Tensor], dims: Sequence[int], view_masks: Sequence[int]) -> None:
    """Raises TypeError, ValueError or IndexError unless all can be normalized together."""
    if not found:
        raise ValueError("weights must have at least one entry, got none")
    for name, numbers in (("dims", dims), ("view_masks", view_masks)):
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
        if not 1 <= view_masks[i] <= 3:
            raise ValueError(f"view_masks[{i}] must be 1 (out), 2 (in) or 3 (both), got {view_masks[i]}")


def _check_vectors(
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
            _check_flat(x, size, width, f"{name}[{at}]")
            if x.device != found[0].device:
                raise ValueError(f"{name}[{at}] must be on {found[0].device}, got {x.device}")


def _check_numbers(
    length: int,
    scales: Sequence[Tensor],
    scale_index: Sequence[int],
    scale_factor: Sequence[float],
    dtypes: Sequence[int],
) -> None:
    """Raises TypeError, ValueError or IndexError unless there is a sound scale and dtype for every weight."""
    for name, list_ in (("scale_index", scale_index), ("scale_factor", scale_factor), ("dtypes", dtypes)):
        if len(list_) != length:
            raise ValueError(f"{name} must have {length} entries, one per weight, got {len(list_)}")
    for i, s in enumerate(scales):
        if s.numel() != 1:
            raise ValueError(f"scales[{i}] must be one number, got shape {list(s.shape)}")
        if not s.is_floating_point():
            raise TypeError(f"scales[{i}] must be floating point, got {s.dtype}")
    for i in range(length):
        if scale_index[i] >= len(scales):
            count, at = len(scales), scale_index[i]
            raise IndexError(f"scale_index[{i}] must be less than {count}, the number of scales, got {at}")
        if not math.isfinite(scale_factor[i]):
            raise ValueError(f"scale_factor[{i}] must be finite, got {scale_factor[i]}")
        if dtypes[i] not in DTYPES:
            raise TypeError(f"dtypes[{i}] must be one of {list(DTYPES)}, got {dtypes[i]}")


def _check_flat(value: Tensor, size: int, dtype: torch.dtype, name: str) -> None:
    """Raises ValueError or TypeError unless ``value`` has ``size`` entries in one dimension and the dtype."""
    if value.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}], got {list(value.shape)}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")


def _check_gradients(found: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
    """Raises ValueError or TypeError unless there is a gradient for every base."""
    if len(found) != len(bases):
        raise ValueError(f"gradients must have {len(bases)} entries, one per entry of bases, got {len(found)}")
    for i, (g, base) in enumerate(zip(found, bases, strict=True)):
        if g.shape != base.shape:
            raise ValueError(f"gradients[{i}] must have shape {list(base.shape)}, got {list(g.shape)}")
        if g.dtype not in REAL:
            raise TypeError(f"gradients[{i}] must be float32, float64, float16 or bfloat16, got {g.dtype}")
