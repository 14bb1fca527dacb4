"""What a call of the C++ ops costs before any arithmetic: a 147 KB weight against one of 64 bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import lru_cache

import measure
import pytest
import torch

import fastsn
from fastsn import ops

CALLS = 100  # per timed repetition: one call is as short as the clock's own cost

pytestmark = pytest.mark.skipif(not fastsn.backends()["cpp"].available, reason=fastsn.backends()["cpp"].detail)


def _calls(channels: int, kernel: int) -> dict[str, Callable[[], object]]:
    """The ops on one weight of BSSN, by name."""
    layer = fastsn.spectral_norm(torch.nn.Conv2d(channels, channels, kernel), variant="bssn", scale=1.4, impl="cpp")
    norm, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    pairs, bits = norm.vectors(), sum(ops.VIEW_BITS[view] for view in norm.views)
    u, v = [pair[0] for pair in pairs.values()], [pair[1] for pair in pairs.values()]
    frozen, gradient, dtypes = weight.detach(), torch.randn_like(weight), [ops.DTYPE_CODES[weight.dtype]]
    sigma, vectors = ops.power_iteration([frozen], u, v, [0], [bits], [0], 1)

    def rescaled(w: torch.Tensor) -> torch.Tensor:
        return ops.rescale([w], [], sigma, vectors, [0], [bits], [-1], [1.4], dtypes)[0][0]

    def forward_and_backward() -> None:
        torch.autograd.backward(rescaled(weight), gradient)
        weight.grad = None

    return {
        "power_iteration_": lambda: ops.power_iteration_([frozen], u, v, [0], [bits], [0], 1),
        "rescale": lambda: rescaled(frozen),
        "rescale, forward + backward": forward_and_backward,
        "layer.weight": lambda: layer.weight,
    }


def _often(call: Callable[[], object]) -> Callable[[], None]:
    def loop() -> None:
        for _ in range(CALLS):
            call()

    return loop


@lru_cache
def _sizes() -> dict[str, dict[str, Callable[[], object]]]:
    return {"large": _calls(64, 3), "tiny": _calls(4, 1)}


@lru_cache
def _medians() -> dict[str, float]:
    """Microseconds per call."""
    steps = {f"{size} {name}": _often(call) for size, calls in _sizes().items() for name, call in calls.items()}
    times = measure.interleaved(steps, budget=5)
    return {name: statistics.median(found) / CALLS * 1e6 for name, found in times.items()}


@pytest.mark.parametrize("name", ["power_iteration_", "rescale", "rescale, forward + backward", "layer.weight"])
def test_overhead(benchmark, name):
    op, tiny = (_medians()[f"{size} {name}"] for size in ("large", "tiny"))
    benchmark.extra_info |= {"op": name, "op_us": op, "tiny_op_us": tiny, "kernel_us": op - tiny}
    benchmark.pedantic(_sizes()["large"][name], rounds=3, iterations=CALLS, warmup_rounds=1)
