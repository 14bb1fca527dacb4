"""Peak memory of forward + backward on a CPU: growth of the resident set, each contestant in a process of its own.

Not torch's profiler: it does not see what is allocated outside torch's own allocator. The gradients that are handed in
and the layers are there before; the weights' own gradients, W̄ and everything transient are what grows. Compiled
contestants run one step before, and what that leaves in the heap is given back first.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contestants import CONTESTANTS
from measure import DEVICE
from workloads import WORKLOADS, build

WORKLOAD = next(w for w in WORKLOADS if w.name == "ImageNet ResNet")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(DEVICE.type != "cpu" or not CLEAR.exists(), reason="test_normalization.py measures it on a GPU"),
]


def _resident(field: str) -> int:
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(name: str) -> int:
    """How far the resident set grows in three steps."""
    plain = build(WORKLOAD, DEVICE)
    gradients = [torch.randn_like(layer.weight) for layer in plain]
    layers, forward = CONTESTANTS[name].prepare(plain)
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # resets the peak to what is resident now
    before = _resident("VmRSS")
    for _ in range(3):
        torch.autograd.backward(forward(), gradients)
        for layer in layers:
            layer.parametrizations.weight.original.grad = None
    return _resident("VmHWM") - before


@pytest.mark.parametrize("name", CONTESTANTS)
def test_memory(benchmark, name):
    def measured() -> int:
        done = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    found = benchmark.pedantic(measured, rounds=1)
    nbytes = sum(layer.weight.nbytes for layer in build(WORKLOAD, DEVICE))
    benchmark.extra_info |= {
        "workload": WORKLOAD.name,
        "contestant": name,
        "peak_memory_MB": found / 1e6,
        "times_weights": found / nbytes,
    }


if __name__ == "__main__":
    print(peak_bytes(sys.argv[1]))
