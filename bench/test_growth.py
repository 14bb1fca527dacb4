"""How the cost of forward + backward grows: with the number of layers, and with the size of a single weight."""

from __future__ import annotations

from functools import partial

import comparison
import pytest
from contestants import GROWING
from torch import nn
from workloads import Workload, conv2d

CASE = "forward_and_backward"
LAYERS = [2**n for n in range(9)]
SIDES = [2**n for n in range(4, 14)]  # 1 KB to 256 MB


def _points() -> list[tuple[str, int, Workload]]:
    points = []
    for n in LAYERS:
        points.append(("layers", n, Workload(f"{n} convs", (conv2d(64, 64, 3),) * n, "launches", seconds=0.7)))
    for n in SIDES:
        layers = (partial(nn.Linear, n, n),)
        points.append(("bytes", 4 * n * n, Workload(f"Linear {n}", layers, "caches and bandwidth", seconds=0.7)))
    return points


TURNS = [pytest.param(*point, name, id=f"{point[2].name}-{name}") for point in _points() for name in GROWING]


@pytest.mark.parametrize(("axis", "value", "workload", "name"), TURNS)
def test_growth(benchmark, axis, value, workload, name):
    step = comparison.step(workload, CASE, name)  # raises if the contestant is wrong
    figures = comparison.compare(workload, CASE, GROWING)
    benchmark.extra_info |= {**figures[name], "axis": axis, "value": value}
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
