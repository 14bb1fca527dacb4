"""Normalizing all weights of a network: every workload, forward, forward + backward, evaluation, every contestant."""

from __future__ import annotations

import comparison
import pytest
from workloads import WORKLOADS

pytestmark = pytest.mark.timeout(1200)  # the first test of a workload compiles, checks and times all contestants

TURNS = [
    pytest.param(workload, case, name, id=f"{workload.name}-{case}-{name}")
    for workload in WORKLOADS
    for case in comparison.PASSES
    for name in comparison.entrants(workload, case)
]


@pytest.mark.parametrize(("workload", "case", "name"), TURNS)
def test_normalization(benchmark, workload, case, name):
    try:
        step = comparison.step(workload, case, name)
    except AssertionError as error:
        if name.startswith("fastsn"):
            raise
        pytest.skip(f"not timed, because it is wrong: {error}")  # not ours to mend
    figures = comparison.compare(workload, case, comparison.entrants(workload, case))
    benchmark.extra_info |= figures[name]
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
