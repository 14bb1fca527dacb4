"""Activation checkpointing: the u and v that a region uses when backward recomputes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastsn import torch_private
from fastsn.normalize import UsedVectors
from fastsn.reference import Vectors

_Record = tuple[object, UsedVectors, int]  # the norm, the vectors of the call, the index of its weight in the call


class State(threading.local):
    """Of this thread: the records of all enclosing regions, and the record being replayed."""

    active = False  # recording or replaying
    recording: tuple[list[_Record], ...] = ()
    replaying: Iterator[_Record] | None = None
    backward = -1  # id of the backward around the regions: recomputations of a nested backward are not recorded


state = State()


class _Scope:
    """Sets ``state`` for a block; may be entered repeatedly, but not nested."""

    def __init__(self, values: Callable[[], tuple[tuple[list[_Record], ...], Iterator[_Record] | None]]) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._before = state.active, state.recording, state.replaying, state.backward
        recording, replaying = self._values()
        self._set(True, recording, replaying, torch_private.backward_id())

    def __exit__(self, *_: object) -> None:
        self._set(*self._before)

    def _set(self, *values: Any) -> None:
        state.active, state.recording, state.replaying, state.backward = values


def recompute() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` for checkpoints: norms in a recomputed region use the u and v of its original forward::

        y = torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False, context_fn=fastsn.recompute)

    Without it, a recomputed region uses the vectors that are current during backward: those of the active step (or
    fused forward), else the stored ones. They equal those of the original forward within one step, and wherever each
    forward is followed by its backward, fused or not. Everything else needs ``context_fn``: two forwards (or two uses
    of a layer that is not fused) before one backward; a backward after its step if that had ``advance=False``, or
    inside a later step. With or without it, no norm iterates or stores vectors during backward.

    Regions may contain regions, steps and fused forwards. Recomputations in a backward that a region itself starts are
    not recorded.

    Returns:
        The context managers for the forward and for the recomputation.

    Raises:
        RuntimeError, from backward: the recomputation uses other norms than the forward did.
    """
    made: list[_Record] = []

    def recording() -> tuple[tuple[list[_Record], ...], Iterator[_Record] | None]:
        around = current_region()
        return ((made,), None) if around is None else ((*around.recording, made), around.replaying)

    # A recomputation is not recorded for enclosing regions: their own recomputation starts this backward again.
    return _Scope(recording), _Scope(lambda: ((), iter(made)))


def current_region() -> State | None:
    """The state if this code is in a region that is recorded or replayed, else None."""
    return state if state.active and state.backward == torch_private.backward_id() else None


def record(norm: object, vectors: UsedVectors, position: int) -> None:
    """Record a use of a norm for all enclosing regions."""
    for region in state.recording:
        region.append((norm, vectors, position))


def replay(norm: object) -> Vectors:
    """The recorded vectors of the next use; RuntimeError if it was of another norm."""
    assert state.replaying is not None
    recorded, vectors, position = next(state.replaying, (None, UsedVectors([]), 0))
    if recorded is not norm:
        raise RuntimeError("a checkpointed region must use the same norms in the same order when it runs again")
    record(norm, vectors, position)
    return vectors.of(position)


def in_backward() -> bool:
    """Whether this thread is in a backward: a forward is then the recomputation of a checkpointed region."""
    return torch_private.backward_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Whether this is a recomputation with ``use_reentrant=True``, which builds its own graph."""
    return in_backward() and not torch_private.in_nonreentrant_recomputation()


def hide_from_checkpoint() -> AbstractContextManager[object]:
    """Hide the tensors saved for backward in this context from checkpoints. Those compare the tensors saved by forward
    and recomputation, but W̄ may be computed inside the region in one and taken from a cache in the other."""
    if torch.compiler.is_compiling() or not torch_private.has_saved_tensors_hooks():
        return _NO_HOOKS
    return torch.autograd.graph.saved_tensors_hooks(_detached, _identity)


_NO_HOOKS = nullcontext()


def _detached(saved: Tensor) -> Tensor:
    return saved.detach()  # a node that saves its own output would otherwise be a reference cycle


def _identity(saved: Tensor) -> Tensor:
    return saved
