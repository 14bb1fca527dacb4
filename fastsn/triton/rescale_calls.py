"""``rescale`` and ``rescale_backward`` for tensors of a GPU."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsn.tensor_lists import addresses
from fastsn.triton.arrangement import arranged, arrangement
from fastsn.triton.plan import Prepared, Weight, described
from fastsn.triton.rescale_plans import Numbers, backward_plan, forward_plan
from fastsn.triton.settings import current


def prepared_rescale(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    _sigma: Tensor,
    _vectors: Tensor,
    dims: Sequence[int],
    view_masks: Sequence[int],
    scale_index: Sequence[int],
    scale_factor: Sequence[float],
    dtypes: Sequence[int],
) -> Prepared:
    """What gives ([W̄], mean sigma), as the op does, for lists of tensors like these."""
    placed = [described(w, dim, dense=True) for w, dim in zip(weights, dims, strict=True)]
    device, numbers = (
        weights[0].device,
        Numbers(tuple(view_masks), tuple(scale_index), tuple(scale_factor), tuple(dtypes)),
    )
    plan = forward_plan(tuple(w for _, w in placed), numbers, len(scales), device, current(device))
    where_they_are = all(place is w for w, (place, _) in zip(weights, placed, strict=True))
    as_they_are = where_they_are and _readable(scales, device)

    def run(
        places: Hashable, weights: Sequence[Tensor], scales: Sequence[Tensor], sigma: Tensor, *_: Any
    ) -> tuple[list[Tensor], Tensor]:
        if as_they_are:
            return plan.run(places, weights, scales, sigma)
        own, own_scales = (
            [arranged(w, dim, dense=True)[0] for w, dim in zip(weights, dims, strict=True)],
            plan.read(scales),
        )
        results, mean = plan.run(addresses(own, own_scales), own, own_scales, sigma)
        return _as_given(results, own, weights, dims), mean

    return Prepared(device, run, plan.again if as_they_are else None)


def prepared_rescale_backward(
    gradients: Sequence[Tensor],
    _grad_sigma: Tensor | None,
    bases: Sequence[Tensor],
    scales: Sequence[Tensor],
    _sigma: Tensor,
    _vectors: Tensor,
    dims: Sequence[int],
    view_masks: Sequence[int],
    scale_index: Sequence[int],
    scale_factor: Sequence[float],
    dtypes: Sequence[int],
) -> Prepared:
    """What gives ([dW], [dscale]), as the op does, for lists of tensors like these."""
    placed = [described(base, dim, dense=True) for base, dim in zip(bases, dims, strict=True)]
    beside = [_beside(*each) for each in zip(gradients, bases, placed, dims, strict=True)]
    device, numbers = (
        bases[0].device,
        Numbers(tuple(view_masks), tuple(scale_index), tuple(scale_factor), tuple(dtypes)),
    )
    described_all = tuple(w for _, w in placed), tuple(g for _, g in beside)
    plan = backward_plan(*described_all, numbers, len(scales), device, current(device))
    found = zip((*bases, *gradients), (*placed, *beside), strict=True)
    as_they_are = all(place is x for x, (place, _) in found) and _readable(scales, device)

    def run(
        places: Hashable,
        gradients: Sequence[Tensor],
        grad_sigma: Tensor | None,
        bases: Sequence[Tensor],
        scales: Sequence[Tensor],
        sigma: Tensor,
        vectors: Tensor,
        *_: Any,
    ) -> tuple[list[Tensor], list[Tensor]]:
        if as_they_are:
            return plan.run(places, gradients, grad_sigma, bases, scales, sigma, vectors)
        placed = [described(base, dim, dense=True) for base, dim in zip(bases, dims, strict=True)]
        beside = [_beside(*each)[0] for each in zip(gradients, bases, placed, dims, strict=True)]
        own, own_scales = [place for place, _ in placed], plan.read(scales)
        places = addresses(beside, own, own_scales)
        results, d_scales = plan.run(places, beside, grad_sigma, own, own_scales, sigma, vectors)
        d_scales = [d.to(scale.device, scale.dtype) for d, scale in zip(d_scales, scales, strict=True)]
        return _as_given(results, own, bases, dims), d_scales

    return Prepared(device, run, plan.again if as_they_are else None)


def _readable(scales: Sequence[Tensor], device: torch.device) -> bool:
    return all(scale.device == device and scale.dtype == torch.float32 for scale in scales)


def _as_given(
    results: list[Tensor], places: Sequence[Tensor], given: Sequence[Tensor], dims: Sequence[int]
) -> list[Tensor]:
    """Results of weights that had to be copied go back to the order of their dimensions."""
    return [
        x if place is w else torch.empty_like(w, dtype=x.dtype).copy_(x.movedim(0, dim))
        for x, place, w, dim in zip(results, places, given, dims, strict=True)
    ]


def _beside(g: Tensor, base: Tensor, placed: tuple[Tensor, Weight], dim: int) -> tuple[Tensor, Weight]:
    """The gradient, or a copy of it, whose rows lie in the order of the base's."""
    place, weight = placed
    if place is not base:
        return described(g.movedim(dim, 0).contiguous(), 0)
    found = arrangement(g.shape, g.stride(), dim)
    if found is None or found.order() != weight.arrangement.order():
        g = torch.empty_like(base, dtype=g.dtype).copy_(g)
    return described(g, dim)
