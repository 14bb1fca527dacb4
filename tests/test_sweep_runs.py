"""Runs of a sweep on slots: how many at a time, what is started again, what stops them."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from gan.loop import REQUEUE
from gan.sweep import local, overview, slots, state
from gan.sweep.state import State
from sweep_stubs import journal, started, stubs
from sweep_stubs import slots as made_slots


@pytest.fixture(autouse=True)
def _own_locks_of_slots(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(local, "POLL", 0.005)


def states(runs):
    return [state.state(run.config) for run in runs]


@pytest.mark.parametrize("seed", range(3))
def test_a_slot_has_one_run_at_a_time_and_every_run_its_turn(tmp_path, seed):
    draw = random.Random(seed)
    count, lasting = draw.choice([1, 2, 3]), [draw.choice([0, 0.005, 0.05, 0.1]) for _ in range(14)]
    runs = stubs(tmp_path, [{"seconds": x} for x in lasting])
    local.Pool(runs, made_slots(count)).run()
    busy: Counter[str] = Counter()
    for what, _, slot, *_ in journal(tmp_path):
        busy[slot] += 1 if what == "starts" else -1
        assert busy[slot] in (0, 1)
    assert set(busy) <= {str(i) for i in range(count)}
    assert sorted(started(tmp_path)) == sorted(run.name for run in runs)
    assert states(runs) == [State.DONE] * len(runs)


def test_two_sweeps_share_the_slots_of_a_machine(tmp_path):
    runs, others = (stubs(tmp_path / x, [{"seconds": 0.03}] * 6) for x in "ab")
    pool, other = local.Pool(runs, made_slots(2)), local.Pool(others, made_slots(2))
    while pool.waiting or pool.active or other.waiting or other.active:  # what Pool.run does, of both by turns
        for one in (pool, other):
            one._look()
            one._fill()
    spans = sorted((t, 1 if what == "starts" else -1) for x in "ab" for what, _, _, t, _ in journal(tmp_path / x))
    at_a_time = 0
    for _, change in spans:
        at_a_time += change
        assert at_a_time <= 2
    assert states([*runs, *others]) == [State.DONE] * 12


def test_a_run_that_fails_leaves_the_others_and_is_started_again_by_retry_alone(tmp_path):
    fields = [{"seconds": 0, "how": how} for how in ("crash", "", "killed", "")]
    runs = stubs(tmp_path, fields)
    with pytest.raises(ValueError, match=r"2 of 4 runs crashed \(retry starts them again\): run-0, run-2"):
        local.Pool(overview.to_start(runs), made_slots(1)).run()
    assert states(runs) == [State.CRASHED, State.DONE, State.CRASHED, State.DONE]
    text = overview.status(runs)
    assert "4 runs: 2 crashed, 2 done" in text
    assert "error: lr_g must be finite, got nan" in text
    assert "killed by SIGKILL" in text
    assert overview.to_start(runs) == []
    again = overview.to_start(stubs(tmp_path, [{"seconds": 0}] * 4), again=True)
    assert [run.name for run in again] == ["run-0", "run-2"]
    local.Pool(again, made_slots(1)).run()
    assert started(tmp_path) == ["run-0", "run-1", "run-2", "run-3", "run-0", "run-2"]
    assert overview.to_start(runs) == overview.to_start(runs, again=True) == []
    assert "4 runs: 4 done" in overview.status(runs)


def test_a_full_disk_ends_the_sweep_and_not_every_run_of_it(tmp_path):
    runs = stubs(tmp_path, [{"seconds": 0}, {"seconds": 0, "how": "full"}, {"seconds": 0}])
    with pytest.raises(ValueError, match=r"runs must have room on the disk, got run-1: .*No space left on device"):
        local.Pool(runs, made_slots(1)).run()
    assert states(runs) == [State.DONE, State.CRASHED, State.NEW]


def test_a_record_that_cannot_be_written_is_an_error_and_asks_the_runs_to_stop(tmp_path, monkeypatch):
    runs = stubs(tmp_path, [{"seconds": 0}, {"seconds": 60}])
    write, written = state.write_record, []

    def until_full(config, record):
        written.append(record)
        if len(written) > 2:
            raise OSError(28, "cannot write the record: No space left on device")
        write(config, record)

    monkeypatch.setattr(state, "write_record", until_full)
    with pytest.raises(OSError, match="No space left"):
        local.Pool(runs, made_slots(2)).run()
    assert states(runs) == [State.DONE, State.STOPPED]


def test_a_run_that_was_asked_to_stop_has_its_turn_after_the_others(tmp_path):
    runs = stubs(tmp_path, [{"seconds": 0, "how": "asked once"}, {"seconds": 0}])
    local.Pool(runs, made_slots(1)).run()
    assert started(tmp_path) == ["run-0", "run-1", "run-0"]
    assert states(runs) == [State.DONE] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_with_a_checkpoint_and_the_same_sweep_goes_on(tmp_path, number):
    runs = stubs(tmp_path, [{"seconds": 60}] * 2 + [{"seconds": 0}] * 2)
    when_started(tmp_path, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        local.Pool(runs, made_slots(2)).run()
    assert ended.value.code == REQUEUE
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert states(runs) == [State.STOPPED] * 2 + [State.NEW] * 2
    shorter = stubs(tmp_path, [{"seconds": 0}] * 4)
    local.Pool(overview.to_start(shorter), made_slots(2)).run()
    assert states(runs) == [State.DONE] * 4


def test_a_second_signal_kills_and_what_was_killed_goes_on_all_the_same(tmp_path):
    runs = stubs(tmp_path, [{"seconds": 60, "how": "deaf"}])

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    when_started(tmp_path, 1, twice)
    with pytest.raises(SystemExit):
        local.Pool(runs, made_slots(1)).run()
    assert state.record(runs[0].config).status is None
    assert states(runs) == [State.STOPPED]


def when_started(parent: Path, count: int, call) -> None:
    def watch() -> None:
        while len(started(parent)) < count:
            time.sleep(0.005)
        call()

    threading.Thread(target=watch, daemon=True).start()


def test_a_run_whose_sweep_is_gone_keeps_its_slot_and_is_not_started_twice(tmp_path):
    """The process has the locks, whatever has become of who started it."""
    run, other = stubs(tmp_path, [{"seconds": 0.5}, {"seconds": 0}])
    pool = local.Pool([run], made_slots(1))
    pool._fill()
    process = pool.active.popitem()[1]  # as if the sweep had been killed
    assert states([run]) == [State.RUNNING]
    assert overview.to_start([run, other]) == [other]
    assert "running   run-0 on cpu:0: step 0 of 3" in overview.status([run, other])
    local.Pool([run, other], made_slots(1)).run()
    assert started(tmp_path) == ["run-0", "run-1"]
    first, second = ([line[3] for line in journal(tmp_path) if line[1] == x] for x in ("run-0", "run-1"))
    assert first[1] <= second[0]  # run-1 waited for the slot
    assert process._process.wait() == 0
    assert states([run, other]) == [State.DONE] * 2


def test_a_run_that_nobody_saw_end_is_continued(tmp_path):
    (run,) = stubs(tmp_path, [{"seconds": 60, "how": "deaf"}])
    pool = local.Pool([run], made_slots(1))
    pool._fill()
    process = pool.active.popitem()[1]._process
    process.kill()
    process.wait()
    assert states([run]) == [State.STOPPED]
    assert overview.to_start([run]) == [run]


def test_checkpoints_may_be_deleted_when_a_run_is_done(tmp_path):
    (run,) = stubs(tmp_path, [{"seconds": 0}])
    local.Pool([run], made_slots(1)).run()
    for file in (run.folder / "checkpoint").iterdir():
        file.unlink()
    assert states([run]) == [State.STOPPED]
    (run.folder / "time.txt").write_text("iter 1 starts: 2026\niter 3 starts: 2026\niter 3 ends: 2026\n")
    assert states([run]) == [State.DONE]


def test_a_damaged_record_is_named(tmp_path):
    (run,) = stubs(tmp_path, [{"seconds": 0}])
    path = tmp_path / "grid/.sweep/run-0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"what": 1}))
    with pytest.raises(ValueError, match=r"run-0\.json must be a record of a run, got something else: delete it"):
        state.state(run.config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "slots must be cpu:N or numbers of GPUs, got none"),
        (["cpu"], r"slots must be cpu:N with N from 1 to the \d+ cores, or numbers of GPUs, got 'cpu'"),
        (["cpu:0"], "got 'cpu:0'"),
        (["cpu:1000"], "got 'cpu:1000'"),
        (["gpu1"], r"slots must be cpu:N or numbers of this machine's \d+ GPUs, from 0, got 'gpu1'"),
        (["99"], "got '99'"),
        (["cpu:1", "cpu:1"], "slots must each be named once, got cpu:0 more than once"),
    ],
)
def test_slots_that_are_not_there(given, message):
    with pytest.raises(ValueError, match=message):
        slots.parse(given)


def test_slots_divide_the_cores_or_are_gpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found = slots.parse(["cpu:3"])
    assert [s.name for s in found] == ["cpu:0", "cpu:1", "cpu:2"]
    assert {s.variables["OMP_NUM_THREADS"] for s in found} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [(s.name, s.device, s.variables) for s in slots.parse(["0", "1"])] == [
        ("cuda:3", "cuda", {"CUDA_VISIBLE_DEVICES": "3"}),
        ("cuda:5", "cuda", {"CUDA_VISIBLE_DEVICES": "5"}),
    ]
    assert slots.default() == ["0", "1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert slots.default() == ["cpu:1"]
