"""What spectral normalization costs the host in networks where arithmetic costs nothing: see host_cost.py."""

from __future__ import annotations

from collections.abc import Iterator

import host_cost
import pytest
import torch

import fastsn

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not fastsn.backends()["cpp"].available, reason=fastsn.backends()["cpp"].detail),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", host_cost.CONTESTANTS)
@pytest.mark.parametrize("layers", host_cost.SECONDS)
def test_host_cost(benchmark, layers, name):
    step = host_cost.step(layers, name)  # raises if the contestant is wrong
    benchmark.extra_info |= host_cost.compare(layers)[name]
    benchmark.pedantic(step, rounds=3, iterations=10, warmup_rounds=1)
