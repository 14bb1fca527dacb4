"""Keys and allocation for whole lists of tensors, needed at every call of the Triton kernels. C++
(csrc/tensor_lists.cpp), where it is built, does the same at a third of the cost."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Output dtypes by the codes that the ops use.
FLOAT32 = 6
DTYPES = {5: torch.float16, FLOAT32: torch.float32, 15: torch.bfloat16}


def identify(tensors: Sequence[Tensor]) -> tuple[Hashable, Hashable]:
    """Two hashable keys: of the layouts (shapes, strides, dtypes, devices, alignment to 16 bytes, whether they
    are inference tensors), and of their addresses. Equal keys mean equal layouts, or addresses. RuntimeError for a
    tensor without strides or storage."""
    return _built("_identify", _identify)(tensors)  # type: ignore[no-any-return]


def allocate(like: Sequence[Tensor], dtypes: Sequence[int]) -> tuple[list[Tensor], Hashable]:
    """``torch.empty_like`` of every tensor, in these dtypes (codes of the ops), and a key of their addresses."""
    return _built("_allocate", _allocate)(like, dtypes)  # type: ignore[no-any-return]


def addresses(*lists: Sequence[Tensor]) -> tuple[int, ...]:
    """A key of the addresses of tensors."""
    return tuple([x.data_ptr() for tensors in lists for x in tensors])


def _identify(tensors: Sequence[Tensor]) -> tuple[Hashable, Hashable]:
    found = [(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15, x.is_inference()) for x in tensors]
    return tuple(found), addresses(tensors)


def _allocate(like: Sequence[Tensor], dtypes: Sequence[int]) -> tuple[list[Tensor], Hashable]:
    results = [torch.empty_like(x, dtype=DTYPES[code]) for x, code in zip(like, dtypes, strict=True)]
    return results, addresses(results)


@cache
def _built(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The op of this name, or the Python function if the C++ kernels are not built."""
    found = getattr(torch.ops.fastsn, name, None)
    return otherwise if found is None else found.default
