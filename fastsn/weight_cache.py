"""One W̄ for all uses of a norm in a step, or in a forward of a fused model."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsn import checks, normalize, recompute
from fastsn.normalize import UsedVectors, WeightSpec


class CachedWeight:
    """The vectors that count for a norm until a step ends, and the W̄ made with them, by dtype.

    Args:
        spec: what was normalized, and how.
        weight: its W̄, made by a call for all norms of the step.
        vectors, position: those it was made with, and where they are among those of the call.
        thread: the thread whose uses it serves first, None for all.
        shared: it is a step's. Forwards of fused models in threads without a step of their own take its vectors
            instead of moving them.
    """

    __slots__ = ("_made", "_spec", "_traced", "position", "shared", "thread", "vectors")

    def __init__(
        self,
        spec: WeightSpec,
        weight: Tensor,
        vectors: UsedVectors,
        position: int,
        thread: int | None,
        shared: bool,
        traced: bool,
    ) -> None:
        self._spec, self.vectors, self.position, self.thread, self.shared = spec, vectors, position, thread, shared
        self._traced = traced
        versions = (0, 0) if traced else (_version(spec.weight), _version(spec.scale))
        self._made = {spec.dtype: (spec.weight, spec.scale, versions, weight)}

    def of_every_thread(self) -> CachedWeight:
        """The same for a replica, whose thread is none that has opened a step."""
        own = object.__new__(CachedWeight)
        for name in self.__slots__:
            setattr(own, name, getattr(self, name))
        own._made, own.thread = dict(self._made), None
        return own

    def get(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype, compiling: bool) -> Tensor:
        """The W̄ that was made of these, until one of them is another one or has changed in place, or until the graph
        that is wanted is not the one that was made; then one made anew with the vectors of the step."""
        if compiling:
            # A graph cannot ask whether a weight has changed since the step began, unless the step is in the graph.
            versions = (0, 0)
            if not self._traced:
                return self._make(weight, scale, dtype)
        elif recompute.in_backward():  # a region that runs again has a graph of its own
            return self._make(weight, scale, dtype)
        else:
            versions = (_version(weight), _version(scale))
        made = self._made.get(dtype)
        if made is not None:
            own_weight, own_scale, own_versions, value = made
            if (
                own_weight is weight
                and (own_scale is scale or (not isinstance(scale, Tensor) and own_scale == scale))
                and own_versions == versions
                and (not torch.is_grad_enabled() or normalize.requires_grad(weight, scale) == value.requires_grad)
                and (compiling or not value.is_inference() or torch.is_inference_mode_enabled())
            ):
                return value
        value = self._make(weight, scale, dtype)
        self._made[dtype] = (weight, scale, versions, value)
        return value

    def _make(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        checks.weight(weight, "weight")
        vectors = self.vectors.of(self.position)
        return make(self._spec._replace(weight=weight, vectors=vectors, scale=scale, dtype=dtype))


def make(spec: WeightSpec) -> Tensor:
    """W̄ of vectors that stay as they are."""
    device = spec.weight.device
    if any(u.device != device for u, _ in spec.vectors.values()):  # of a replica
        moved = {view: (u.to(device), v.to(device)) for view, (u, v) in spec.vectors.items()}
        spec = spec._replace(vectors=moved)
    with recompute.unseen_by_checkpoints():
        return normalize.normalize(spec, 0, False)[0]


def in_force(cached: Sequence[CachedWeight], compiling: bool) -> CachedWeight:
    """Of those that last, the newest of this thread; else the newest of all, for the threads of replicas and of
    backward, which have none of their own."""
    newest = cached[-1]
    if compiling or newest.thread is None:
        return newest
    me = threading.get_ident()
    if newest.thread == me:
        return newest
    return next((each for each in reversed(cached) if each.thread is None or each.thread == me), newest)


def of_this_thread(cached: Sequence[CachedWeight]) -> bool:
    """Whether one of those that last was opened by this thread."""
    if torch.compiler.is_compiling():
        return bool(cached)
    me = threading.get_ident()
    return any(each.thread is None or each.thread == me for each in cached)


def of_a_step(cached: Sequence[CachedWeight]) -> CachedWeight | None:
    """The newest that a step has opened, in any thread."""
    return next((each for each in reversed(cached) if each.shared), None)


def _version(x: Tensor | float) -> int:
    return 0 if not isinstance(x, Tensor) or x.is_inference() else x._version
