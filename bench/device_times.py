"""Device time of the Triton kernels: each op of a training step in a CUDA graph, the caches cold, beside a copy, and
what the card can do at best: bandwidth, and what a launch and a replay cost.

python bench/device_times.py --out OUT.json
python bench/device_times.py --once      # each op once, between the marks that ncu --profile-from-start off waits for

First the workloads as they are, then other layouts and dtypes, then every launch setting that differs from the default
in one value, until all is done or interrupted: what has been measured is in the file at any moment. An op has with it
what its graph copies and clears before the first kernel. Without a GPU: a small workload in Triton's interpreter, whose
times say nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # before Triton is imported

import triton
from machine import write
from measure import DEVICE, Step, seconds
from workloads import CIFAR10, WORKLOADS, Workload, build, conv2d

from fastsn import ops
from fastsn.triton import launch, settings
from fastsn.triton.settings import Settings
from interpreted import kernels
from op_calls import call

# How often the bytes of the weights cross at least, read or written; the second half of an iteration should find them
# in the cache, and the sums that `reduce` adds up are not counted.
OPS = {"power_iteration": 1, "rescale": 2, "rescale_backward": 4, "copy": 2}
KERNELS = {"iterate": 1, "iterate_together": 1, "reduce": 0, "rescale": 2, "inner_products": 2, "gradient": 2}
FLUSH = 256 << 20  # bytes, more than any cache
REPLAYS = 20
CHAIN = 200  # launches that are timed together
SMALL = Workload("2 small convs", (conv2d(4, 8, 3), conv2d(8, 6, 4)), "a rehearsal")
CHOSEN, CANDIDATES = [SMALL], launch.CANDIDATES[:1]
if DEVICE.type == "cuda":
    CHOSEN = [w for w in WORKLOADS if w.name in (CIFAR10.name, "ImageNet ResNet", "4 Linear 4096")]
    CANDIDATES = launch.CANDIDATES


class Case(NamedTuple):
    """What is measured."""

    workload: Workload
    layout: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.float32
    setting: str = "default"
    launched: Settings = settings.DEFAULT

    def __str__(self) -> str:
        kind = f"{str(self.layout).split('.')[-1]} {str(self.dtype).split('.')[-1]}"
        return f"{self.workload.name}, {kind}, {self.setting}"


def cases() -> Iterator[Case]:
    """In the order of what is worth knowing first."""
    yield from map(Case, CHOSEN)
    for workload in CHOSEN:
        yield Case(workload, setting="default, again")  # how far two measurements of one thing are apart
        yield Case(workload, layout=torch.channels_last)
        yield Case(workload, dtype=torch.bfloat16)
    for workload in CHOSEN:
        for changes in CANDIDATES:
            said = ", ".join(f"{name} {value}" for name, value in changes.items())
            yield Case(workload, setting=said, launched=replace(settings.DEFAULT, **changes))


@lru_cache
def _weights(workload: Workload) -> list[torch.Tensor]:
    return [layer.weight.detach() for layer in build(workload, DEVICE)]


def steps(case: Case) -> tuple[dict[str, Step], int]:
    """The ops of a training step and a copy of as much, and how many bytes the weights have."""
    weights = [w.to(case.dtype) for w in _weights(case.workload)]
    weights = [w.contiguous(memory_format=case.layout) if w.ndim == 4 else w for w in weights]
    c = call(weights, [0] * len(weights), [3 if w.ndim > 2 and w[0, 0].numel() > 1 else 1 for w in weights])
    sigma, vectors = c.iterate(in_place=True)
    outputs, mean = c.rescale(sigma, vectors)
    gradients = [torch.randn_like(w) for w in weights]
    nbytes = sum(w.nbytes for w in weights)
    source = torch.randn(nbytes // 4)
    target = torch.empty_like(source)
    return {
        "power_iteration": lambda: c.iterate(in_place=True),
        "rescale": lambda: c.rescale(sigma, vectors),
        "rescale_backward": lambda: ops.rescale_backward(gradients, None, outputs, [], mean, vectors, *c.numbers()),
        "copy": lambda: target.copy_(source),
    }, nbytes


def on_the_gpu(chosen: dict[str, Step]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each op, from the start of its graph to its end, and of each kernel alone."""
    graphs = {name: _captured(step) for name, step in chosen.items()}
    flush = torch.empty(FLUSH, dtype=torch.uint8)
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}

    def replay() -> None:
        for name, graph in graphs.items():
            marks[name].append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            flush.zero_()
            marks[name][-1][0].record()
            graph.replay()
            marks[name][-1][1].record()

    for _ in range(REPLAYS):
        replay()
    torch.cuda.synchronize()
    of_ops = {
        name: statistics.median(start.elapsed_time(end) for start, end in found[REPLAYS // 4 :]) * 1e-3
        for name, found in marks.items()
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    return of_ops, of_kernels(profile.events())


def ceilings() -> dict[str, float]:
    """Of this card: bandwidth of a copy (bytes read and written) and of reading alone, of more than any cache holds;
    microseconds of a kernel of one block, one after the other in a graph and launched eagerly, and of an empty graph.
    """
    source = torch.randn(1 << 28)
    target, one = torch.empty_like(source), torch.zeros(1)
    chain = _captured(lambda: [one.add_(1) for _ in range(CHAIN)])
    single = _captured(lambda: one.add_(1))

    def device(step: Step) -> float:
        return float(triton.testing.do_bench(step, warmup=20, rep=200, return_mode="median")) * 1e-3

    def host(step: Step) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CHAIN):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / CHAIN

    return {
        "copy_GB_per_s": 2 * source.nbytes / device(lambda: target.copy_(source)) / 1e9,
        "read_GB_per_s": source.nbytes / device(source.sum) / 1e9,
        "kernel_in_a_graph_us": (device(chain.replay) - device(single.replay)) / (CHAIN - 1) * 1e6,
        "eager_launch_us": host(lambda: one.add_(1)) * 1e6,
        "graph_of_one_kernel_us": host(single.replay) * 1e6,
    }


def by_the_clock(chosen: dict[str, Step]) -> tuple[dict[str, float], dict[str, float]]:
    """Of the interpreter."""
    return {name: seconds(step) for name, step in chosen.items()}, {}


def of_kernels(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of each kernel in a replay, all its launches together; of a profile of ``REPLAYS`` replays."""
    found: dict[str, list[float]] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name in KERNELS and event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.device_time * 1e-6)
    launches = {name: len(times) // REPLAYS for name, times in found.items()}
    return {
        name: statistics.median(sum(times[i * n : (i + 1) * n]) for i in range(REPLAYS))
        for (name, times), n in zip(found.items(), launches.values(), strict=True)
    }


def _captured(step: Step) -> torch.cuda.CUDAGraph:
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def measured(case: Case) -> list[dict[str, Any]]:
    """A row for each op and kernel."""
    with launched(case.launched):
        chosen, nbytes = steps(case)
        of_ops, kernel_times = on_the_gpu(chosen) if DEVICE.type == "cuda" else by_the_clock(chosen)
    what = {"workload": case.workload.name, "case": str(case), "weights_MB": nbytes / 1e6}
    return [
        {**what, "kind": kind, "name": name, "us": t * 1e6, "GB_per_s": passes[name] * nbytes / t / 1e9}
        for kind, passes, found in (("op", OPS, of_ops), ("kernel", KERNELS, kernel_times))
        for name, t in found.items()
    ]


def launched(own: Settings) -> Any:
    if DEVICE.type == "cpu":
        return kernels(replace(own, elements=32, warps=8, chunk=256))
    settings.use(own, torch.zeros(()).device)
    return nullcontext()


def once() -> None:
    """Every op of every workload, launched by itself: ncu does not look into graphs."""
    for case in map(Case, CHOSEN):
        with launched(case.launched):
            chosen, _ = steps(case)
            for step in chosen.values():
                step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            for step in chosen.values():
                step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
        print(case, flush=True)


def measure_all(out: Path) -> None:
    rows: list[dict[str, Any]] = []
    limits = {k: _short(v) for k, v in ceilings().items()} if DEVICE.type == "cuda" else {}
    print(limits, flush=True)
    for case in cases():
        try:
            found = measured(case)
        except (RuntimeError, triton.TritonError) as error:
            if case.launched == settings.DEFAULT:
                raise
            found = []  # too many registers, too much shared memory
            print(f"{case}: cannot be launched here: {str(error)[:200]}", flush=True)
        rows += [{k: _short(v) for k, v in row.items()} for row in found]
        write(out, {"ceilings": limits, "device_times": rows})
        if found:
            said = [f"{x['name']} {x['us']:.1f} µs {x['GB_per_s']:.0f} GB/s" for x in found]
            print(f"{case}: {', '.join(said)}", flush=True)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("device_times.json"))
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    with torch.no_grad():
        if arguments.once:
            once()
        else:
            measure_all(arguments.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; what has been measured is in the file")
