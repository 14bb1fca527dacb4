"""What a step serves: one normalised weight for all its uses, made anew only when the old one would be wrong."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsn import jobs
from fastsn.jobs import Job, Normalised


class _Served(NamedTuple):
    inputs: tuple[Tensor | float, ...]
    versions: tuple[int, ...]
    value: Tensor


class Hold:
    """The vectors fixed at a step's start, and the weights made of them so far, by dtype."""

    def __init__(self, normalised: Normalised, job: Job) -> None:
        self._first = (normalised, job)
        # Under the compiler every use makes its own: a graph cannot ask whether a weight has changed.
        self._made = {} if torch.compiler.is_compiling() else {job.dtype: _served(job, normalised.weight)}

    def serve(self, job: Job) -> Tensor:
        """The weight that was made for such a job, until its weight or scale is another one or has changed in place, or
        until the graph that is wanted is not the one that was made; then one made anew with the vectors of the hold."""
        if torch.compiler.is_compiling():
            return self._make(job)
        served, wanted = self._made.get(job.dtype), _served(job, job.weight)
        wants_graph = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in wanted.inputs)
        if (
            served is None
            or not all(map(_same, wanted.inputs, served.inputs))
            or served.versions != wanted.versions
            or (torch.is_grad_enabled() and wants_graph != served.value.requires_grad)
            or (served.value.is_inference() and not torch.is_inference_mode_enabled())
        ):
            served = self._made[job.dtype] = wanted._replace(value=self._make(job))
        return served.value

    def _make(self, job: Job) -> Tensor:
        normalised, first = self._first
        return jobs.normalize([job._replace(vectors=normalised.vectors(first))], 0, False)[0].weight


def _served(job: Job, value: Tensor) -> _Served:
    inputs = (job.weight, job.scale)
    return _Served(inputs, tuple(_version(x) for x in inputs if isinstance(x, Tensor)), value)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(a: Tensor | float, b: Tensor | float) -> bool:
    return a is b or (isinstance(a, float) and isinstance(b, float) and a == b)
