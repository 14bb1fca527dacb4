"""Keys and allocation for the arguments of every call of the Triton kernels. C++ (csrc/triton_calls.cpp), where it is
built, does the same at a third of the cost."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

# Output dtypes by the codes that the ops use.
FLOAT32 = 6
DTYPES = {5: torch.float16, FLOAT32: torch.float32, 15: torch.bfloat16}


def identify(op: str, arguments: Sequence[Any]) -> tuple[Hashable, Hashable]:
    """Two hashable keys of the arguments of an op: of their layout (numbers; shapes, strides, dtypes and devices of
    tensors, whether they are inference tensors, their alignment to 16 bytes), and of the addresses of the tensors in
    lists. Equal keys mean the same op and equal layouts, or equal addresses. RuntimeError for a tensor without strides
    or storage."""
    return _built(f"_identify_{op}", partial(_identify, op))(*arguments)  # type: ignore[no-any-return]


def repeatable(kind: Hashable) -> None:
    """Tell C++ that calls with the first key that ``identify`` gave may come to ``_launch`` of fastsn/ops/cuda.py."""
    _built("_mark_as_prepared", lambda _: None)(kind)


def allocate(like: Sequence[Tensor], dtypes: Sequence[int]) -> tuple[list[Tensor], Hashable]:
    """``torch.empty_like`` of every tensor, in these dtypes (codes of the ops), and a key of their addresses."""
    return _built("_allocate", _allocate)(like, dtypes)  # type: ignore[no-any-return]


def addresses(*lists: Sequence[Tensor]) -> tuple[int, ...]:
    """A key of the addresses of tensors."""
    return tuple([x.data_ptr() for tensors in lists for x in tensors])


def _identify(op: str, *arguments: Any) -> tuple[Hashable, Hashable]:
    lists = [x for x in arguments if isinstance(x, list | tuple)]
    kind = [_look(x) for x in arguments if not isinstance(x, list | tuple)]
    kind += [tuple([_look(x) for x in each]) for each in lists]
    return (op, *kind), addresses(*[each for each in lists if each and isinstance(each[0], Tensor)])


def _look(x: Any) -> Hashable:
    if not isinstance(x, Tensor):
        return x  # type: ignore[no-any-return]
    return x.shape, x.stride(), x.dtype, x.device, x.is_inference(), x.data_ptr() & 15


def _allocate(like: Sequence[Tensor], dtypes: Sequence[int]) -> tuple[list[Tensor], Hashable]:
    results = [torch.empty_like(x, dtype=DTYPES[code]) for x, code in zip(like, dtypes, strict=True)]
    return results, addresses(results)


def are_built() -> bool:
    """Whether C++ does it."""
    return _op("_allocate") is not None


@cache
def _op(name: str) -> Callable[..., Any] | None:
    found = getattr(torch.ops.fastsn, name, None)
    return None if found is None else found.default


def _built(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The op of this name, or the Python function if the C++ kernels are not built."""
    return _op(name) or otherwise
