"""What a step serves: one normalised weight for all its uses, made anew only when the old one would be wrong."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsn import jobs
from fastsn.jobs import Job, Normalised


class _Served(NamedTuple):
    weight: Tensor
    scale: Tensor | float
    versions: tuple[int, int]
    value: Tensor


class Hold:
    """The vectors fixed at a step's start, and the weights made of them so far, by dtype."""

    def __init__(self, normalised: Normalised, job: Job) -> None:
        self._normalised, self._job = normalised, job
        self._made: dict[torch.dtype, _Served] = {}
        # Under the compiler every use makes its own: a graph cannot ask whether a weight has changed.
        if not torch.compiler.is_compiling():
            self._keep(job.weight, job.scale, job.dtype, normalised.weight)

    def serve(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        """The W̄ that was made of these, until one of them is another one or has changed in place, or until the graph
        that is wanted is not the one that was made; then one made anew with the vectors of the hold."""
        if torch.compiler.is_compiling():
            return self._make(weight, scale, dtype)
        served = self._made.get(dtype)
        if (
            served is not None
            and served.weight is weight
            and (served.scale is scale or (not isinstance(scale, Tensor) and served.scale == scale))
            and served.versions == (_version(weight), _version(scale))
            and (not torch.is_grad_enabled() or jobs.requires_grad(weight, scale) == served.value.requires_grad)
            and (not served.value.is_inference() or torch.is_inference_mode_enabled())
        ):
            return served.value
        return self._keep(weight, scale, dtype, self._make(weight, scale, dtype))

    def _make(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        vectors = self._normalised.vectors()
        job = self._job._replace(weight=weight, scale=scale, dtype=dtype, vectors=vectors)
        return jobs.normalize([job], 0, False)[0].weight

    def _keep(self, weight: Tensor, scale: Tensor | float, dtype: torch.dtype, value: Tensor) -> Tensor:
        self._made[dtype] = _Served(weight, scale, (_version(weight), _version(scale)), value)
        return value


def _version(x: Tensor | float) -> int:
    return 0 if not isinstance(x, Tensor) or x.is_inference() else x._version
