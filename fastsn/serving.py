"""What a step serves: one normalised weight for all its uses, made anew only when the old one would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsn.reference import Vectors


class _Served(NamedTuple):
    inputs: tuple[Tensor | float, ...]
    versions: tuple[int, ...]
    value: Tensor


class Hold:
    """The vectors fixed at a step's start, and the weights made of them so far, by dtype."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self._made: dict[torch.dtype, _Served] = {}

    def serve(self, inputs: tuple[Tensor | float, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """The result of ``make``, kept until one of ``inputs`` is another one or has changed in place, or until the
        graph that is wanted is not the one that was made."""
        if torch.compiler.is_compiling():  # a graph cannot ask whether a weight has changed: make it anew, fused
            return make()
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        versions = tuple(0 if t.is_inference() else t._version for t in tensors)
        wants_graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        served = self._made.get(dtype)
        if (
            served is None
            or not all(map(_same, inputs, served.inputs))
            or served.versions != versions
            or (torch.is_grad_enabled() and wants_graph != served.value.requires_grad)
            or (served.value.is_inference() and not torch.is_inference_mode_enabled())
        ):
            served = self._made[dtype] = _Served(inputs, versions, make())
        return served.value


def _same(a: Tensor | float, b: Tensor | float) -> bool:
    return a is b or (isinstance(a, float) and isinstance(b, float) and a == b)
