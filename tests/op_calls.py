"""Arguments for the list ops, drawn for any list of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsn import ops, reference, views
from shapes import TABLE, laid_out

BITS = tuple(ops.VIEW_BITS.values())


@dataclass
class Call:
    """The lists that the ops take, for the same weights."""

    weights: list[Tensor]
    dims: list[int]
    view_masks: list[int]
    v_first: list[int]
    u: list[Tensor]
    v: list[Tensor]
    scales: list[Tensor]
    scale_index: list[int]
    scale_factor: list[float]
    dtypes: list[int]

    def iterate(self, n: int = 1, in_place: bool = False) -> tuple[Tensor, Tensor]:
        op = ops.power_iteration_ if in_place else ops.power_iteration
        return op(*self.iteration(), n)

    def iteration(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int], list[int], list[int]]:
        return self.weights, self.u, self.v, self.dims, self.view_masks, self.v_first

    def numbers(self) -> tuple[list[int], list[int], list[int], list[float], list[int]]:
        return self.dims, self.view_masks, self.scale_index, self.scale_factor, self.dtypes

    def rescale(self, sigma: Tensor, vectors: Tensor) -> tuple[list[Tensor], Tensor]:
        return ops.rescale(self.weights, self.scales, sigma, vectors, *self.numbers())

    def exact(self) -> Call:
        """The same numbers in float64."""
        lists = [[x.detach().double() for x in values] for values in (self.weights, self.u, self.v, self.scales)]
        weights, u, v, scales = lists
        dtypes = [ops.DTYPE_CODES[torch.float64]] * len(weights)
        return replace(self, weights=weights, u=u, v=v, scales=scales, dtypes=dtypes)


def call(
    weights: Sequence[Tensor],
    dims: Sequence[int],
    bits: Sequence[int] | int = 3,
    scale: str = "float",
    v_first: Sequence[int] | int = 0,
) -> Call:
    """Unit vectors for the views in ``bits``; ``scale``: "float", or "tensor" for one that all weights share."""
    count = len(weights)
    bits, orders = ([x] * count if isinstance(x, int) else list(x) for x in (bits, v_first))
    u, v = [], []
    for w, dim, wanted in zip(weights, dims, bits, strict=True):
        oik = views.as_oik(w.detach(), dim)
        for view in (view for view, bit in ops.VIEW_BITS.items() if wanted & bit):
            for vectors, size in zip((u, v), views.vector_sizes(oik, view), strict=True):
                vectors.append(F.normalize(torch.randn(size, dtype=reference.wide(w.dtype)), dim=0))
    shared = scale == "tensor"
    scales = [torch.tensor(1.7, dtype=reference.wide(weights[0].dtype))] if shared else []
    return Call(
        list(weights), list(dims), bits, orders, u, v, scales, [0 if shared else -1] * count, [1.3] * count,
        [ops.DTYPE_CODES[w.dtype] for w in weights],
    )  # fmt: skip


def alternating(count: int, first: int = 0) -> list[int]:
    """``v_first`` of a list of both orders."""
    return [(first + i) % 2 for i in range(count)]


def table(dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> tuple[list[Tensor], list[int]]:
    """The weights of the shape table, and where their output channels are."""
    layers = [case.build() for case in TABLE]
    drawn = [torch.randn(layer.weight.shape, dtype=torch.float64).to(dtype) for layer in layers]
    return [laid_out(w, layout) for w in drawn], [views.output_dim(layer) for layer in layers]


def larger() -> tuple[list[Tensor], list[int]]:
    """Weights of many blocks, channels_last and output channels second among them."""
    shapes = [(70, 33, 3, 3), (40, 64, 4, 4), (24, 50, 7), (129, 257), (1, 5000), (33, 20, 3, 3)]
    weights = [torch.randn(shape) for shape in shapes]
    weights[1] = weights[1].contiguous(memory_format=torch.channels_last)
    return weights, [0, 0, 0, 0, 0, 1]
