"""A step as one CUDA graph trains as the same step by Python does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from captured_runs import RUNS, STEPS, configured, stepped
from gan import checkpoint, loop, norms, optimizers
from gan.captured import EAGER_STEPS, CapturedStep, graph_for
from gan.config import Config
from gan.data.store import memory_store
from gan.draws import OfGenerator
from gan.training import Training
from gan_rank_jobs import TINY, batches, flat
from replayed import NeverCaptured, Replayed, training_with


def values(training: Training) -> dict[str, Tensor]:
    """All that a step changes, of either kind of Adam."""
    kept = {path: x for path, x in flat(training.state()).items() if not path.endswith("/lr")}
    found = {path: x.double() for path, x in kept.items() if isinstance(x, Tensor)}
    shown = {f"last/{i}": x for i, x in enumerate(training.last) if x is not None}
    gradients = {f"gradient/{name}": p.grad for name, p in training.discriminator.named_parameters()}
    return found | shown | gradients


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("run", RUNS)
def test_replays_train_as_python_does(run):
    changes, classes = RUNS[run]
    config = configured(changes)
    plain = Training(config, 3, classes, torch.device("cpu"))
    by_python, _ = training_with(NeverCaptured, config, classes)
    replayed, (graph,) = training_with(Replayed, config, classes)
    scalars = [stepped(x, batches(config, classes), STEPS) for x in (plain, by_python, replayed)]
    assert (graph.captures, graph.replays) == (1, STEPS - EAGER_STEPS)
    torch.testing.assert_close(scalars[2], scalars[1], rtol=0, atol=0)
    torch.testing.assert_close(values(replayed), values(by_python), rtol=0, atol=0)
    torch.testing.assert_close(scalars[2], scalars[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(values(replayed), values(plain), rtol=1e-7, atol=1e-9)
    assert replayed.step == plain.step == STEPS


@pytest.mark.parametrize("norm", norms.METHODS)
def test_a_step_of_every_method_can_be_captured(norm):
    config = configured({"norm": norm})
    by_python, _ = training_with(NeverCaptured, config, 0)
    replayed, _ = training_with(Replayed, config, 0)
    scalars = [stepped(x, batches(config, 0), EAGER_STEPS + 2) for x in (by_python, replayed)]
    torch.testing.assert_close(scalars[1], scalars[0], rtol=0, atol=0)
    torch.testing.assert_close(values(replayed), values(by_python), rtol=0, atol=0)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("captured", [(True, False), (False, True), (True, True)])
def test_a_run_may_go_on_with_and_without_a_graph(captured, tmp_path):
    config = configured({"norm": "bssn", "ema": 0.75, "decay_from": 2})
    rest = batches(config, 0)
    given = [next(rest) for _ in range(STEPS)]
    whole = Training(config, 3, 0, torch.device("cpu"))
    stepped(whole, iter(given), STEPS)
    parts = []
    for with_graph, batch, steps in zip(captured, (given[:5], given[5:]), (5, 5), strict=True):
        training = Training(config, 3, 0, torch.device("cpu"))
        if with_graph:
            training, graphs = training_with(Replayed, config, 0)
        if parts:
            training.load(checkpoint.try_load(tmp_path / "step.pt"))
        stepped(training, iter(batch), steps)
        if with_graph:
            assert graphs[-1].replays == steps - EAGER_STEPS
        checkpoint.save(tmp_path / "step.pt", training.state())
        parts.append(training)
    torch.testing.assert_close(values(parts[1]), values(whole), rtol=1e-7, atol=1e-9)
    for optimizer in (parts[1].optimizer_g, parts[1].optimizer_d):
        (group,) = optimizer.param_groups
        assert isinstance(group["lr"], Tensor) == bool(group["fused"]) == group["capturable"] == captured[1]


def logged(folder: Path) -> list[dict[str, float]]:
    """Scalars of every step, without times and memory."""
    lines = [json.loads(line) for line in (folder / "scalars.jsonl").read_text().splitlines()]
    return [{k: x for k, x in line.items() if not k.startswith(("time", "memory", "images", "wall"))} for line in lines]


@pytest.mark.usefixtures("in_float64")
def test_what_a_run_looks_at_between_replays_is_that_of_the_step(tmp_path, monkeypatch):
    """Scalars, slopes, gradients, variances and sigmas; samples, which are drawn from the average; checkpoints."""
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    every = {"log_every": 1, "sample_every": 2, "checkpoint_every": 4, "eval_every": 0, "device": "cpu"}
    changes = {"norm": "bssn", "ema": 0.75, "log_gradients": True, "log_variances": True, "runs": tmp_path, **every}
    config = configured(changes)
    store = memory_store("noise", images)
    loop.train(config, store, resume=False)
    monkeypatch.setattr(loop, "Training", lambda config, _, classes, *__: training_with(Replayed, config, classes)[0])
    replayed = dataclasses.replace(config, name="replayed")
    loop.train(replayed, store, resume=False)
    expected, found = logged(config.folder), logged(replayed.folder)
    assert len(found) == STEPS
    assert {tag.split("/")[0] for tag in found[-1]} >= {"loss", "D", "slope", "gradient", "variance"}
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-6, abs=1e-9)
    states = [checkpoint.newest(x.folder / "checkpoint")["average"] for x in (replayed, config)]
    torch.testing.assert_close(*states, rtol=1e-7, atol=1e-9)


def test_a_load_in_the_middle_captures_anew():
    config = configured({})
    training, graphs = training_with(Replayed, config, 0)
    given = batches(config, 0)
    stepped(training, given, 5)
    training.load(training.state())
    stepped(training, given, 5)
    assert [(graph.captures, graph.replays) for graph in graphs] == [(1, 2), (1, 2)]


def test_a_state_of_another_optimizer_is_refused():
    training = Training(configured({}), 3, 0, torch.device("cpu"))
    for state in ({"param_groups": [], "state": {}}, {"state": {}}):
        with pytest.raises((KeyError, ValueError)):
            optimizers.load(training.optimizer_g, state)


@pytest.mark.parametrize(
    ("device", "processes", "message"),
    [
        ("cpu", 1, "cuda_graph must be False without a CUDA device, got True with device 'cpu'"),
        ("cuda", 2, "cuda_graph must be False with several processes, got True with 2"),
    ],
)
def test_where_no_graph_can_be_it_is_refused(device, processes, message):
    with pytest.raises(ValueError, match=message):
        graph_for(configured({"cuda_graph": True}), torch.device(device), processes)


def test_a_run_without_a_gpu_is_refused_before_its_folder_is_claimed(tmp_path: Path):
    images = np.zeros((50, 8, 8, 3), np.uint8)
    config = Config(**{**TINY, "name": "x", "runs": tmp_path, "device": "cpu", "cuda_graph": True, "eval_every": 0})
    with pytest.raises(ValueError, match="cuda_graph must be False without a CUDA device"):
        loop.train(config, memory_store("zeros", images), resume=False)
    assert not list(tmp_path.iterdir())


def test_a_capture_that_fails_fails_again_and_nothing_is_replayed():
    class Failing(NeverCaptured):
        def capture(self, _: object) -> None:
            raise RuntimeError("out of memory")

        def replay(self) -> None:
            raise AssertionError("there is nothing to replay")

    step = CapturedStep(lambda _: {}, Failing())
    inputs = [OfGenerator(torch.ones(2, 3), None)]
    for _ in range(EAGER_STEPS):
        step(inputs)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            step(inputs)


def test_compiled_networks_are_refused():
    with pytest.raises(ValueError, match="cuda_graph must be False with compile, got True"):
        configured({"cuda_graph": True, "compile": True})
