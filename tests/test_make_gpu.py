"""`make gpu`: time on a GPU is short, so what it runs is tried without one, and ends with results whatever happens."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ON
from gan import run

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(ON == "cuda", reason="for machines without a GPU")

ROOT = Path(__file__).parent.parent
LASTING = """
import os, time
child = os.fork()
if not child:
    time.sleep(60)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("wrote what there was", child, flush=True)
"""


@pytest.fixture
def make_gpu():
    spec = importlib.util.spec_from_file_location("make_gpu", ROOT / ".ci" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def device_times(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import device_times

    return device_times


def alive(process: int) -> bool:
    """Not a zombie that nobody has waited for yet."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def _interrupts_are_ignored():
    """As in what a shell has started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts_are_ignored")
def test_a_step_whose_time_is_over_writes_its_results_and_leaves_nothing_running(make_gpu, tmp_path):
    steps = [make_gpu.Step("lasting", 6, [sys.executable, "-c", LASTING])]  # to start takes seconds on a busy machine
    assert make_gpu.run_part(1, steps, tmp_path)
    log = (tmp_path / "gpu-1.log").read_text()
    (line,) = [line for line in log.splitlines() if line.startswith("wrote what there was")]
    deadline = time.monotonic() + 10
    while alive(int(line.split()[-1])):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_step_that_cannot_be_interrupted_is_ended(make_gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_gpu, "GRACE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    begin = time.monotonic()
    assert not make_gpu.run_part(1, [make_gpu.Step("deaf", 1, [sys.executable, "-c", code])], tmp_path)
    assert time.monotonic() - begin < 30
    assert "deaf: OUT OF TIME" in capsys.readouterr().out


def test_a_step_that_takes_what_is_left_leaves_the_others_their_time(make_gpu, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(make_gpu, "run", lambda *arguments: given.append(arguments[-1]) or "passed")
    steps = [make_gpu.Step(name, seconds, []) for name, seconds in (("first", 5), ("open", None), ("last", 10))]
    make_gpu.run_part(1, steps, tmp_path, make_gpu.GRACE + 40)
    assert given == [5, pytest.approx(30, abs=1), 10]


def test_a_step_that_fails_or_is_not_there_keeps_no_other_from_running(make_gpu, tmp_path, capsys):
    good = make_gpu.Step("good", 60, [sys.executable, "-c", "print('here')"])
    bad = make_gpu.Step("bad", 60, [sys.executable, "-c", "raise SystemExit(3)"])
    assert not make_gpu.run_part(2, [make_gpu.Step("missing", 60, ["no-such-program"]), bad, good], tmp_path)
    said = capsys.readouterr().out
    assert "missing: FAILED, no-such-program is not here" in said
    assert "bad: FAILED with 3" in said
    assert "good: passed" in said
    assert not make_gpu.run_part(2, [bad._replace(name="versions"), good], tmp_path)  # without a GPU nothing else can
    assert "good" not in capsys.readouterr().out


@pytest.mark.parametrize("rehearse", [False, True])
def test_parts_fit_in_their_time_and_name_files_that_exist(make_gpu, rehearse):
    parts = make_gpu.parts(Path("out"), rehearse)
    assert make_gpu.LIMIT <= 540
    for steps in parts.values():
        words = list(itertools.chain(*(step.command for step in steps)))
        files = [word for word in words if word.startswith(("tests", "bench/", "setup"))]
        assert files
        assert all((ROOT / name).exists() for name in files)
        assert len({word for word in words if "out/" in word}) <= 7  # and the log
        assert [step.seconds for step in steps].count(None) == 1
        assert sum(90 if step.seconds is None else step.seconds for step in steps) <= make_gpu.LIMIT - make_gpu.GRACE
        assert not steps[-1].beside


def test_steps_beside_another_have_logs_of_their_own_and_end_with_it(make_gpu, tmp_path, capsys):
    mark = tmp_path / "mark"
    slow = "import sys, time, pathlib; print('begins', flush=True); pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    waits = "import sys, time, pathlib\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)"
    steps = [
        make_gpu.Step("slow", 0, [sys.executable, "-c", slow, str(mark)], beside=True),
        make_gpu.Step("missing", 0, ["no-such-program"], beside=True),
        make_gpu.Step("main", 50, [sys.executable, "-c", waits, str(mark)]),
        make_gpu.Step("next", 50, [sys.executable, "-c", "print('after it')"]),
    ]
    begin = time.monotonic()
    assert not make_gpu.run_part(1, steps, tmp_path)
    assert time.monotonic() - begin < 50
    said = [line.split(" in ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("==")]
    assert said == [
        "== part 1, main: passed",
        "== part 1, slow: OUT OF TIME",
        "== part 1, missing: FAILED, no-such-program is not here",
        "== part 1, next: passed",
    ]
    assert (tmp_path / "gpu-1-slow.log").read_text().startswith("begins\n")


def test_failed_tests_are_named_wherever_the_log_has_them(make_gpu, tmp_path, capsys):
    code = "print('[gw3] [  1%] FAILED tests/test_it.py::test_that ', *range(100), sep='\\n'); raise SystemExit(1)"
    make_gpu.run_part(1, [make_gpu.Step("tests", 50, [sys.executable, "-c", code])], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("[gw3] [  1%] FAILED tests/test_it.py::test_that")
    assert lines[2] == "60"


def test_a_result_that_changes_now_and_then_is_counted():
    import stress

    steady = torch.tensor([1.0, float("nan")])
    assert stress.differing(lambda: [steady, steady], 5) == 0
    runs = itertools.count()
    assert stress.differing(lambda: [steady, torch.tensor(0.0 if next(runs) % 2 else -0.0)], 5) == 3


def test_device_times_are_those_of_all_ops_and_of_their_bytes(device_times):
    case = device_times.Case(device_times.SMALL)
    rows = device_times.measured(case)
    assert [row["name"] for row in rows] == list(device_times.OPS)
    for row in rows:
        assert row["weights_MB"] == pytest.approx(4 * (8 * 4 * 9 + 6 * 8 * 16) / 1e6)
        passes = row["GB_per_s"] * row["us"] / (row["weights_MB"] * 1e3)
        assert passes == pytest.approx(device_times.OPS[row["name"]])


def test_a_kernel_takes_the_median_of_its_replays_all_its_launches_together(device_times):
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    replays = device_times.REPLAYS

    def event(name: str, at: int, microseconds: float, kind=cuda) -> SimpleNamespace:
        span = SimpleNamespace(start=at)
        return SimpleNamespace(name=name, time_range=span, device_time=microseconds, device_type=kind)

    events = [event("iterate", 10 * i + j, 3.0 + j) for j in (0, 1) for i in range(replays)]  # 3 and 4 of each replay
    events += [event("rescale", 10 * i, 1e6 if i == 5 else 2.0) for i in range(replays)]  # one that was disturbed
    events += [event("Memset (Device)", i, 9.0) for i in range(replays)] + [event("iterate", 0, 9.0, cpu)]
    found = device_times.of_kernels(events)
    assert found == {"iterate": pytest.approx(7e-6), "rescale": pytest.approx(2e-6)}


def test_results_name_the_commit_where_there_is_no_git(device_times, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSN_COMMIT", "0123456789ab-dirty")
    monkeypatch.setattr(device_times, "cases", lambda: iter([device_times.Case(device_times.SMALL)]))
    device_times.measure_all(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["commit"] == "0123456789ab-dirty"
    assert os.listdir(tmp_path) == ["out.json"]
    assert run.environment(torch.device("cpu"))["commit"] == "0123456789ab-dirty"  # of training
