"""What fixed vectors serve: one normalised weight for all uses in a step, and the same one again when backward runs a
checkpointed region once more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastsn import jobs
from fastsn.jobs import Fixed, Job
from fastsn.reference import Vectors

REMEMBERED = 16  # holds that have ended, for the backward of their forward


class _Served(NamedTuple):
    weight: Tensor
    scale: Tensor | float
    versions: tuple[int, int]
    value: Tensor


class Hold:
    """The vectors fixed for a while, and the weights made of them so far, by dtype.

    ``begin`` and ``end`` count the nodes of the autograd graph that this thread had made by then: they tell which hold
    a node's forward belonged to. ``end`` is None while it lasts. A single use fixes vectors too, for the backward of
    its forward: without ``made``, its W̄, the hold is over as it begins.
    """

    __slots__ = ("_dim", "_fixed", "_hidden", "_impl", "_made", "_traced", "begin", "end")

    def __init__(self, fixed: Fixed, job: Job, begin: int, made: Tensor | None = None) -> None:
        self.begin = begin
        self.end = begin if made is None else None
        self._fixed, self._dim, self._impl = fixed, job.dim, job.impl
        self._hidden = made is not None
        self._traced = torch.compiler.is_compiling()
        self._made: dict[torch.dtype, _Served] = {}
        if made is not None:
            self._keep(job.weight, job.scale, job.dtype, made)

    def close(self) -> None:
        """Keeps the vectors alone: what has been made of them carries graphs."""
        self.end = torch._C._autograd._get_sequence_nr()
        self._made.clear()

    def distance(self, node: int) -> int:
        """0: the node was made in it; 1: directly before it, as a reentrant checkpoint makes its node before the region
        runs, which makes none; 2: after it, in a region that went on."""
        if self.begin <= node and (self.end is None or node < self.end):
            return 0
        return 1 if node == self.begin - 1 else 2

    def vectors(self) -> Vectors:
        """Those that are fixed."""
        return self._fixed.vectors()

    def serve(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        """The W̄ that was made of these, until one of them is another one or has changed in place, or until the graph
        that is wanted is not the one that was made; then one made anew with the vectors of the hold."""
        # A graph cannot ask whether a weight has changed since the hold was opened, unless that happened in the graph.
        # A reentrant region has a backward of its own, through its own W̄.
        foreign = not self._traced and torch.compiler.is_compiling()
        if foreign or self.end is not None or (not self._traced and run_again() and not _hooks()):
            return self._make(weight, scale, dtype)
        served = self._made.get(dtype)
        if (
            served is not None
            and served.weight is weight
            and (served.scale is scale or (not isinstance(scale, Tensor) and served.scale == scale))
            and served.versions == self._versions(weight, scale)
            and (not torch.is_grad_enabled() or jobs.requires_grad(weight, scale) == served.value.requires_grad)
            and (self._traced or not served.value.is_inference() or torch.is_inference_mode_enabled())
        ):
            return served.value
        return self._keep(weight, scale, dtype, self._make(weight, scale, dtype))

    def _make(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        vectors = self.vectors()
        if any(u.device != weight.device for u, _ in vectors.values()):  # of a replica
            vectors = {view: (u.to(weight.device), v.to(weight.device)) for view, (u, v) in vectors.items()}
        job = Job(weight, self._dim, vectors, scale, dtype, self._impl)
        with hidden_from_checkpoints() if self._hidden else nullcontext():
            return jobs.normalize([job], 0, False)[0].weight

    def _keep(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype, value: Tensor) -> Tensor:
        self._made[dtype] = _Served(weight, scale, self._versions(weight, scale), value)
        return value

    def _versions(self, weight: Tensor, scale: Tensor | float) -> tuple[int, int]:
        return (0, 0) if self._traced else (_version(weight), _version(scale))


class Holds:
    """The holds of one norm: those that last, each of the thread that opened it, and the last ones that have ended."""

    def __init__(self, lasting: Iterable[tuple[int | None, Hold]] = ()) -> None:
        self._lasting = list(lasting)
        self._ended: deque[Hold] = deque(maxlen=REMEMBERED)

    def __bool__(self) -> bool:
        return bool(self._lasting)

    def of_everyone(self) -> Holds:
        """The same for a replica, whose thread is none of those that opened them."""
        return Holds((None, hold) for _, hold in self._lasting)

    def of_this_thread(self) -> bool:
        """Whether one lasts that this thread has opened."""
        if torch.compiler.is_compiling():
            return bool(self._lasting)
        return any(thread in (None, _thread()) for thread, _ in self._lasting)

    def open(self, hold: Hold) -> None:
        """From now on it counts, before those that were opened earlier."""
        self._lasting.append((_thread(), hold))

    def close(self, hold: Hold) -> None:
        """In any order."""
        if self._lasting[-1][1] is hold:
            self._lasting.pop()
        else:
            self._lasting = [entry for entry in self._lasting if entry[1] is not hold]
        if not torch.compiler.is_compiling():
            hold.close()
            self._ended.append(hold)

    def remember(self, fixed: Fixed, job: Job, begin: int) -> None:
        """A single use, in case that backward runs it again."""
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            self._ended.append(Hold(fixed, job, begin))

    def in_force(self) -> Hold | None:
        """What a use is served by: where backward runs a region again, the hold that its forward had; otherwise this
        thread's newest, or the newest of all, so that the threads of replicas and of backward are served too."""
        if torch.compiler.is_compiling():
            return self._lasting[-1][1] if self._lasting else None
        if torch._C._current_graph_task_id() != -1:
            return self._of_the_forward()
        if not self._lasting:
            return None
        me = threading.get_ident()
        for thread, hold in reversed(self._lasting):
            if thread is None or thread == me:
                return hold
        return self._lasting[-1][1]

    def _of_the_forward(self) -> Hold | None:
        """The hold that lasted when the node was made that backward is at; of several the newest."""
        node = torch._C._current_autograd_node()
        at = -1 if node is None else node._sequence_nr()
        known = [hold for hold in (*self._ended, *(hold for _, hold in self._lasting)) if hold.begin - 1 <= at]
        if not known:
            return self._lasting[-1][1] if self._lasting else None
        return min(known, key=lambda hold: (hold.distance(at), -hold.begin))


def run_again() -> bool:
    """Whether this is inside a backward, where a forward is that of a checkpointed region, run once more."""
    return torch._C._current_graph_task_id() != -1 if not torch.compiler.is_compiling() else False


def nodes() -> int:
    """How many nodes of autograd graphs this thread has made."""
    return 0 if torch.compiler.is_compiling() else torch._C._autograd._get_sequence_nr()


def hidden_from_checkpoints() -> AbstractContextManager[object]:
    """For making W̄ where uses of it lie in a checkpointed region, which counts the tensors that are saved in it: when
    it runs again, W̄ may already be there. What is saved in here is kept as it is."""
    if torch.compiler.is_compiling() or not _hooks():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _hooks() -> bool:
    """Whether somebody sees the tensors that are saved here, as checkpoints do that are not reentrant."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _thread() -> int | None:
    return None if torch.compiler.is_compiling() else threading.get_ident()


def _version(x: Tensor | float) -> int:
    return 0 if not isinstance(x, Tensor) or x.is_inference() else x._version
