"""One process, or the processes of one run that torchrun starts: which of them this is, and what they do together.

Each process ("rank") takes its part of every batch. Whatever the device, objects and flags travel over gloo and
gradients over the backend of the device (NCCL for GPUs).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class CommonError(ValueError):
    """An error that every process has, so that one of them need say it."""

    others_say_it = True


class LostPeer(ConnectionError):
    """Another process of the run has ended; what it died of is said by itself."""

    others_say_it = True


@dataclass(frozen=True)
class Ranks:
    """rank of size processes; local_rank of local_size on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of a batch of ``count``, a multiple of size."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block of every rank; a ValueError or OSError of any is raised as a CommonError on all."""
        error: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as raised:
            if self.size == 1 or isinstance(raised, LostPeer | CommonError):
                raise
            error = raised
        if self.size == 1:
            return
        said = self._gathered(None if error is None else str(error))
        if any(said):
            whose, what = next((rank, text) for rank, text in enumerate(said) if text)
            everybody = all(text == what for text in said)
            raise CommonError(what if everybody else f"rank {whose}: {what}") from error

    def of_first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the first rank, on all; so with its errors."""
        if self.size == 1:
            return work()
        given: list[Any] = [None]
        with self.together():
            if self.first:
                given = [work()]
        with naming_peers():
            dist.broadcast_object_list(given)
        result: T = given[0]
        return result

    def same(self, what: str, value: Any) -> None:
        """Raises CommonError where a rank has another value than the first."""
        values = self._gathered(value)
        other = next((rank for rank, x in enumerate(values) if x != values[0]), None)
        if other is not None:
            raise CommonError(
                f"{what} must be the same on all ranks, got {_difference(values[0], values[other], other)}"
            )

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. Waits for the other ranks' Python, not for a device."""
        if self.size == 1:
            return flag
        said = torch.tensor(int(flag))
        with naming_peers():
            dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one dtype and device by their means over the ranks: one all-reduce."""
        self._reduce(list(tensors), self.size)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over the ranks: one all-reduce."""
        self._reduce(list(tensors), 1)

    def joined(self, x: Tensor) -> Tensor:
        """Those of all ranks, (n, ...) of each, one after the other."""
        if self.size == 1:
            return x
        found = [torch.empty_like(x) for _ in range(self.size)]
        with naming_peers():
            dist.all_gather(found, x.contiguous())
        return torch.cat(found)

    def _reduce(self, tensors: list[Tensor], divisor: int) -> None:
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        with naming_peers():
            dist.all_reduce(flat)
        if divisor > 1:
            flat /= divisor
        for x, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(part.view(x.shape))

    def check_lockstep(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Raises CommonError, which names the first tensor that is not the same bits on all ranks."""
        if self.size == 1:
            return
        names, held = zip(*tensors, strict=True)
        own = torch.stack([_checksum(x.detach()).to(held[0].device) for x in held])
        found = [torch.empty_like(own) for _ in range(self.size)]
        with naming_peers():
            dist.all_gather(found, own)
        unlike = (torch.stack(found) != found[0]).cpu()
        if unlike.any():
            at = int(unlike.any(0).nonzero()[0])
            whose = ", ".join(str(int(rank)) for rank in unlike[:, at].nonzero())
            raise CommonError(f"ranks must stay in lockstep, got another {names[at]} than rank 0's on rank {whose}")

    def _gathered(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        with naming_peers():
            dist.all_gather_object(found, value)
        return found


def ranks() -> Ranks:
    """This process among those of the run."""
    if not dist.is_initialized():
        return Ranks()
    local = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    local_rank, local_size = local
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, local_size)


@contextlib.contextmanager
def naming_peers() -> Iterator[None]:
    """Raises LostPeer for what gloo and NCCL say, in many ways, of a process that has gone."""
    try:
        yield
    except RuntimeError as error:
        raise LostPeer(f"another process of the run has ended or is out of reach ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """Of what it says."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _checksum(x: Tensor) -> Tensor:
    """int64, of the bits: every element counts by its place, modulo 2^64."""
    bits = x.contiguous().reshape(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    place = torch.arange(1, 2 * bits.numel(), 2, device=x.device)
    return (bits * place).sum()


def _difference(expected: Any, found: Any, rank: int) -> str:
    if isinstance(expected, dict) and isinstance(found, dict):
        name = next(k for k in {**expected, **found} if expected.get(k) != found.get(k))
        return f"{name} {expected.get(name)!r} on rank 0, {found.get(name)!r} on rank {rank}"
    return f"{expected!r} on rank 0, {found!r} on rank {rank}"
