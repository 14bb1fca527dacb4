"""Activation checkpointing: which vectors a region gets that backward runs again."""

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

_Record = tuple[object, UsedVectors, int]  # the norm, the vectors of the call, the position of the norm's in it


class State(threading.local):
    """What this thread records, for every region that it is in, and what it replays."""

    active = False  # either of them
    recording: tuple[list[_Record], ...] = ()
    replaying: Iterator[_Record] | None = None
    backward = -1  # the one that the regions are in: what a backward in them runs again is not theirs


state = State()


class _Scope:
    """Sets what is recorded and replayed for a block; may be entered again, one block after another."""

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
    """Give each use of a norm in a checkpointed region the vectors of its forward again, when backward runs it::

        y = torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False, context_fn=fastsn.recompute)

    Without it, a region that backward runs again gets the vectors that are in force then: those of the step (or fused
    forward) that it runs in, else those that are stored. These are the vectors of its forward if both are in one step,
    and wherever one forward is followed by its backward, fused or not. ``context_fn`` is for everything else: two
    forwards (or two uses of a layer that is not fused) before one backward, a backward after its step with
    ``advance=False`` or inside of a later step. In any case no norm iterates in a backward, and none stores.

    Regions may contain regions, steps and fused forwards. A backward that a region itself starts is not recorded.

    Returns:
        The contexts of the forward and of the recomputation, as ``context_fn`` has to.

    Raises:
        RuntimeError, from the backward: the region uses other norms when it runs again.
    """
    made: list[_Record] = []

    def recording() -> tuple[tuple[list[_Record], ...], Iterator[_Record] | None]:
        around = current_region()
        return ((made,), None) if around is None else ((*around.recording, made), around.replaying)

    # Regions around a region that runs again do not see it: they start its backward themselves when they run again.
    return _Scope(recording), _Scope(lambda: ((), iter(made)))


def current_region() -> State | None:
    """What is recorded or replayed here; None if nothing is."""
    return state if state.active and state.backward == torch_private.backward_id() else None


def record(norm: object, vectors: UsedVectors, position: int) -> None:
    """A use, for every region around."""
    for region in state.recording:
        region.append((norm, vectors, position))


def replay(norm: object) -> Vectors:
    """The vectors of the next use, which is one of this norm."""
    assert state.replaying is not None
    recorded, vectors, position = next(state.replaying, (None, UsedVectors([]), 0))
    if recorded is not norm:
        raise RuntimeError("a checkpointed region must use the same norms in the same order when it runs again")
    record(norm, vectors, position)
    return vectors.of(position)


def in_backward() -> bool:
    """Whether this is inside a backward, where a forward is that of a checkpointed region, run again."""
    return torch_private.backward_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Whether it is a reentrant region, which has a backward of its own; others only fill in what the graph lacks."""
    return in_backward() and not torch_private.in_nonreentrant_recomputation()


def hide_from_checkpoint() -> AbstractContextManager[object]:
    """Checkpoints count the tensors that are saved in their region, and W̄ may have been made outside of it in one of
    the two runs: what is saved in here is kept as it is, and not counted."""
    if torch.compiler.is_compiling() or not torch_private.has_saved_tensors_hooks():
        return _NO_HOOKS
    return torch.autograd.graph.saved_tensors_hooks(_detached, _identity)


_NO_HOOKS = nullcontext()


def _detached(saved: Tensor) -> Tensor:
    return saved.detach()  # with its graph, an output that its own node saves would never be freed


def _identity(saved: Tensor) -> Tensor:
    return saved
