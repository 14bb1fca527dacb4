"""A step as a CUDA graph of a GPU; test_captured_steps has the same on the CPU."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from captured_runs import RUNS, STEPS, configured, stepped
from gan import norms, probes
from gan.captured import EAGER_STEPS, CudaGraph
from gan.config import Config
from gan.training import Training
from gan_rank_jobs import batches
from on_a_gpu import HAS_KERNELS, waits_are_errors
from replayed import NeverCaptured

pytestmark = [
    pytest.mark.skipif(not HAS_KERNELS, reason="captures on a GPU, with TRITON_INTERPRET=0"),
    pytest.mark.usefixtures("_the_same_bits"),
]

GPU = torch.device("cuda")
ALL = RUNS | {f"norm {norm}": ({"norm": norm}, 0) for norm in norms.METHODS}
ALL["bf16"] = ({"precision": "bf16", "norm": "bssn"}, 0)
EXACT = {"tf32": False}


@pytest.fixture
def _the_same_bits(monkeypatch):
    """From the same numbers. In ten steps of networks with batch norms, a last bit of a gradient grows to a hundred
    times the tolerance below."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def given(config: Config, classes: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    return ((x.to(GPU), y if y is None else y.to(GPU)) for x, y in batches(config, classes))


def counts(training: Training) -> set[int]:
    states = [*training.optimizer_g.state.values(), *training.optimizer_d.state.values()]
    return {int(state["step"]) for state in states}


@pytest.mark.parametrize("run", ALL)
def test_a_graph_trains_as_python_does(run):
    """Biases before a batch norm have no gradient but rounding, and Adam moves them by it: what the networks give in
    training does not depend on them."""
    changes, classes = ALL[run]
    config = configured({**changes, **EXACT})
    plain, captured = (Training(config, 3, classes, GPU, graph) for graph in (lambda _: NeverCaptured(), CudaGraph))
    scalars: list[Any] = [stepped(training, given(config, classes), STEPS) for training in (plain, captured)]
    tolerance = 1e-4 if config.precision == "float32" else 1e-2
    torch.testing.assert_close(scalars[1], scalars[0], rtol=tolerance, atol=tolerance)
    for found, expected in zip(captured.last, plain.last, strict=True):
        torch.testing.assert_close(found, expected, rtol=10 * tolerance, atol=10 * tolerance)
    slopes = [probes.slopes(training) for training in (captured, plain)]
    torch.testing.assert_close(*slopes, rtol=10 * tolerance, atol=10 * tolerance)
    for training in (plain, captured):
        assert counts(training) == {STEPS, STEPS * config.n_dis}
        assert training.average is None or int(training.average.n_averaged) == STEPS


@pytest.mark.parametrize("graph", [None, CudaGraph])
def test_a_run_goes_on_with_and_without_a_graph(graph):
    config = configured({"norm": "bssn", "ema": 0.75, "decay_from": 2, **EXACT})
    batch = list(itertools.islice(given(config, 0), STEPS))
    expected = stepped(Training(config, 3, 0, GPU), iter(batch), STEPS)[5:]
    first = Training(config, 3, 0, GPU, CudaGraph)
    stepped(first, iter(batch[:5]), 5)
    resumed = Training(config, 3, 0, GPU, graph)
    resumed.load(copy.deepcopy(first.state()))
    places = {x["step"].device.type for x in resumed.optimizer_d.state.values()}
    assert places == {"cpu" if graph is None else "cuda"}
    torch.testing.assert_close(stepped(resumed, iter(batch[5:]), 5), expected, rtol=1e-4, atol=1e-4)
    assert counts(resumed) == {STEPS}


@pytest.mark.parametrize("run", ["CNN, BSSN", "projection ResNet", "an average"])
def test_a_replay_does_not_wait_for_the_gpu(run):
    changes, classes = RUNS[run]
    config = configured(changes)
    training, batch = Training(config, 3, classes, GPU, CudaGraph), given(config, classes)
    stepped(training, batch, EAGER_STEPS + 1)
    last = [next(batch) for _ in range(config.n_dis)]
    with waits_are_errors():
        training.advance(iter(last))
