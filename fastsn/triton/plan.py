"""What the plans of all launches are made of.

A plan is made once per list of shapes and holds what does not depend on where tensors are: tiles, work lists, offsets.
The table of addresses is looked up at every call, so that a tensor that has moved is found again, and nothing is sent
to the device once all are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastsn.triton import memory
from fastsn.triton.arrangement import Arrangement, arranged
from fastsn.triton.settings import Tiles, vector_width

TYPES = {torch.float16: tl.float16, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


class Prepared(NamedTuple):
    """What serves an op for all lists of tensors like those that it was prepared for."""

    device: torch.device

    run: Callable[..., Any]
    """Called with a key of where the tensors of the lists lie, and then as the op is."""

    again: Callable[..., Sequence[Tensor] | None] | None
    """Launches that write to results that are allocated already: called with keys of where the tensors of the lists,
    and the results, lie, with all of their addresses or None, and with the op's ``sigma``, ``vectors`` and
    ``grad_sigma``. Gives what the op has beside the allocated results, or None where addresses are needed, as these
    places were not seen before. There is none where tensors must be copied first."""


class Weight(NamedTuple):
    """What a plan knows of a tensor."""

    arrangement: Arrangement
    dtype: torch.dtype
    aligned: bool

    def vector_width(self, tiles: Tiles) -> int:
        """Elements of a wide load of its rows."""
        return vector_width(self.arrangement, self.dtype.itemsize, self.aligned, tiles)

    def flat_width(self) -> int:
        """The same for one that is read from end to end."""
        width = 16 // self.dtype.itemsize
        return width if self.aligned and self.arrangement.numel % width == 0 and not self.strided() else 1

    def strided(self) -> bool:
        """Whether there is anything between its rows."""
        return self.arrangement.stride != self.arrangement.n


def described(tensor: Tensor, dim: int, dense: bool = False) -> tuple[Tensor, Weight]:
    """The tensor, or a copy whose rows can be read, and how. ``dense``: results of its kind can be written, too."""
    place, found = arranged(tensor, dim, dense)
    return place, Weight(found, tensor.dtype, place.data_ptr() % 16 == 0)


class Kinds:
    """The different ways of a launch's programs, numbered."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], int] = {}

    def number(self, kind: tuple[Any, ...]) -> int:
        """Of a kind."""
        return self.found.setdefault(kind, len(self.found))


@dataclass
class Launch:
    """A grid and its work list."""

    work: list[int] = field(default_factory=list)
    programs: int = 0

    def add(self, *item: int) -> None:
        """A program."""
        self.work.extend(item)
        self.programs += 1

    def sent(self, device: torch.device) -> memory.Sent:
        """The work list on the device."""
        return memory.Sent(memory.host(self.work, torch.int32), memory.now(device))


class Kernel:
    """A Triton kernel with the constants of a plan.

    The first launch goes through Triton's JIT. The ones that follow go to the program that it compiled, as Triton's
    tutorial on fused softmax launches one: the JIT would go through all arguments to find it again. So arguments must
    be of the types of the first launch, and tensors at multiples of 16 bytes, for which the JIT specializes; what
    Triton is told later, to debug or instrument kernels, does not change them.
    """

    def __init__(self, module: ModuleType, name: str, constants: dict[str, Any]) -> None:
        self.module, self.name, self.constants = module, name, constants
        self._values: tuple[Any, ...] = ()
        self._compiled: Any = None

    def launch(self, programs: int, *arguments: Any) -> None:
        """So many programs."""
        if self._compiled is not None:
            self._compiled[programs, 1, 1](*arguments, *self._values)
            return
        kernel = getattr(self.module, self.name)
        compiled = kernel[(programs,)](*arguments, **self.constants)
        if compiled is not None:  # the interpreter compiles nothing
            self._values = tuple([self.constants[name] for name in kernel.arg_names[len(arguments) :]])
            self._compiled = compiled


def aligned(tensor: Tensor) -> Tensor:
    """The tensor without gaps at a multiple of 16 bytes, as ``Kernel`` wants it: a copy, if it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def by_size(weights: Sequence[Weight]) -> list[int]:
    """Large weights first, so that what their last programs do is hidden behind the rest."""
    return sorted(range(len(weights)), key=lambda i: -weights[i].arrangement.numel)


def vector_places(a: Arrangement, view_mask: int) -> tuple[tuple[int, int, int, int], int]:
    """Where p, x, q and z of a weight lie among its own flat vectors (u and v of `out`, u and v of `in`), -1 where
    there is no such view; and how many entries they have."""
    sizes = {1: (a.b, a.rows * a.k), 2: (a.n, a.rows)} if a.turned else {1: (a.rows, a.n), 2: (a.rows * a.k, a.b)}
    found: dict[int, tuple[int, int]] = {}
    end = 0
    for bit in (bit for bit in (1, 2) if view_mask & bit):
        u, v = sizes[bit]
        found[bit] = (end, end + u)
        end += u + v
    row, cls = (found.get(bit, (-1, -1)) for bit in ((2, 1) if a.turned else (1, 2)))
    if a.turned:  # u and v change places
        row, cls = row[::-1], cls[::-1]
    return (*row, *cls), end
