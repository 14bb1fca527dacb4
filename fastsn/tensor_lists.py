"""What is asked of the arguments of every call of the Triton kernels. Where it has been built, C++
(csrc/tensor_lists.cpp) does the same at a third of the cost."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# The numbers of the ops for what kernels write.
FLOAT32 = 6
DTYPES = {5: torch.float16, FLOAT32: torch.float32, 15: torch.bfloat16}


def identify(op: str, arguments: Sequence[Any]) -> tuple[Hashable, Hashable]:
    """What arguments of an op look like (its numbers; shapes, strides, dtypes, devices of tensors, whether they were
    made in inference mode, alignment to 16 bytes of those in lists) and where the tensors of its lists lie: two keys,
    each the same for the same and, among calls of this op, never for anything else. Raises RuntimeError for a tensor
    without strides or storage."""
    return _built(f"_identify_{op}", _identify)(*arguments)  # type: ignore[no-any-return]


def allocate(like: Sequence[Tensor], dtypes: Sequence[int]) -> tuple[list[Tensor], Hashable]:
    """``torch.empty_like`` of every tensor, in these dtypes (numbers of the ops), and a key of where they lie."""
    return _built("_allocate", _allocate)(like, dtypes)  # type: ignore[no-any-return]


def addresses(*lists: Sequence[Tensor]) -> tuple[int, ...]:
    """A key of where tensors lie, in Python alone."""
    return tuple([x.data_ptr() for tensors in lists for x in tensors])


def _identify(*arguments: Any) -> tuple[Hashable, Hashable]:
    lists = [x for x in arguments if isinstance(x, list | tuple)]
    kind = [_look(x) for x in arguments if not isinstance(x, list | tuple)]
    kind += [tuple([_look(x, isinstance(x, Tensor) and x.data_ptr() & 15) for x in each]) for each in lists]
    return tuple(kind), addresses(*[each for each in lists if each and isinstance(each[0], Tensor)])


def _look(x: Any, alignment: int = 0) -> Hashable:
    return (x.shape, x.stride(), x.dtype, x.device, x.is_inference(), alignment) if isinstance(x, Tensor) else x


def _allocate(like: Sequence[Tensor], dtypes: Sequence[int]) -> tuple[list[Tensor], Hashable]:
    results = [torch.empty_like(x, dtype=DTYPES[code]) for x, code in zip(like, dtypes, strict=True)]
    return results, addresses(results)


@cache
def _built(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The op of this name, or what does the same where the C++ kernels were not built."""
    found = getattr(torch.ops.fastsn, name, None)
    return otherwise if found is None else found.default
