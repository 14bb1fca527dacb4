"""Timing by turns: everything that is compared runs in one process, and the machine's noise meets all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BURST = 3
LONG = 0.1  # seconds: a step that takes longer is timed once a turn, what it finds in the caches no longer matters

Step = Callable[[], object]
Clock = Callable[[], float]


def seconds(step: Step, clock: Clock = time.perf_counter) -> float:
    """Until the results are there, not until the work is queued."""
    _synchronize()
    start = clock()
    step()
    _synchronize()
    return clock() - start


def host_seconds(step: Step, times: int = 7) -> float:
    """Until a step returns, with nothing left to do on the GPU before it and without waiting for it: the median."""

    def once() -> float:
        _synchronize()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(times))


def interleaved(
    steps: Mapping[str, Step], budget: float, least: int = 3, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every step in every round, rounds until ``budget`` seconds are used and at least ``least``.

    ``clock``: ``time.process_time`` leaves out what other processes have of the cores, for steps of one thread.

    A turn is one repetition that is not timed, so that each step finds the caches as it leaves them itself and not as
    its predecessor did, and then the median of ``BURST`` timed ones.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        end, rounds = time.perf_counter() + budget, 0
        while rounds < least or time.perf_counter() < end:
            for name, step in steps.items():
                repetitions = 1 if seconds(step) > LONG else BURST
                times[name].append(statistics.median(seconds(step, clock) for _ in range(repetitions)))
            rounds += 1
    finally:
        gc.enable()
    return times


def copying(nbytes: int) -> Step:
    """A copy of that many bytes: what the machine can move at best, measured by turns with everything else."""
    source = torch.randn(nbytes // 4, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def on_the_device(step: Step, times: int = 5) -> tuple[float, float]:
    """Seconds that a step's kernels and copies run on the GPU, without the gaps between them, and how many they are."""
    _synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            step()
        _synchronize()
    events = [
        event
        for event in profile.events()  # a range that has a name, such as Adam's step, is there beside its kernels
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return sum(event.device_time for event in events) * 1e-6 / times, len(events) / times


def in_a_line(error: BaseException) -> str:
    """An error, and the first of those that it followed: where a capture fails, its end does too, and says less."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    said = [" ".join(f"{type(x).__name__}: {x}".split())[:200] for x in (error, first)]
    return said[0] if first is error else " after ".join(said)


def peak_cuda_bytes(step: Step) -> int:
    """How much more than before is allocated at the peak of a step, on a GPU."""
    _synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    _synchronize()
    return torch.cuda.max_memory_allocated() - before


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
