"""The list ops in plain torch, for devices without kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsn import reference, views
from fastsn.ops import checks
from fastsn.ops.schema import DTYPES, LIBRARY, VIEW_BITS
from fastsn.reference import Vectors


def power_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    view_masks: Sequence[int],
    v_first: Sequence[int],
    n: int,
) -> tuple[Tensor, Tensor]:
    """``power_iteration`` of any device."""
    pairs = checks.check_iteration(weights, u, v, dims, view_masks, v_first, n)
    oiks = [views.as_oik(w, dim) for w, dim in zip(weights, dims, strict=True)]
    state: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in weights]
    for (i, view), left, right in zip(pairs, u, v, strict=True):
        state[i][view] = (left, right)
    vectors: Sequence[Vectors] = state
    if n:
        vectors = reference.power_iteration(oiks, state, n, v_first=[bool(order) for order in v_first])
    sigmas = [sigma for found in reference.sigmas(oiks, vectors) for sigma in found.values()]
    return torch.stack(sigmas), torch.cat([x for found in vectors for pair in found.values() for x in pair])


def power_iteration_(weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], *rest: Any) -> Any:
    """``power_iteration_`` of any device."""
    sigmas, vectors = power_iteration(weights, u, v, *rest)
    buffers = [x for pair in zip(u, v, strict=True) for x in pair]
    for buffer, vector in zip(buffers, torch.split(vectors, [x.numel() for x in buffers]), strict=True):
        buffer.copy_(vector)
    return sigmas, vectors


def rescale(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    sigma: Tensor,
    vectors: Tensor,
    dims: Sequence[int],
    view_masks: Sequence[int],
    scale_index: Sequence[int],
    scale_factor: Sequence[float],
    dtypes: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """``rescale`` of any device."""
    checks.check_rescale(weights, scales, sigma, vectors, dims, view_masks, scale_index, scale_factor, dtypes)
    groups = torch.split(sigma, [bits.bit_count() for bits in view_masks])
    means = torch.stack([group.mean() for group in groups])
    tensors = [_scale(i, scales, scale_index, scale_factor, sigma.dtype) for i in range(len(weights))]
    outputs = reference.rescale(weights, [{"mean": mean} for mean in means], tensors, [DTYPES[code] for code in dtypes])
    return [_own(w, x) for w, x in zip(weights, outputs, strict=True)], means


def _scale(
    i: int, scales: Sequence[Tensor], scale_index: Sequence[int], scale_factor: Sequence[float], dtype: torch.dtype
) -> float | Tensor:
    return scale_factor[i] if scale_index[i] < 0 else scales[scale_index[i]].to(dtype).reshape(()) * scale_factor[i]


def _own(like: Tensor, x: Tensor) -> Tensor:
    """An op may not return one of its inputs, and returns the strides that its fake promises."""
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def differentiable_backward(
    gradients: Sequence[Tensor],
    grad_sigma: Tensor | None,
    bases: Sequence[Tensor],
    scales: Sequence[Tensor],
    sigma: Tensor,
    vectors: Tensor,
    dims: Sequence[int],
    view_masks: Sequence[int],
    scale_index: Sequence[int],
    scale_factor: Sequence[float],
    dtypes: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """``rescale_backward`` in differentiable torch: the kernel of devices that have none, and the second order."""
    d_weights, d_scales = [], [torch.zeros_like(scale) for scale in scales]
    for i, outer in enumerate(_outer_products(bases, vectors, dims, view_masks)):
        g, base = gradients[i].to(sigma.dtype), bases[i].to(sigma.dtype)
        zero = sigma[i] == 0
        divisor = torch.where(zero, torch.ones_like(sigma[i]), sigma[i])
        scale = _scale(i, scales, scale_index, scale_factor, sigma.dtype)
        inner = (g * base).sum()
        if scale_index[i] >= 0:
            at = scale_index[i]
            d_scales[at] = d_scales[at] + (inner / divisor * scale_factor[i]).to(scales[at].dtype)
            inner = inner * scale / divisor
        along = -torch.where(zero, torch.zeros_like(inner), inner / divisor)
        if grad_sigma is not None:
            along = along + grad_sigma[i]
        d_weights.append((scale / divisor * g + along * outer).to(DTYPES[dtypes[i]]))
    return d_weights, d_scales


def _outer_products(
    weights: Sequence[Tensor], vectors: Tensor, dims: Sequence[int], view_masks: Sequence[int]
) -> list[Tensor]:
    """The mean of u v^T over the views of each weight, laid back onto the weight."""
    products, start = [], 0
    for w, dim, bits in zip(weights, dims, view_masks, strict=True):
        moved = w.movedim(dim, 0)
        o, i, k = moved.shape[0], moved.shape[1], moved[0, 0].numel()
        total = vectors.new_zeros((o, i, k))
        for view in (view for view, bit in VIEW_BITS.items() if bits & bit):
            sizes = [o, i * k] if view == "out" else [o * k, i]
            u, v = torch.split(vectors[start : start + sum(sizes)], sizes)
            outer = torch.outer(u, v)
            total = total + (outer.view(o, i, k) if view == "out" else outer.view(o, k, i).transpose(1, 2))
            start += sum(sizes)
        products.append((total / bits.bit_count()).view(moved.shape).movedim(0, dim))
    return products


def rescale_backward(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    """``rescale_backward`` of any device."""
    checks.check_backward(*arguments)
    d_weights, d_scales = differentiable_backward(*arguments)
    return [_own(base, dw) for base, dw in zip(arguments[2], d_weights, strict=True)], d_scales


for _name, _kernel in (
    ("power_iteration", power_iteration),
    ("power_iteration_", power_iteration_),
    ("rescale", rescale),
    ("rescale_backward", rescale_backward),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
