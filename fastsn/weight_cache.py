"""Caches W̄ for all uses of a norm within a step, or within a forward of a fused model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from itertools import count, repeat
from typing import TypeAlias

import torch
from torch import Tensor

from fastsn import checks, normalize, recomputation
from fastsn.normalize import Batch, UsedVectors, WeightSpec
from fastsn.reference import Vectors

# What a norm caches: the call and its index there; then, for ``SpectralNorm.fast_call``, the weight,
# its scale (``...``: ask ``CachedWeights.get`` instead), its version, and W̄.
CacheEntry: TypeAlias = "tuple[CachedWeights, int, Tensor, object, int, Tensor]"
_Normalized: TypeAlias = "tuple[Tensor, Tensor | float, tuple[int, int], Tensor]"  # weight, scale, their versions, W̄


class CachedWeights:
    """W̄ and vectors from one call of the ops, for all its norms, until the step ends.

    Args:
        batch: the weights and settings of the call.
        values: W̄ of each weight.
        vectors: the vectors that the call used.
        thread: id of the thread that entered the step; its uses prefer this entry. None: any thread.
        from_step: it is a step's, whose vectors forwards of fused models take in threads without a step of their own,
            instead of moving them.
        traced: it was made while compiling.
    """

    __slots__ = ("_batch", "_fast", "_traced", "_updated", "_values", "_versions", "from_step", "thread", "vectors")

    def __init__(
        self,
        batch: Batch,
        values: Sequence[Tensor],
        vectors: UsedVectors,
        thread: int | None,
        from_step: bool,
        traced: bool,
    ) -> None:
        self._batch, self._values, self.vectors = batch, values, vectors
        self.thread, self.from_step, self._traced = thread, from_step, traced
        self._fast = batch.fast_lookup and not (traced or torch.is_inference_mode_enabled())
        scales = [0] * len(values) if self._fast else [_version(scale, traced) for scale in batch.given_scales]
        weights = [w._version if self._fast else _version(w, traced) for w in batch.weights]
        self._versions = weights, scales
        self._updated: dict[tuple[int, torch.dtype], _Normalized] = {}

    def entries(self) -> list[CacheEntry]:
        """What each norm of the call caches."""
        weights, scales = self._batch.weights, self._batch.given_scales if self._fast else repeat(...)
        return list(zip(repeat(self), count(), weights, scales, self._versions[0], self._values))

    def for_any_thread(self, position: int) -> CacheEntry:
        """What the replica of a norm caches in DataParallel, which runs in another thread."""
        own = copy.copy(self)
        own.thread, own._updated = None, {}
        return own, position, self._batch.weights[position], ..., 0, self._values[position]

    def get(self, position: int, weight: Tensor, scale: Tensor | float, dtype: torch.dtype, compiling: bool) -> Tensor:
        """The cached W̄ if it is still valid: same weight and scale, unchanged in place, and a graph if one is needed.
        Otherwise the weight is normalized again with the vectors of the step."""
        # A compiled graph cannot check whether a weight has changed since a step that began outside of it.
        spec = self._batch.specs[position]
        if (compiling and not self._traced) or (not compiling and recomputation.in_reentrant_checkpoint()):
            return self._normalize(position, weight, scale, dtype)
        versions = _version(weight, compiling), _version(scale, compiling)
        made = self._updated.get((position, dtype))
        if made is None and dtype == spec.dtype:
            before = self._versions[0][position], self._versions[1][position]
            made = (spec.weight, spec.scale, before, self._values[position])
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
        spec, vectors = self._batch.specs[position], self.vectors.of(position)
        return normalize_fixed(spec._replace(weight=weight, vectors=vectors, scale=scale, dtype=dtype))


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
    cached = cached[:]  # other threads change the list meanwhile
    newest = cached[-1] if cached else None
    if newest is None or compiling or _in_this_thread(newest):
        return newest
    return next((each for each in reversed(cached) if _in_this_thread(each)), newest)


def entered_in_this_thread(cached: Sequence[CacheEntry]) -> bool:
    """Whether one of the entries was made by this thread."""
    return bool(cached) if torch.compiler.is_compiling() else any(map(_in_this_thread, cached[:]))


def step_vectors(cached: Sequence[CacheEntry]) -> Vectors | None:
    """The vectors of the newest entry of a step (not of a fused forward), in any thread."""
    return next((weights.vectors.of(i) for weights, i, *_ in reversed(cached[:]) if weights.from_step), None)


def _in_this_thread(cached: CacheEntry) -> bool:
    return cached[0].thread in (None, threading.get_ident())


def _version(x: Tensor | float, traced: bool) -> int:
    """The version counter of a weight or scale; 0 if it has none."""
    return 0 if traced or not isinstance(x, Tensor) or x.is_inference() else x._version
