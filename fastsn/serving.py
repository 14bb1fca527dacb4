"""What a step serves: one normalised weight for all its uses, made anew only when the old one would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsn.reference import Vectors


class _Served(NamedTuple):
    source: Tensor
    versions: tuple[int, ...]
    value: Tensor


class Hold:
    """The vectors fixed at a step's start, and the weights made of them so far, by dtype."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self._made: dict[torch.dtype, _Served] = {}

    def serve(self, inputs: tuple[Tensor, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """The result of ``make``, kept until one of ``inputs`` (the weight first) is another tensor or has changed in
        place, or until the graph that is wanted is not the one that was made."""
        if torch.compiler.is_compiling():  # a graph cannot ask whether a weight has changed: make it anew, fused
            return make()
        versions = tuple(0 if t.is_inference() else t._version for t in inputs)
        wants_graph = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        served = self._made.get(dtype)
        if (
            served is None
            or served.source is not inputs[0]
            or served.versions != versions
            or (torch.is_grad_enabled() and wants_graph != served.value.requires_grad)
            or (served.value.is_inference() and not torch.is_inference_mode_enabled())
        ):
            served = self._made[dtype] = _Served(inputs[0], versions, make())
        return served.value
