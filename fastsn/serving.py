"""What fixed vectors serve: one normalized weight for all uses in a step, and the same one again when backward runs a
checkpointed region once more."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsn import checks, jobs
from fastsn.jobs import Fixed, Job
from fastsn.reference import Vectors


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
        self.region = None if self._traced else region()
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
        again.region, again.task = region(), torch._C._current_graph_task_id()
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
        return task not in (-1, self.task) and region() is None

    def _make(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        checks.weight(weight, "weight")
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


def region() -> weakref.ref[Any] | None:
    """What stands for the checkpoint that this runs in, for the first time or again, unless it is reentrant."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return weakref.ref(hooks[0]) if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint" else None


def _detached(saved: Tensor) -> Tensor:
    return saved.detach()  # with its graph, an output that its own node saves would never be freed


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _version(x: Tensor | float) -> int:
    return 0 if not isinstance(x, Tensor) or x.is_inference() else x._version
