"""Device memory that launches share: tables of addresses, and counters.

While a CUDA graph is captured nothing may be allocated outside of its pool, copied from pageable memory or waited for,
and what a graph has seen must stay where it is for as long as the graph lives.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_ARENA = 1 << 16  # int64 numbers of pinned memory for tables that are sent during captures
_COUNTERS = 4096
_TABLES = 64  # tables that a plan keeps; a network whose gradients come back to the same places needs one

_kept: list[Any] = []  # what graphs have seen
_counters: dict[tuple[torch.device, int], Tensor] = {}
_arena: list[Tensor] = []


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Sent:
    """Numbers on the device, sent there without waiting for it, for launches on any stream."""

    def __init__(self, numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> None:
        host = torch.tensor(numbers, dtype=dtype, device="cpu")  # whatever the default device is
        self.tensor, self.stream, self.event = host, 0, None
        if device.type == "cuda":
            self.tensor = _captured(host, device) if capturing(device) else _uploaded(host, device)
            self.stream = torch.cuda.current_stream(device).cuda_stream
            self.event = None if capturing(device) else torch.cuda.current_stream(device).record_event()

    def here(self) -> Tensor:
        """For a launch on the current stream. In a capture, nothing is left to wait for: the step has run before."""
        device = self.tensor.device
        if self.event is not None and not capturing(device):
            current = torch.cuda.current_stream(device)
            if current.cuda_stream != self.stream:
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


class Tables:
    """Tables by the addresses in them: the newest are kept, and for good those that a graph has seen."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Sent] = OrderedDict()

    def get(self, addresses: tuple[int, ...], rows: Callable[[], Sequence[int]], device: torch.device) -> Tensor:
        """The table for these addresses; ``rows()`` gives its numbers where there is none."""
        table = self._known.get(addresses)
        if table is None:
            table = Sent(rows(), device)
            if capturing(device):  # lies in the graph's own memory, and is filled only when that runs
                return table.tensor
            self._known[addresses] = table
            while len(self._known) > _TABLES:
                self._known.popitem(last=False)
        else:
            keep(table, device)
        return table.here()


def counters(count: int, device: torch.device) -> Tensor:
    """At least ``count`` zeros, which every launch leaves as zeros: one set per stream, on which launches follow one
    another."""
    if capturing(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _counters.get((device, stream))
    if found is None or found.numel() < count:
        found = torch.zeros(max(count, _COUNTERS), dtype=torch.int32, device=device)
        _counters[device, stream] = found
    return found


def keep(thing: Any, device: torch.device) -> None:
    """Hold on to what a graph that is being captured will read."""
    if capturing(device):
        _kept.append(thing)
