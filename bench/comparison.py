"""One comparison: the contestants of a workload, checked, then timed by turns in one case, beside floor and copy."""

from __future__ import annotations

import statistics
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import gate
import measure
import torch
from contestants import BASELINE, CONTESTANTS, Forward
from measure import DEVICE, Step
from torch import Tensor, nn
from workloads import Workload, build

# How often the bytes of the weights must cross at least. One read serves the iteration of both views, rescaling takes
# a read and a write; backward reads the gradient twice and W̄ once and writes once; evaluation reads to measure sigma.
PASSES = {"forward": 3, "forward_and_backward": 7, "evaluation": 3}


class Ready(NamedTuple):
    """A contestant that passed the gate."""

    layers: nn.ModuleList
    forward: Forward


Results = dict[str, Ready | AssertionError]


def entrants(workload: Workload, case: str) -> tuple[str, ...]:
    """Compiled contestants sit out where compiling takes minutes, and in evaluation, where one folds instead."""
    may_compile = workload.compiled and case != "evaluation"
    return tuple(name for name, c in CONTESTANTS.items() if may_compile or not c.compiled)


@lru_cache(maxsize=1)  # the tests go workload by workload; two large ones at once would fill the memory
def _field(
    workload: Workload,
) -> tuple[dict[str, Ready | AssertionError], list[Tensor], list[gate.Norms], nn.ModuleList]:
    torch.compiler.reset()
    plain = build(workload, DEVICE)
    return {}, [torch.randn_like(layer.weight) for layer in plain], gate.true_norms(plain), plain


def ready(workload: Workload, name: str) -> Ready:
    """Raises AssertionError, every time it is asked, if the contestant computes something wrong."""
    known, gradients, norms, plain = _field(workload)
    if name not in known:
        contestant = CONTESTANTS[name]
        layers, forward = contestant.prepare(plain)
        try:
            gate.check(contestant, layers, forward, gradients, norms)
            known[name] = Ready(layers, forward)
        except AssertionError as error:
            known[name] = error
    found = known[name]
    if isinstance(found, AssertionError):
        raise found
    return found


def step(workload: Workload, case: str, name: str) -> Step:
    """What is timed."""
    layers, forward = ready(workload, name)
    layers.train(case != "evaluation")
    if case != "forward_and_backward":
        return torch.no_grad()(forward) if case == "evaluation" else forward
    gradients = _field(workload)[1]
    originals = [layer.parametrizations.weight.original for layer in layers]

    def forward_and_backward() -> None:
        torch.autograd.backward(forward(), gradients)
        for weight in originals:
            weight.grad = None

    return forward_and_backward


@lru_cache
def compare(workload: Workload, case: str, names: tuple[str, ...]) -> dict[str, dict[str, float | str]]:
    """The figures of every contestant that passes the gate."""
    steps: dict[str, Step] = {}
    for name in names:
        with suppress(AssertionError):
            steps[name] = step(workload, case, name)
    weights = [layer.weight for layer in _field(workload)[3]]
    nbytes = sum(w.nbytes for w in weights)
    copy = measure.copying(nbytes)
    times = measure.interleaved({**steps, "copy": copy}, workload.seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    bandwidth = 2 * nbytes / medians["copy"]
    floor = PASSES[case] * nbytes / bandwidth
    figures: dict[str, dict[str, float | str]] = {
        name: {
            "workload": workload.name,
            "case": case,
            "contestant": name,
            "interleaved_median_ms": medians[name] * 1e3,
            "floor_ms": floor * 1e3,
            "times_floor": medians[name] / floor,
            "times_torch_SN_eager": medians[name] / medians[BASELINE],
            "copy_GB_per_s": bandwidth / 1e9,
            "weights_MB": nbytes / 1e6,
            "layers": len(weights),
            "rounds": len(times[name]),
        }
        for name in steps
    }
    if DEVICE.type == "cuda":  # on a CPU it takes a process of one's own: test_memory.py
        # The floor of the device's own time: that of the wall holds what it costs to queue a copy and wait for it.
        device_floor = PASSES[case] * measure.on_the_device(copy)[0] / 2
        for name in steps:
            seconds, launches = measure.on_the_device(steps[name])
            figures[name] |= {
                "peak_memory_MB": measure.peak_cuda_bytes(steps[name]) / 1e6,
                "device_ms": seconds * 1e3,
                "device_floor_ms": device_floor * 1e3,
                "device_times_floor": seconds / device_floor,
                "launches": launches,
            }
    return figures
