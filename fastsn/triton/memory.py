"""Device memory that launches share: tables of addresses, and counters.

While a CUDA graph is captured nothing may be allocated outside of its pool, copied from pageable memory or waited for,
and what a graph has seen must stay where it is for as long as the graph lives. So graphs get theirs from a reserve,
which eager calls have made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

_RESERVE = 1 << 17  # int64 numbers that captures can take before the next eager call; twice as many after too few
_COUNTERS = 4096
# Tables that a plan keeps, or as many as have so many numbers. A network whose gradients come back to the same places
# needs one; layers that are called on their own share a plan if they are alike, and need one each, which are small.
_TABLES, _NUMBERS = 64, 1 << 13
_STREAMS = 32  # that torch has for each device and priority
_SECONDS = 10.0  # within which a table must have arrived on the device

_kept: list[Any] = []  # what graphs have seen
_counters: dict[tuple[torch.device, int], Tensor] = {}
_reserves: dict[torch.device, Reserve] = {}
_replenishing = threading.Lock()


class Now(NamedTuple):
    """Where a call's launches go: asked once a call, for asking costs as much as what depends on it."""

    device: torch.device
    stream: int
    capturing: bool  # whether they go into a graph


def now(device: torch.device) -> Now:
    """For a call on the current stream."""
    if device.type != "cuda":
        return Now(device, 0, False)
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing:
        replenish(device)
    return Now(device, driver.active.get_current_stream(device.index), capturing)  # torch's, without its objects


class Reserve:
    """Device memory for what captured launches read, ``size`` int64 numbers that are never given to anybody else, and
    pinned memory to fill it from. It begins as zeros.

    What is taken during a capture is filled at once, by a stream that is not being captured: the graph has nothing to
    copy when it runs. CUDA lets nobody wait for that stream meanwhile, so the numbers are followed by a mark, which
    is copied back.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self.size = device, size
        with torch.inference_mode(False):  # or nothing could be copied to it outside of that mode
            self.memory = torch.zeros(size, dtype=torch.int64, device=device)
            self.staging = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
            self.arrived = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self.used = self.marks = 0
        self.lock = threading.Lock()
        if device.type == "cuda":
            self.zeroed = torch.cuda.current_stream(device).record_event()
            self._find_stream()

    def is_low(self) -> bool:
        """Whether more than half of it has been taken."""
        return 2 * self.used > self.size

    def next_size(self) -> int:
        """Of the reserve that comes after it: twice as large where captures needed more than there was."""
        return 2 * self.size if self.used > self.size else self.size

    def take(self, count: int) -> slice:
        """Where so many numbers, and a mark, may lie. RuntimeError if there is not as much left."""
        with self.lock:
            begin = self.used
            self.used += -(-(count + 1) // 32) * 32  # parts begin at multiples of 256 bytes
            if self.used > self.size:
                raise RuntimeError(_USED_UP)
            return slice(begin, begin + count + 1)

    def sent(self, numbers: Tensor) -> Tensor:
        """The numbers on the device, where they are already."""
        part = self.take(numbers.numel())
        place, staging = self.memory[part], self.staging[part]
        with self.lock:
            self.marks += 1
            staging[:-1] = numbers
            staging[-1] = self.marks
            with self._aside():
                place.copy_(staging, non_blocking=True)
                self.arrived.copy_(place[-1:], non_blocking=True)
            end = time.monotonic() + _SECONDS
            while int(self.arrived) != self.marks:
                if time.monotonic() > end:
                    raise RuntimeError(f"a table of addresses has not arrived on {place.device} in {_SECONDS:g} s")
        return place[:-1]

    def _aside(self) -> AbstractContextManager[Any]:
        """The stream that fills it."""
        if self.device.type != "cuda":
            return nullcontext()
        if is_captured(self.stream):
            self._find_stream()
        return torch.cuda.stream(self.stream)

    def _find_stream(self) -> None:
        self.stream = stream_aside(self.device)
        self.stream.wait_event(self.zeroed)


def is_captured(stream: torch.cuda.Stream) -> bool:
    """Whether what it is given goes into a graph."""
    with torch.cuda.stream(stream):
        return bool(torch.cuda.is_current_stream_capturing())


def stream_aside(device: torch.device) -> torch.cuda.Stream:
    """One that is not being captured: torch hands out the same few, in turn, to all who ask for a stream."""
    for _ in range(_STREAMS):
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if not is_captured(stream):
            return stream
    raise RuntimeError(f"all of torch's streams of {device} are being captured")


_NOT_READY = "a step must have run once, as it is, before it is captured into a CUDA graph"
_USED_UP = (
    "the memory for tables of captured calls is used up: run a step once more without capturing it, which makes more, "
    "then capture again"
)


def replenish(device: torch.device) -> None:
    """Have a reserve for captures to come."""
    reserve = _reserves.get(device)
    if reserve is not None and not reserve.is_low():
        return
    with _replenishing:  # of threads that find it low, one makes the next
        if _reserves.get(device) is reserve:
            _kept.extend([reserve] if reserve else [])  # graphs read from it
            _reserves[device] = Reserve(device, reserve.next_size() if reserve else _RESERVE)


def _reserve(device: torch.device) -> Reserve:
    found = _reserves.get(device)
    if found is None:
        raise RuntimeError(_NOT_READY)
    return found


class Sent:
    """Numbers on the device, sent there without waiting for it, for launches on any stream."""

    def __init__(self, host: Tensor, at: Now) -> None:
        self.tensor, self.stream, self.event = host, at.stream, None
        if at.capturing:
            self.tensor = _reserve(at.device).sent(host)
        elif at.device.type == "cuda":
            self.tensor = host.pin_memory().to(at.device, non_blocking=True)
            self.event = torch.cuda.current_stream(at.device).record_event()

    def here(self, at: Now) -> Tensor:
        """For a launch. In a capture, nothing is left to wait for: the step has run before."""
        if self.event is not None and self.stream != at.stream and not at.capturing:
            current = torch.cuda.current_stream(at.device)
            current.wait_event(self.event)
            self.tensor.record_stream(current)  # so that it is not freed while this launch reads it
        return self.tensor


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

    def known(self, places: Hashable, addresses: Sequence[int] | None, at: Now) -> Tensor | None:
        """The table for tensors that lie at ``addresses``, one after the other, of which ``places`` is a key; without
        them, the table of that key, if there is one."""
        table = self._known.get(places)
        if table is None:
            return None if addresses is None else self._made(places, addresses, at)
        keep(table, at)
        return table.here(at)

    def get(self, places: Hashable, tensors: Sequence[Sequence[Tensor]], at: Now) -> Tensor:
        """The table for the tensors of these lists, one after the other; ``places``: a key of where they lie."""
        found = self.known(places, None, at)
        return self._made(places, [x.data_ptr() for each in tensors for x in each], at) if found is None else found

    def _made(self, places: Hashable, addresses: Sequence[int], at: Now) -> Tensor:
        table = Sent(self._numbers + host([0, *addresses])[self._tensors], at)
        with self._lock:
            self._known[places] = table
            while len(self._known) > max(_TABLES, _NUMBERS // self._numbers.numel()):
                self._known.pop(next(iter(self._known)))
        keep(table, at)
        return table.here(at)


def counters(count: int, at: Now) -> Tensor:
    """At least ``count`` zeros, which every launch leaves as zeros: one set per stream, on which launches follow one
    another, and for each captured launch one of its own."""
    if at.capturing:
        reserve = _reserve(at.device)
        return reserve.memory[reserve.take(-(-count // 2))].view(torch.int32)
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
