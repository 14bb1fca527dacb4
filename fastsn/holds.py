"""The holds of one norm: which of them serves a use."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from fastsn.jobs import Fixed, Job
from fastsn.serving import Hold, region

REMEMBERED = 16  # holds that have ended, for the backward of their forward


class _Lasting(NamedTuple):
    """``thread``: the one that opened it, None for all. ``shared``: it is a step's, whose vectors forwards of fused
    models in threads that have opened none take, instead of moving them."""

    thread: int | None
    hold: Hold
    shared: bool


class Holds:
    """The holds of one norm: those that last, each of the thread that opened it, and the last ones that have ended."""

    def __init__(self, lasting: Iterable[_Lasting] = ()) -> None:
        self._lasting = list(lasting)
        self._ended: deque[Hold] = deque(maxlen=REMEMBERED)
        self._again: deque[Hold] = deque(maxlen=REMEMBERED)  # for regions in regions; they must not push out the others
        self._forgotten = -1  # begin of the newest that is in neither
        self._asked: tuple[Any, int] = (None, 0)

    def of_everyone(self) -> Holds:
        """The same for a replica, whose thread is none of those that opened them."""
        return Holds(entry._replace(thread=None) for entry in self._lasting)

    def of_this_thread(self) -> bool:
        """Whether one lasts that this thread has opened."""
        if torch.compiler.is_compiling():
            return bool(self._lasting)
        me = _thread()
        return any(entry.thread in (None, me) for entry in self._lasting)

    def of_another_thread(self) -> Hold | None:
        """The newest step's."""
        return next((entry.hold for entry in reversed(self._lasting) if entry.shared), None)

    def open(self, hold: Hold, shared: bool) -> None:
        """From now on it counts, before those that were opened earlier."""
        self._lasting.append(_Lasting(_thread(), hold, shared))

    def close(self, hold: Hold) -> None:
        """In any order."""
        if self._lasting[-1].hold is hold:
            self._lasting.pop()
        else:
            # Other threads open and close theirs meanwhile: each step has to be one for the interpreter.
            self._lasting.remove(next(entry for entry in list(self._lasting) if entry.hold is hold))
        if not torch.compiler.is_compiling():
            hold.close()
            self._remember(hold)

    def remember(self, fixed: Fixed, job: Job, begin: int) -> None:
        """A single use, in case that backward runs it again."""
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            self._remember(Hold(fixed, job, begin))

    def _remember(self, hold: Hold) -> None:
        if hold.task != -1:
            self._again.append(hold)
            return
        self._again.clear()
        if len(self._ended) == REMEMBERED:
            self._forgotten = self._ended[0].begin
        self._ended.append(hold)

    def in_force(self) -> Hold | None:
        """What a use is served by: where backward runs a region again, the hold that its forward had; otherwise this
        thread's newest, or the newest of all, so that the threads of replicas and of backward are served too."""
        if torch.compiler.is_compiling():
            return self._lasting[-1].hold if self._lasting else None
        task = torch._C._current_graph_task_id()
        if task == -1 and not self._lasting:
            return None
        me, mine = threading.get_ident(), None
        for thread, hold, _ in reversed(self._lasting):
            if thread is None or thread == me:
                mine = hold
                break
        if task != -1 and (mine is None or mine.task != task):
            found = self.of_the_forward()
            if found is not None and found.end is not None:
                self._again.append(found.repeated())
            return found
        return mine if mine is not None or not self._lasting else self._lasting[-1].hold

    def of_the_forward(self) -> Hold | None:
        """Inside a backward, the hold that the forward had of the region that runs once more. Where a region has had
        several, each call gives the next."""
        node, here = torch._C._current_autograd_node(), region()
        at = -1 if node is None else node._sequence_nr()
        # A backward's nodes were made before it began. What begins in it has numbers of its own where another thread
        # runs it, as on a GPU.
        task = torch._C._current_graph_task_id()
        again = (hold for hold in self._again if hold.task != task)
        known = sorted((*self._ended, *again, *(entry.hold for entry in self._lasting)), key=lambda hold: hold.begin)
        before = [hold for hold in known if hold.begin <= at]
        newest = next((hold for hold in reversed(before) if hold.around(at)), before[-1] if before else None)
        if here is None and isinstance(node, torch.autograd.function.FunctionCtx):
            # A reentrant checkpoint makes its node, then runs the region, which makes none that is differentiated.
            forgotten = at < self._forgotten
            own = [] if newest is not None and newest.around(at) else [hold for hold in known if hold.begin > at]
        else:
            # What needs a tensor of a region that is not reentrant is a node of the region.
            forgotten = newest is None and self._forgotten != -1
            own = [h for h in known if h.region == newest.region] if newest is not None and newest.region else []
        if forgotten:
            warnings.warn(
                f"backward runs a region again whose forward was more than {REMEMBERED} uses of a norm ago: its "
                "vectors are no longer known, the gradient will be that of later ones",
                stacklevel=2,
            )
            return newest or known[0]
        if not own:
            return newest or (self._lasting[-1].hold if self._lasting else None)
        key = (task, at, here)
        count = self._asked[1] + 1 if self._asked[0] == key else 0
        self._asked = (key, count)
        return own[min(count, len(own) - 1)]


def _thread() -> int | None:
    return None if torch.compiler.is_compiling() else threading.get_ident()
