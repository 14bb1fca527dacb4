"""Device memory that launches share: tables of addresses, and counters.

While a CUDA graph is captured nothing may be allocated outside of its pool, copied from pageable memory or waited for,
and what a graph has seen must stay where it is for as long as the graph lives.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ARENA = 1 << 16  # int64 numbers of pinned memory for tables that are sent during captures
_COUNTERS = 4096
_TABLES = 64  # tables that a plan keeps; a network whose gradients come back to the same places needs one

_kept: list[Any] = []  # what graphs have seen
_counters: dict[tuple[torch.device, int], Tensor] = {}
_arena: list[Tensor] = []


class Now(NamedTuple):
    """Where a call's launches go: asked once a call, for asking costs as much as what depends on it."""

    device: torch.device
    stream: int
    capturing: bool  # whether they go into a graph


def now(device: torch.device) -> Now:
    """For a call on the current stream."""
    if device.type != "cuda":
        return Now(device, 0, False)
    return Now(device, torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing())


class Sent:
    """Numbers on the device, sent there without waiting for it, for launches on any stream."""

    def __init__(self, host: Tensor, at: Now) -> None:
        self.tensor, self.stream, self.event = host, at.stream, None
        if at.device.type == "cuda":
            self.tensor = _captured(host, at.device) if at.capturing else _uploaded(host, at.device)
            self.event = None if at.capturing else torch.cuda.current_stream(at.device).record_event()

    def here(self, at: Now) -> Tensor:
        """For a launch. In a capture, nothing is left to wait for: the step has run before."""
        if self.event is not None and self.stream != at.stream and not at.capturing:
            current = torch.cuda.current_stream(at.device)
            current.wait_event(self.event)
            self.tensor.record_stream(current)  # so that it is not freed while this launch reads it
        return self.tensor


def _uploaded(host: Tensor, device: torch.device) -> Tensor:
    if not _arena or _arena[0].numel() < _ARENA // 2:  # captures have taken from it, for as long as their graphs live
        _kept.extend(_arena)
        _arena[:] = [torch.empty(_ARENA, dtype=torch.int64, device="cpu", pin_memory=True)]
    return host.pin_memory().to(device, non_blocking=True)


def _captured(host: Tensor, device: torch.device) -> Tensor:
    """The graph copies the numbers at every replay: this part of the pinned memory is never given to anybody else."""
    if not _arena or _arena[0].numel() < host.numel():
        raise RuntimeError("a step must have run once, as it is, before it is captured into a CUDA graph")
    staging, _arena[0] = _arena[0][: host.numel()], _arena[0][host.numel() :]
    _kept.append(staging)
    return torch.empty_like(host, device=device).copy_(staging.copy_(host), non_blocking=True)


class Address(NamedTuple):
    """Among the numbers of a table: where a tensor of the call lies."""

    of: int


class Tables:
    """Tables that differ in nothing but addresses, by where the tensors of a call lie. The newest are kept, and those
    that a graph has seen for good."""

    def __init__(self, numbers: Sequence[int | Address]) -> None:
        self._known: dict[Hashable, Sent] = {}
        self._lock = threading.Lock()  # to free a tensor lets other threads run
        self._numbers = host([0 if isinstance(x, Address) else x for x in numbers])
        self._tensors = host([1 + x.of if isinstance(x, Address) else 0 for x in numbers])

    def get(self, places: Hashable, tensors: Sequence[Sequence[Tensor]], at: Now) -> Tensor:
        """The table for the tensors of these lists, one after the other; ``places``: a key of where they lie."""
        table = self._known.get(places)
        if table is None:
            where = host([0, *(x.data_ptr() for each in tensors for x in each)])
            table = Sent(self._numbers + where[self._tensors], at)
            if at.capturing:  # lies in the graph's own memory, and is filled only when that runs
                return table.tensor
            with self._lock:
                self._known[places] = table
                while len(self._known) > _TABLES:
                    self._known.pop(next(iter(self._known)))
        keep(table, at)
        return table.here(at)


def counters(count: int, at: Now) -> Tensor:
    """At least ``count`` zeros, which every launch leaves as zeros: one set per stream, on which launches follow one
    another."""
    if at.capturing:
        return torch.zeros(count, dtype=torch.int32, device=at.device)
    found = _counters.get((at.device, at.stream))
    if found is None or found.numel() < count:
        found = torch.zeros(max(count, _COUNTERS), dtype=torch.int32, device=at.device)
        _counters[at.device, at.stream] = found
    return found


def keep(thing: Any, at: Now) -> None:
    """Hold on to what a graph that is being captured will read."""
    if at.capturing:
        _kept.append(thing)


def host(numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers as a tensor that can be sent."""
    return torch.tensor(numbers, dtype=dtype, device="cpu")  # whatever the default device is
