"""bench/training_step.py: time on a GPU is short, so all of it that can runs here, and what fails keeps the rest."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ON

pytestmark = pytest.mark.skipif(ON == "cuda" or torch.cuda.is_available(), reason="for machines without a GPU")

ROOT = Path(__file__).parent.parent
SMALL = ["--batch", "2", "--width", "4", "--seconds", "0"]


@pytest.fixture
def discriminator(monkeypatch):
    """One compiler that needs no C++ compiler."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import discriminator

    monkeypatch.setattr(discriminator, "BACKEND", "aot_eager")
    yield discriminator
    torch.compiler.reset()


@pytest.fixture
def training_step(discriminator, monkeypatch):  # noqa: ARG001 - its path
    import training_step

    captured, *_ = training_step.FIRST
    few = partial(training_step.Group, "eager", (training_step.PLAIN, training_step.TORCH, "fastsn BSSN in a step"))
    monkeypatch.setattr(training_step, "FIRST", [captured, few()])
    monkeypatch.setattr(training_step, "REST", [few("bfloat16")])
    return training_step


def run(training_step, monkeypatch, tmp_path, *more: str) -> dict[str, list[dict[str, object]]]:
    monkeypatch.setattr("sys.argv", ["training_step.py", "--out", str(tmp_path / "out.json"), *SMALL, *more])
    with warnings.catch_warnings():  # the compiler imports modules that torch itself has deprecated
        warnings.simplefilter("ignore")
        training_step.main()
    return json.loads((tmp_path / "out.json").read_text())["results"]


def test_every_contestant_has_its_figures(training_step, discriminator, monkeypatch, tmp_path, capsys):
    captured, few = training_step.FIRST
    every = few._replace(contestants=tuple(discriminator.NORMALIZATIONS))
    compiled = training_step.Group("compiled", few.contestants[::2])
    monkeypatch.setattr(training_step, "FIRST", [captured, every, compiled])
    monkeypatch.setattr(training_step, "REST", [few._replace(variant=x) for x in ("bfloat16", "channels_last")])
    results = run(training_step, monkeypatch, tmp_path)
    assert "without a GPU no compiled, reduce-overhead and no captured steps" in capsys.readouterr().out
    steps = results["steps"]
    assert all("error" not in row for row in (*steps, *results["normalization_alone"])), steps
    assert [row["contestant"] for row in steps[:9]] == list(discriminator.NORMALIZATIONS)
    assert [row["mode"] for row in steps] == ["eager"] * 9 + ["compiled"] * 2 + ["eager"] * 6
    assert [row["precision"] for row in steps[11:]] == ["bfloat16 autocast"] * 3 + ["float32"] * 3
    assert steps[-1]["layout"] == "channels_last"
    for row in steps:
        same = [x for x in steps if all(x[key] == row[key] for key in ("mode", "precision", "layout"))]
        (plain,) = [x for x in same if x["contestant"] == "no normalization"]
        assert row["wall_ms"] > 0
        assert row["percent_of_plain"] == pytest.approx(100 * row["normalization_ms"] / plain["wall_ms"], rel=1e-2)
    alone = [row["contestant"] for row in results["normalization_alone"]]
    assert alone == ["torch SN eager", "fastsn BSSN whole model"]


def test_who_fails_has_its_error_in_its_row_and_the_others_their_figures(training_step, discriminator, monkeypatch):
    captured, eager = training_step.FIRST
    setting = discriminator.Setting(2, 4)
    without_a_gpu = training_step.steps_of(captured, setting, 0)
    assert [row["contestant"] for row in without_a_gpu] == list(captured.contestants)
    assert all(
        ("CUDA" in row["error"] or "NVIDIA" in row["error"]) and len(row["error"]) <= 410 for row in without_a_gpu
    )
    wrong = dataclasses.replace(discriminator.NORMALIZATIONS["torch SN"], bssn=True)  # another scale
    monkeypatch.setitem(discriminator.NORMALIZATIONS, "torch SN", wrong)
    rows = {row["contestant"]: row for row in training_step.steps_of(eager, setting, 0)}
    assert "layer 0 has the norm" in rows["torch SN"]["error"]
    assert [name for name, row in rows.items() if "normalization_ms" not in row] == ["torch SN"]
    assert not any("times_less_than_torch_SN" in row for row in rows.values())


def test_what_follows_an_error_is_measured_in_another_process(training_step, discriminator, monkeypatch, tmp_path):
    class Replaced(Exception):
        pass

    started = []

    def execv(path: str, arguments: list[str]) -> None:
        started.append((path, arguments))
        raise Replaced

    def broken(_: object) -> object:
        try:
            raise ValueError("not while capturing")
        finally:
            raise RuntimeError("the capture has failed")

    monkeypatch.setattr("os.execv", execv)
    with monkeypatch.context() as patched:
        patched.setitem(discriminator.MODES, "eager", broken)
        with pytest.raises(Replaced):
            run(training_step, monkeypatch, tmp_path)
    ((path, arguments),) = started
    assert path == arguments[0] == sys.executable
    assert arguments[1:] == [training_step.__file__, "--out", str(tmp_path / "out.json"), *SMALL, "--go-on"]
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {row["error"] for row in results["steps"]} == {
        "RuntimeError: the capture has failed after ValueError: not while capturing"
    }
    results = run(training_step, monkeypatch, tmp_path, "--go-on")
    assert ["error" in row for row in results["steps"]] == [True] * 3 + [False] * 3
    assert results["groups"][0] == "eager"
    assert len(results["normalization_alone"]) == 2
    assert len(started) == 1


def test_device_time_is_that_of_kernels_and_not_of_ranges_with_a_name(discriminator, monkeypatch):  # noqa: ARG001
    import measure

    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    kinds = [("kernel", cuda, 3.0, False), ("Memset", cuda, 1.0, False), ("Optimizer.step#Adam.step", cuda, 9.0, True)]
    events = [
        SimpleNamespace(name=name, device_type=kind, device_time=us, is_user_annotation=named)
        for name, kind, us, named in [*kinds, ("launch", cpu, 5.0, False)] * 2
    ]
    profile = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: nullcontext(profile))
    steps = []
    assert measure.on_the_device(lambda: steps.append(1), 2) == (pytest.approx(4e-6), 2)
    assert len(steps) == 2


def test_an_interrupt_loses_only_the_group_it_comes_in(training_step, monkeypatch, tmp_path):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training_step, "alone", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(training_step, monkeypatch, tmp_path)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results["steps"]) == 3
    assert results["normalization_alone"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda train: (train.update(), train.update())[1],
        lambda train: train.loss().detach(),
        lambda train: (train.model(train.real), train.update())[1],
    ],
    ids=["two steps for one", "no update", "an iteration too many"],
)
def test_a_step_that_is_not_the_eager_one_is_seen(discriminator, wrong):
    train = discriminator.TrainingStep("fastsn BSSN per layer", discriminator.Setting(2, 4))
    train.update()
    states = list(train.model.parameters()), list(train.model.buffers()), train.optimizer_state()
    discriminator.check_same(train.update, train.update, *states)
    with pytest.raises(AssertionError, match=r"not close|are off by"):
        discriminator.check_same(partial(wrong, train), train.update, *states)
