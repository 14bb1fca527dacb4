"""How the rows of a weight lie in memory, so that kernels read them in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Arrangement(NamedTuple):
    """``rows`` rows of b·k elements, ``stride`` elements apart. Element (b, k) of a row lies at b·K + k, or, with
    ``kb`` (channels_last), at k·B + b. Not ``turned``: rows are output channels and b input channels; turned
    (ConvTranspose): the other way round, so that u and v change places."""

    rows: int
    b: int
    k: int
    stride: int
    kb: bool
    turned: bool

    @property
    def n(self) -> int:
        """Elements of a row."""
        return self.b * self.k

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return self.rows * self.n

    def order(self) -> tuple[int, bool, bool]:
        """What two tensors of one shape have in common if their rows can be read side by side."""
        return self.rows, self.kb, self.turned


@lru_cache(maxsize=4096)
def arrangement(shape: Sequence[int], strides: Sequence[int], dim: int) -> Arrangement | None:
    """Of a strided tensor whose output channels are dimension ``dim``; None if its rows cannot be read in place."""
    second = 1 if dim == 0 else 0
    o, i, k, step = shape[dim], shape[second], 1, 1
    for d in reversed(range(len(shape))):
        if d in (dim, second) or shape[d] == 1:
            continue
        if k == 1:
            step = strides[d]
        elif strides[d] != step * k:
            return None
        k *= shape[d]
    for turned, kb in ((False, False), (False, True), (True, False), (True, True)):
        rows, b, stride, apart = (
            (i, o, strides[second], strides[dim]) if turned else (o, i, strides[dim], strides[second])
        )
        if (b == 1 or apart == (1 if kb else k)) and (k == 1 or step == (b if kb else 1)):
            return Arrangement(rows, b, k, b * k if rows == 1 else stride, kb, turned)
    return None


@lru_cache(maxsize=4096)
def dense_strides(shape: Sequence[int], strides: Sequence[int], dim: int) -> tuple[int, ...] | None:
    """The strides of ``torch.empty_like`` if rows then lie in the same order, and without gaps; otherwise None."""
    own = arrangement(shape, strides, dim)
    like = torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
    found = arrangement(shape, like, dim)
    same = own is not None and found is not None and own.order() == found.order() and found.stride == found.n
    return like if same else None


def arranged(tensor: Tensor, dim: int, dense: bool = False) -> tuple[Tensor, Arrangement]:
    """The tensor if it can be read in place (``dense``: and a result of the same kind written), otherwise a copy of it,
    output channels first."""
    found = arrangement(tensor.shape, tensor.stride(), dim)
    if found is not None and not (dense and dense_strides(tensor.shape, tensor.stride(), dim) is None):
        return tensor, found
    copy = tensor.movedim(dim, 0).contiguous()
    found = arrangement(copy.shape, copy.stride(), 0)
    assert found is not None
    return copy, found
