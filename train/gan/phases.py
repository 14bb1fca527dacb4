"""How long the phases of a run take: data, discriminator, generator, reduction, evaluation and so on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Used as ``with phases("data"):``. A phase inside another one interrupts it: every moment counts once, and what is
    in no phase is not counted.

    On a GPU, whose work goes on after Python has asked for it, moments are those at which the GPU gets there.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._now, self._off = "", False
        self._switches: list[tuple[str, float | torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._off:
            yield
            return
        before = self._now
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    @contextmanager
    def off(self) -> Iterator[None]:
        """In the block no phase begins: all of it counts to the one that it is in. When a GPU gets to somewhere within
        a CUDA graph cannot be asked."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def _switch(self, name: str) -> None:
        self._now = name
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._switches.append((name, event))
        else:
            self._switches.append((name, time.perf_counter()))

    def taken(self) -> dict[str, float]:
        """Seconds of each phase since this was last called; waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self._switches, self._switches[1:], strict=False):
            if name:
                found[name] = found.get(name, 0.0) + _seconds(begin, end)
        self._switches = self._switches[-1:]
        return found


def _seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000
