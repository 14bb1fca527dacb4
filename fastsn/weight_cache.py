"""One W̄ for all uses of a norm in a step, or in a forward of a fused model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastsn import checks, normalize, recomputation, torch_private
from fastsn.normalize import UsedVectors, WeightSpec
from fastsn.reference import Vectors

_Made: TypeAlias = "tuple[Tensor, Tensor | float, tuple[int, int], Tensor]"  # weight, scale, their versions, W̄


class StepCall(NamedTuple):
    """What a call for all norms of a step has given them together.

    ``vectors``: those that it used. ``thread``: the thread whose uses it serves first, None for all. ``shared``: it is
    a step's, whose vectors forwards of fused models take in threads without a step of their own, instead of moving
    them. ``traced``: it is in a graph that is being compiled.
    """

    vectors: UsedVectors
    thread: int | None
    shared: bool
    traced: bool


class CachedWeight:
    """The vectors that count for a norm until a step ends, and the W̄ made with them.

    Args:
        call: the call.
        position: of the norm in it.
        spec: what was normalized, and how.
        value: its W̄.
    """

    __slots__ = ("_made", "_quick", "_scale", "_spec", "_value", "_versions", "_weight", "call", "position")

    def __init__(self, call: StepCall, position: int, spec: WeightSpec, value: Tensor) -> None:
        self.call, self.position, self._spec, self._value = call, position, spec, value
        self._weight, self._scale = weight, scale = spec[0], spec[3]
        self._made: dict[torch.dtype, _Made] | None = None
        learnt = isinstance(scale, Tensor)
        self._quick = not (call.traced or learnt or weight.is_inference() or value.is_inference())
        self._versions = (weight._version, 0) if self._quick else _versions(weight, scale, call.traced)

    def of_every_thread(self) -> CachedWeight:
        """The same for a replica, whose thread is none that has opened a step."""
        return CachedWeight(self.call._replace(thread=None), self.position, self._spec, self._value)

    def vectors(self) -> Vectors:
        """(u, v) by view."""
        return self.call.vectors.of(self.position)

    def usual(self, weight: Tensor, scale: Tensor | float) -> Tensor | None:
        """The W̄ made as the step began if a few quick questions can tell that it is right for this use of this thread;
        not inside of compiled code."""
        if (
            self._quick
            and self._weight is weight
            and self._scale is scale
            and weight._version == self._versions[0]
            and weight.dtype is self._value.dtype
            and (weight.requires_grad is self._value.requires_grad or not torch.is_grad_enabled())
            and self.call[1] == threading.get_ident()
            and not (recomputation.in_backward() or recomputation.uses.active or torch_private.any_autocast())
        ):
            return self._value
        return None

    def get(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype, compiling: bool) -> Tensor:
        """The W̄ that was made of these, until one of them is another one or has changed in place, or until the graph
        that is wanted is not the one that was made; then one made anew with the vectors of the step."""
        # A graph cannot ask whether a weight has changed since the step began, unless the step is in the graph.
        if (compiling and not self.call.traced) or (not compiling and recomputation.has_own_graph()):
            return self._make(weight, scale, dtype)
        if self._made is None:
            self._made = {self._spec.dtype: (self._weight, self._scale, self._versions, self._value)}
        versions = _versions(weight, scale, compiling)
        made = self._made.get(dtype)
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
        value = self._make(weight, scale, dtype)
        self._made[dtype] = (weight, scale, versions, value)
        return value

    def _make(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        checks.weight(weight, "weight")
        return make(self._spec._replace(weight=weight, vectors=self.vectors(), scale=scale, dtype=dtype))


def make(spec: WeightSpec) -> Tensor:
    """W̄ of vectors that stay as they are."""
    device = spec.weight.device
    if any(u.device != device for u, _ in spec.vectors.values()):  # of a replica
        moved = {view: (u.to(device), v.to(device)) for view, (u, v) in spec.vectors.items()}
        spec = spec._replace(vectors=moved)
    with recomputation.unseen_by_checkpoints():
        return normalize.normalize(spec, 0, False)[0]


def in_force(cached: Sequence[CachedWeight], compiling: bool) -> CachedWeight | None:
    """Of those that last, the newest of this thread; else the newest of all, for the threads of replicas and of
    backward, which have none of their own. None if there are none, as when another thread's has just ended."""
    newest = cached[-1] if cached else None
    if newest is None:
        return None
    thread = newest.call.thread
    if compiling or thread is None or thread == threading.get_ident():
        return newest
    return next((each for each in reversed(cached) if _is_of_this_thread(each)), newest)


def of_this_thread(cached: Sequence[CachedWeight]) -> bool:
    """Whether one of those that last was opened by this thread."""
    return bool(cached) if torch.compiler.is_compiling() else any(map(_is_of_this_thread, cached))


def of_a_step(cached: Sequence[CachedWeight]) -> CachedWeight | None:
    """The newest that a step has opened, in any thread."""
    return next((each for each in reversed(cached) if each.call.shared), None)


def _is_of_this_thread(cached: CachedWeight) -> bool:
    return cached.call.thread in (None, threading.get_ident())


def _versions(weight: Tensor, scale: Tensor | float, traced: bool) -> tuple[int, int]:
    """Counters of the changes in place; 0 for what counts none."""
    tensors = (weight, scale)
    first, second = [0 if traced or not isinstance(x, Tensor) or x.is_inference() else x._version for x in tensors]
    return first, second
