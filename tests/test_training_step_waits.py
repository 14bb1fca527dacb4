"""A training step asks the device for nothing that Python would have to wait for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import captured_runs
from dispatched import SYNCS
from gan.config import Config
from gan.training import Training
from gan_rank_jobs import TINY, batches
from on_a_gpu import HAS_KERNELS, waits_are_errors

DEVICE = torch.device("cuda" if HAS_KERNELS else "cpu")
RUNS = {
    "CNN, BSSN, a penalty": ({"norm": "bssn", "scale": 1.3, "gradient_penalty": 1.0, "ema": 0.9}, 0),
    "forwards that iterate": captured_runs.RUNS["forwards that iterate"],
    "projection ResNet": captured_runs.RUNS["projection ResNet"],
}


class Waits(TorchDispatchMode):
    """Names of the operators that need the value of a tensor in Python. Counts that are on the CPU with a GPU too are
    no reason to wait: Adam's of steps, the average's."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        states = [*training.optimizer_g.state.values(), *training.optimizer_d.state.values()]
        counts = [state["step"] for state in states]
        counts += [training.average.n_averaged] if training.average is not None else []
        assert all(x.device.type == "cpu" for x in counts)
        self.counts = {x.data_ptr(): x for x in counts}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        of_a_count = bool(args) and isinstance(args[0], Tensor) and args[0].data_ptr() in self.counts
        if name in SYNCS and not of_a_count:
            self.found.append(name)
        result = func(*args, **(kwargs or {}))
        if of_a_count and isinstance(result, Tensor):
            self.counts[result.data_ptr()] = result  # as whether it is 0
        return result


def training_and_batches(run: str) -> tuple[Training, Any]:
    changes, classes = RUNS[run]
    config = Config(name="x", **{**TINY, **changes})
    given = ((x.to(DEVICE), y if y is None else y.to(DEVICE)) for x, y in batches(config, classes))
    training = Training(config, 3, classes, DEVICE)
    training.advance(given)  # whatever is made once
    return training, given


@pytest.mark.parametrize("run", RUNS)
def test_no_operator_needs_a_value(run):
    training, given = training_and_batches(run)
    with Waits(training) as waits:
        scalars = training.advance(given)
        assert waits.found == []
        float(scalars["loss/d"])
    assert waits.found == ["_local_scalar_dense"]  # it would have been seen


@pytest.mark.skipif(DEVICE.type == "cpu", reason="torch counts synchronizations of a GPU")
@pytest.mark.parametrize("run", RUNS)
def test_nothing_waits_for_the_gpu(run):
    training, given = training_and_batches(run)
    batch = [next(given) for _ in range(training.config.n_dis)]
    with waits_are_errors():
        training.advance(iter(batch))
