"""Sweeps as jobs of Slurm: through submitit's executor for debugging, and through a stand-in for Slurm's commands."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from submitit.local import debug

import fake_slurm
import sweep
from gan.sweep import grid, overview, plan, slurm, state
from gan.sweep.state import State
from sweep_stubs import started, stubs
from test_sweep import GRID, SMALL
from tiny_runs import rows, share_classifier, threads, tiny


@pytest.fixture(autouse=True)
def _a_slot_for_stubs(monkeypatch):
    monkeypatch.setenv("SLOT", "node")


@pytest.fixture(autouse=True)
def _logs_are_closed(monkeypatch):
    """submitit's executor for debugging leaves its logs open: what collects them later, in any test, would warn."""
    opened = []

    class Closed(logging.FileHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            opened.append(self)

    monkeypatch.setattr(debug.logging, "FileHandler", Closed)
    yield
    for handler in opened:
        handler.close()


def submit(runs: list[plan.Run], folder: Path, cluster: str = "debug") -> list:
    return slurm.submit(runs, folder / ".sweep" / "submitit", {}, cluster=cluster)


def test_a_job_trains_its_run_and_writes_down_how_it_went(tmp_path, monkeypatch):
    monkeypatch.setattr("pdb.post_mortem", lambda *_: None)  # which that calls
    runs = stubs(tmp_path, [{"seconds": 0}, {"seconds": 0, "how": "crash"}, {"seconds": 0, "how": "asked once"}])
    jobs = submit(runs, tmp_path / "grid")
    assert [state.record(run.config).where for run in runs] == [f"job {job.job_id}" for job in jobs]
    assert started(tmp_path) == []
    monkeypatch.setattr(slurm, "alive", set)  # all of them wait
    assert overview.states(runs) == [State.SUBMITTED] * 3
    assert overview.to_start(runs) == overview.to_start(runs, again=True) == []
    assert f"submitted run-0: job {jobs[0].job_id}" in overview.status(runs)
    assert jobs[0].result() == 0
    with pytest.raises(RuntimeError, match="run-1 crashed: error: lr_g must be finite, got nan"):
        jobs[1].result()
    assert jobs[2].result() == 75
    monkeypatch.setattr(slurm, "alive", lambda _: set())  # none does
    assert overview.states(runs) == [State.DONE, State.CRASHED, State.STOPPED]


def test_a_run_that_another_process_has_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr("pdb.post_mortem", lambda *_: None)
    (run,) = stubs(tmp_path, [{"seconds": 0}])
    (job,) = submit([run], tmp_path / "grid")
    with state.lock(run.config), pytest.raises(RuntimeError, match="run-0 is running already"):
        job.result()
    assert started(tmp_path) == []


def test_what_submitit_refuses_is_one_line(tmp_path, monkeypatch):
    runs = stubs(tmp_path, [{"seconds": 0}])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match='slurm: Could not detect "srun"'):
        submit(runs, tmp_path / "grid", "slurm")
    for name, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"slurm: .*slurm_speed"):
        slurm.submit(runs, tmp_path / "submitit", {"slurm_speed": 1})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"slurm needs submitit: pip install 'fastsn\[slurm\]'"):
        submit(runs, tmp_path / "grid")
    assert state.state(runs[0].config) is State.NEW
    assert slurm.options(["timeout_min=60", "slurm_partition=gpu"]) == {"timeout_min": 60, "slurm_partition": "gpu"}


def test_an_array_of_real_runs_one_of_which_is_preempted(tmp_path, classifier_cache, grid_files, monkeypatch, capsys):
    """sbatch starts them, USR2 (the end of a job's time) comes while one trains: it writes a checkpoint and goes back
    into the queue, and ends with the scores that it would have had."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runs = tmp_path / "runs"
    runs.mkdir()
    fields = {**SMALL, "steps": 60, "eval_every": 60, "checkpoint_every": 60, "log_every": 1}
    (grid_files / "mine.py").write_text(GRID.replace("FIELDS", repr(fields)))
    share_classifier(classifier_cache, runs)
    for name, value in {**fake_slurm.install(tmp_path / "slurm"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    line = ["three", "--runs", str(runs), "--only", "*seed-0", "*seed-1"]
    to_slurm = ["--slurm", "--slurm-options", "gpus_per_node=0", "timeout_min=60"]
    sweep.main(["run", *line, *to_slurm])
    first, second = planned = plan.runs("three", grid.find("three"), runs, tmp_path, ("*seed-0", "*seed-1"))
    assert [x.split(": ")[1] for x in capsys.readouterr().out.splitlines()] == ["job 4711_0", "job 4711_1"]
    assert "#SBATCH --array=0-1" in (tmp_path / "slurm/jobs/4711.sh").read_text()
    assert "#SBATCH --time=60" in (tmp_path / "slurm/jobs/4711.sh").read_text()
    sweep.main(["run", *line, *to_slurm])  # they are there already
    assert len(list((tmp_path / "slurm/jobs").glob("*.sh"))) == 1
    wait_until(lambda: state.step_of(first.config) > 0)
    os.kill(submitit_process(tmp_path, "4711_0"), signal.SIGUSR2)
    wait_until(lambda: overview.states(planned) == [State.DONE] * 2, told=lambda: overview.status(planned))
    assert (tmp_path / "slurm/jobs/requeued").read_text() == '"4711_0"\n'
    assert "stopped by SIGTERM at step" in (first.folder / "worker.log").read_text()
    assert "continuing from" in (first.folder / "worker.log").read_text()
    assert "continuing from" not in (second.folder / "worker.log").read_text()
    with threads(1):
        own = tiny(tmp_path, classifier_cache, "alone", **{**fields, "seed": 0, "norm": "sn"})
    assert rows(own) == rows(first.folder)


def submitit_process(folder: Path, job: str) -> int:
    """Of the job's newest start; bash has become it, or is its parent."""
    found = int((folder / f"slurm/jobs/{job}.pids").read_text().split()[-1])
    children = Path(f"/proc/{found}/task/{found}/children").read_text().split()
    return int(children[0]) if children else found


def wait_until(condition, told=str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.05)
