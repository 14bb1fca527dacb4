"""What fixed vectors serve: one normalised weight for all uses in a step, and the same one again when backward runs a
checkpointed region once more."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

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
    its forward: without ``made``, its W̄, the hold is over as it begins. ``region``: the checkpoint that it began in, if
    that is not reentrant. ``task``: the backward that it began in, -1 outside.
    """

    __slots__ = ("_dim", "_fixed", "_hidden", "_impl", "_made", "_traced", "begin", "end", "region", "task")

    def __init__(self, fixed: Fixed, job: Job, begin: int, made: Tensor | None = None) -> None:
        self.begin = begin
        self.end = begin if made is None else None
        self._fixed, self._dim, self._impl = fixed, job.dim, job.impl
        self._hidden = made is not None
        self._traced = torch.compiler.is_compiling()
        self.region = None if self._traced else _region()
        self.task = -1 if self._traced else torch._C._current_graph_task_id()
        self._made: dict[torch.dtype, _Served] = {}
        if made is not None:
            self._keep(job.weight, job.scale, job.dtype, made)

    def close(self) -> None:
        """Keeps the vectors alone: what has been made of them carries graphs."""
        self.end = torch._C._autograd._get_sequence_nr()
        self._made.clear()

    def repeated(self) -> Hold:
        """A single use of the same vectors, now."""
        again = Hold.__new__(Hold)
        again.begin = again.end = torch._C._autograd._get_sequence_nr()
        again._fixed, again._dim, again._impl, again._hidden = self._fixed, self._dim, self._impl, self._hidden
        again._traced, again._made = False, {}
        again.region, again.task = _region(), torch._C._current_graph_task_id()
        return again

    def around(self, node: int) -> bool:
        """Whether it lasted when the node was made."""
        return self.begin <= node and (self.end is None or node < self.end)

    def vectors(self) -> Vectors:
        """Those that are fixed."""
        return self._fixed.vectors()

    def serve(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        """The W̄ that was made of these, until one of them is another one or has changed in place, or until the graph
        that is wanted is not the one that was made; then one made anew with the vectors of the hold."""
        # A graph cannot ask whether a weight has changed since the hold was opened, unless that happened in the graph.
        foreign = not self._traced and torch.compiler.is_compiling()
        if foreign or self.end is not None or (not self._traced and self._of_another_backward()):
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

    def _of_another_backward(self) -> bool:
        """A reentrant region has a backward of its own, through its own W̄; one that is not only fills in values."""
        task = torch._C._current_graph_task_id()
        return task not in (-1, self.task) and _region() is None

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
        self._again: deque[Hold] = deque(maxlen=REMEMBERED)  # for regions in regions; they must not push out the others
        self._forgotten = -1  # begin of the newest that is in neither
        self._asked: tuple[Any, int] = (None, 0)

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
            # Other threads open and close theirs meanwhile: each step has to be one for the interpreter.
            self._lasting.remove(next(entry for entry in list(self._lasting) if entry[1] is hold))
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
            return self._lasting[-1][1] if self._lasting else None
        task = torch._C._current_graph_task_id()
        if task == -1 and not self._lasting:
            return None
        me, mine = threading.get_ident(), None
        for thread, hold in reversed(self._lasting):
            if thread is None or thread == me:
                mine = hold
                break
        if task != -1 and (mine is None or mine.task != task):
            found = self.of_the_forward()
            if found is not None and found.end is not None:
                self._again.append(found.repeated())
            return found
        return mine if mine is not None or not self._lasting else self._lasting[-1][1]

    def of_the_forward(self) -> Hold | None:
        """Inside a backward, the hold that the forward had of the region that runs once more. Where a region has had
        several, each call gives the next."""
        node, region = torch._C._current_autograd_node(), _region()
        at = -1 if node is None else node._sequence_nr()
        known = sorted((*self._ended, *self._again, *(hold for _, hold in self._lasting)), key=lambda hold: hold.begin)
        before = [hold for hold in known if hold.begin <= at]
        newest = next((hold for hold in reversed(before) if hold.around(at)), before[-1] if before else None)
        if region is None and isinstance(node, torch.autograd.function.FunctionCtx):
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
            return newest or (self._lasting[-1][1] if self._lasting else None)
        key = (torch._C._current_graph_task_id(), at, region)
        count = self._asked[1] + 1 if self._asked[0] == key else 0
        self._asked = (key, count)
        return own[min(count, len(own) - 1)]


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
    return torch.autograd.graph.saved_tensors_hooks(_detached, _as_it_is)


def _hooks() -> bool:
    """Whether somebody sees the tensors that are saved here, as checkpoints do that are not reentrant."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _region() -> weakref.ref[Any] | None:
    """What stands for the checkpoint that this runs in, for the first time or again, unless it is reentrant."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return weakref.ref(hooks[0]) if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint" else None


def _detached(saved: Tensor) -> Tensor:
    return saved.detach()  # with its graph, an output that its own node saves would never be freed


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _thread() -> int | None:
    return None if torch.compiler.is_compiling() else threading.get_ident()


def _version(x: Tensor | float) -> int:
    return 0 if not isinstance(x, Tensor) or x.is_inference() else x._version
