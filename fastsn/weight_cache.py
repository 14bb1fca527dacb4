"""Caches W̄ for all uses of a norm within a step, or within a forward of a fused model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastsn import checks, normalize, recomputation, torch_private
from fastsn.normalize import Batch, UsedVectors, WeightSpec
from fastsn.reference import Vectors

CacheEntry: TypeAlias = "tuple[CachedWeights, int]"  # with the index of the norm in the call
_Normalized: TypeAlias = "tuple[Tensor, Tensor | float, tuple[int, int], Tensor]"  # weight, scale, their versions, W̄


class CachedWeights:
    """W̄ and vectors from one call of the ops, for all its norms, until the step ends. Each norm references it together
    with its index in the call.

    Args:
        batch: the weights and settings of the call.
        values: W̄ of each weight.
        vectors: the vectors that the call used.
        thread: id of the thread that entered the step; its uses prefer this entry. None: any thread.
        from_step: it is a step's, whose vectors forwards of fused models take in threads without a step of their own,
            instead of moving them.
        traced: it was made while compiling.
    """

    __slots__ = ("_fast", "_specs", "_traced", "_updated", "_values", "_versions", "from_step", "thread", "vectors")

    def __init__(
        self,
        batch: Batch,
        values: Sequence[Tensor],
        vectors: UsedVectors,
        thread: int | None,
        from_step: bool,
        traced: bool,
    ) -> None:
        self._specs, self._values, self.vectors = batch.specs, values, vectors
        self.thread, self.from_step, self._traced = thread, from_step, traced
        self._fast = batch.fast_lookup and not (traced or torch.is_inference_mode_enabled())
        if self._fast:
            self._versions = [(spec[0]._version, 0) for spec in batch.specs]
        else:
            self._versions = [_versions(spec.weight, spec.scale, traced) for spec in batch.specs]
        self._updated: dict[tuple[int, torch.dtype], _Normalized] = {}

    def for_any_thread(self) -> CachedWeights:
        """A copy for a replica of DataParallel, which runs in another thread."""
        own = copy.copy(self)
        own.thread, own._updated = None, {}
        return own

    def fast_get(self, position: int, weight: Tensor, scale: Tensor | float) -> Tensor | None:
        """The W̄ computed at the start of the step if a few cheap checks show that it is valid here, else None. Not for
        compiled code."""
        if self._fast:
            spec, value = self._specs[position], self._values[position]
            if (
                spec[0] is weight
                and spec[3] is scale
                and weight._version == self._versions[position][0]
                and weight.dtype is value.dtype
                and (weight.requires_grad is value.requires_grad or not torch.is_grad_enabled())
                and self.thread == threading.get_ident()
                and not (
                    recomputation.state.active or torch_private.any_autocast() or torch_private.backward_id() != -1
                )
            ):
                return value
        return None

    def get(self, position: int, weight: Tensor, scale: Tensor | float, dtype: torch.dtype, compiling: bool) -> Tensor:
        """The cached W̄ if it is still valid: same weight and scale, unchanged in place, and a graph if one is needed.
        Otherwise the weight is normalized again with the vectors of the step."""
        # A compiled graph cannot check whether a weight has changed since a step that began outside of it.
        spec = self._specs[position]
        if (compiling and not self._traced) or (not compiling and recomputation.in_reentrant_checkpoint()):
            return self._normalize(position, weight, scale, dtype)
        versions = _versions(weight, scale, compiling)
        made = self._updated.get((position, dtype))
        if made is None and dtype == spec.dtype:
            made = (spec.weight, spec.scale, self._versions[position], self._values[position])
        if made is not None:
            own, own_scale, own_versions, value = made
            if (
                own is weight
                and (own_scale is scale or (not isinstance(scale, Tensor) and own_scale == scale))
                and own_versions == versions
                and (not torch.is_grad_enabled() or normalize.requires_grad(weight, scale) == value.requires_grad)
                and (compiling or not value.is_inference() or torch.is_inference_mode_enabled())
            ):
                return value
        value = self._normalize(position, weight, scale, dtype)
        self._updated[position, dtype] = (weight, scale, versions, value)
        return value

    def _normalize(self, position: int, weight: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        checks.weight(weight, "weight")
        vectors = self.vectors.of(position)
        return normalize_fixed(self._specs[position]._replace(weight=weight, vectors=vectors, scale=scale, dtype=dtype))


def normalize_fixed(spec: WeightSpec) -> Tensor:
    """W̄ without a power iteration."""
    device = spec.weight.device
    if any(u.device != device for u, _ in spec.vectors.values()):  # of a replica
        moved = {view: (u.to(device), v.to(device)) for view, (u, v) in spec.vectors.items()}
        spec = spec._replace(vectors=moved)
    with recomputation.hide_from_checkpoint():
        return normalize.normalize(spec, 0, False)[0]


def active_entry(cached: Sequence[CacheEntry], compiling: bool) -> CacheEntry | None:
    """The newest entry of this thread; else the newest of all, for threads of replicas and of backward. None if there
    are none."""
    newest = cached[-1] if cached else None
    if newest is None or compiling or _in_this_thread(newest):
        return newest
    return next((each for each in reversed(cached) if _in_this_thread(each)), newest)


def entered_in_this_thread(cached: Sequence[CacheEntry]) -> bool:
    """Whether one of the entries was made by this thread."""
    return bool(cached) if torch.compiler.is_compiling() else any(map(_in_this_thread, cached))


def step_vectors(cached: Sequence[CacheEntry]) -> Vectors | None:
    """The vectors of the newest entry of a step (not of a fused forward), in any thread."""
    return next((weights.vectors.of(position) for weights, position in reversed(cached) if weights.from_step), None)


def _in_this_thread(cached: CacheEntry) -> bool:
    return cached[0].thread in (None, threading.get_ident())


def _versions(weight: Tensor, scale: Tensor | float, traced: bool) -> tuple[int, int]:
    """Version counters of weight and scale; 0 for what has none."""
    tensors = (weight, scale)
    first, second = [0 if traced or not isinstance(x, Tensor) or x.is_inference() else x._version for x in tensors]
    return first, second
