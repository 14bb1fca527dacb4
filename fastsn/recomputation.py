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

_Use = tuple[object, UsedVectors, int]  # the norm, the vectors of the call, the position of the norm's in it


class Uses(threading.local):
    """What this thread records, for every region that it is in, and what it replays."""

    active = False  # either of them
    recording: tuple[list[_Use], ...] = ()
    replaying: Iterator[_Use] | None = None


uses = Uses()


class _Set:
    """Sets ``recording`` or ``replaying`` for a block; may be entered again, one block after another."""

    def __init__(self, name: str, value: Callable[[], Any]) -> None:
        self._name, self._value = name, value

    def __enter__(self) -> None:
        self._before = getattr(uses, self._name)
        self._set(self._value())

    def __exit__(self, *_: object) -> None:
        self._set(self._before)

    def _set(self, value: Any) -> None:
        setattr(uses, self._name, value)
        uses.active = bool(uses.recording) or uses.replaying is not None


def recompute() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Give each use of a norm in a checkpointed region the vectors of its forward again, when backward runs it::

        y = torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False, context_fn=fastsn.recompute)

    Without it, a region that backward runs again gets the vectors that are in force then: those of the step or of the
    fused forward that it runs in, else those that are stored. These are the same as in its forward within a step, with
    ``fuse``, and wherever one forward is followed by its backward; ``context_fn`` is for everything else, such as two
    forwards before one backward. In any case no norm iterates in a backward.

    Returns:
        The contexts of the forward and of the recomputation, as ``context_fn`` has to.

    Raises:
        RuntimeError, from the backward: the region uses other norms when it runs again.
    """
    made: list[_Use] = []
    return _Set("recording", lambda: (*uses.recording, made)), _Set("replaying", lambda: iter(made))


def record(norm: object, vectors: UsedVectors, position: int) -> None:
    """A use, for every region around."""
    for region in uses.recording:
        region.append((norm, vectors, position))


def replay(norm: object) -> Vectors:
    """The vectors of the next use, which is one of this norm."""
    assert uses.replaying is not None
    recorded, vectors, position = next(uses.replaying, (None, UsedVectors([]), 0))
    if recorded is not norm:
        raise RuntimeError("a checkpointed region must use the same norms in the same order when it runs again")
    record(norm, vectors, position)
    return vectors.of(position)


def in_backward() -> bool:
    """Whether this is inside a backward, where a forward is that of a checkpointed region, run again."""
    return torch_private.backward_id() != -1


def has_own_graph() -> bool:
    """Whether it is a reentrant region, which has a backward of its own; others only fill in what the graph lacks."""
    return in_backward() and not torch_private.saved_tensors_are_seen()


def unseen_by_checkpoints() -> AbstractContextManager[object]:
    """Checkpoints count the tensors that are saved in their region, and W̄ may have been made outside of it in one of
    the two runs: what is saved in here is kept as it is, and not counted."""
    if torch.compiler.is_compiling() or not torch_private.saved_tensors_are_seen():
        return _NOTHING
    return torch.autograd.graph.saved_tensors_hooks(_detached, _as_it_is)


_NOTHING = nullcontext()


def _detached(saved: Tensor) -> Tensor:
    return saved.detach()  # with its graph, an output that its own node saves would never be freed


def _as_it_is(saved: Tensor) -> Tensor:
    return saved
