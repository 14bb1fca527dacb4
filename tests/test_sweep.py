"""Grids, plans and tables of sweeps, and the command line from the first run to the table."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sweep
from gan import run
from gan.data.digits import digits as digit_store
from gan.sweep import grid, overview, plan, state, table
from gan.sweep.grid import Entry, Grid, product, scaled, seeds, values
from gan.sweep.state import State
from tiny_runs import TINY, share_classifier, threads, tiny

ROOT = Path(__file__).parent.parent
SMALL = {**TINY, "steps": 4, "eval_every": 2}
del SMALL["device"]  # the slot's


def planned(name: str, tmp_path: Path, only: tuple[str, ...] = ()) -> list[plan.Run]:
    return plan.runs(name, grid.find(name), tmp_path / "runs", tmp_path / "data", only)


@pytest.mark.parametrize(
    ("name", "entries", "unique", "millions"),
    [
        ("bsn-cnn", 480, 450, 220),
        ("bsn-cnn-same-gamma", 75, 75, 38),
        ("bsn-cnn-different-gamma", 75, 75, 38),
        ("bsn-resnet", 24, 24, 12),
    ],
)
def test_the_grids_of_the_bsn_authors_have_their_numbers_of_runs(name, entries, unique, millions, tmp_path):
    runs = planned(name, tmp_path)
    assert len(grid.find(name).entries) == entries
    assert len(runs) == len({r.name for r in runs}) == unique
    assert sum(r.config.steps for r in runs) == millions * 10**6
    text = overview.plan(entries, runs, 1, False, "cpu")
    assert f"{entries} runs, {unique} of them unique, 0 done" in text
    assert f"{millions},000,000 steps in all" in text


def test_every_grid_has_runs_that_its_recipes_take(tmp_path):
    for name in grid.known():
        for made in planned(name, tmp_path):
            assert made.config.name == f"{name}/{made.name}"
            assert made.folder == tmp_path / "runs" / name / made.name


def test_a_scale_of_1_is_the_variant_without_one():
    assert scaled("bssn", 0.7, 1) == [{"norm": "bssn", "scale": 0.7}, {"norm": "bsn", "scale": 1}]


def test_a_command_line_gives_the_config_that_was_planned(tmp_path, monkeypatch):
    (made,) = planned("bsn-cnn", tmp_path, ("stl10,norm-bssn,scale-1.4,*,seed-2",))
    seen = []
    import stl10

    monkeypatch.setattr(stl10.recipe, "open_data", lambda config: config)
    monkeypatch.setattr(stl10.recipe, "train", lambda config, _, resume, __: seen.append((config, resume)))
    stl10.cli.start(stl10.main, stl10.PRESETS, made.arguments()[2:])
    ((config, resume),) = seen
    assert resume
    assert config == made.config
    assert config.data == tmp_path / "data" / "stl10"


def test_runs_of_one_name_are_refused_with_what_tells_them_apart(tmp_path):
    twice = Grid("", ("seed",), product("digits", [SMALL], values("lr_g", 1e-4, 2e-4), seeds(1)))
    message = r"grid 'twice' must name its runs apart, got two that are called 'seed-0': lr_g 0\.0001 and 0\.0002"
    with pytest.raises(ValueError, match=message):
        plan.runs("twice", twice, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry("digits", {"lr": 1}), "fields of a run of digits.py must be of its config, got lr"),
        (Entry("nothing", {}), "recipe must be a file of train/, got 'nothing'"),
        (Entry("digits", {"norm": "sn", "scale": 2.0}), r"scale must be 1\.0 with norm 'sn'"),
    ],
)
def test_entries_that_are_no_run(entry, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan.runs("x", Grid("", ("seed",), [entry]), tmp_path, tmp_path)


def test_a_grid_that_does_not_exist_or_exists_twice(grid_files):
    with pytest.raises(ValueError, match=r"grid must be one of bsn-cnn, .*digits-scales.*, got 'bsn'"):
        grid.find("bsn")
    (grid_files / "copied.py").write_text("from grids.digits import GRIDS\n")
    with pytest.raises(ValueError, match="must be in one file of train/grids, got another in"):
        grid.known()


def test_a_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"only must match runs of 'digits-scales', such as 'norm-.*', got 'norm-x'"):
        planned("digits-scales", tmp_path, ("*seed-0", "norm-x"))


def test_missing_data_is_said_of_all_runs_before_anything_starts(tmp_path):
    runs = planned("bsn-cnn", tmp_path)
    with pytest.raises(ValueError, match=r"data must hold, for 450 of 450 runs, .*/celeba, .*/cifar10, .*/stl10"):
        plan.check(runs)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit, match="error: data must hold"):
        sweep.main(["run", "bsn-cnn", "--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--slots", "cpu:1"])
    assert not (tmp_path / "runs").exists()


def test_data_that_does_not_fit_is_said_with_the_run(tmp_path):
    runs = plan.runs("x", Grid("", ("seed",), product("digits", [{"batch_size": 4000}], seeds(1))), tmp_path, tmp_path)
    with pytest.raises(ValueError, match="x/seed-0: batch_size must be at most the 1797 images of digits, got 4000"):
        plan.check(runs)


def test_one_data_folder_may_be_given_itself(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    (made,) = plan.runs("x", Grid("", ("seed",), product("cifar10", seeds(1))), tmp_path, tmp_path)
    assert made.data == tmp_path


def test_a_folder_of_another_identity_is_refused(tmp_path):
    small = Grid("", ("seed",), product("digits", [SMALL], seeds(1)))
    (made,) = plan.runs("x", small, tmp_path, tmp_path)
    run.claim(dataclasses.replace(made.config, lr_g=0.25), digit_store(8), False, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"got .*seed-0 with another \(lr_g: 0\.25 there, 0\.005 here\)"):
        plan.check([made])


def test_hours_are_those_of_runs_that_are_there_or_of_steps_that_are_timed(tmp_path):
    runs = plan.runs(
        "x",
        Grid("", ("n_dis", "seed"), product("digits", [SMALL], values("n_dis", 1, 2), seeds(2))),
        tmp_path,
        tmp_path,
    )
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "metrics.csv").write_text("step,seconds\n2,7200\n")  # an hour a step
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "metrics.csv").write_text("step,seconds\n")  # not evaluated yet
    (runs[0].folder / "scalars.jsonl").write_text('{"step": 3}\n')
    text = overview.plan(4, runs, 2, False, "cpu")
    assert "16 steps in all, 13 left" in text
    assert "about 2.50 hours on 2 slots for 2 of the 4 runs" in text  # 1 and 4 steps
    assert "no speed is known of 2 runs: --measure" in text
    text = overview.plan(4, runs, 1, True, "cpu")
    assert "about 5.00 hours on 1 slot" in text
    assert "no speed" not in text


def scored(
    runs: list[plan.Run], scores: dict[str, list[tuple[int, float, float]]], protocol: str = "digits-9r"
) -> None:
    """Written as runs that are done."""
    for made in runs:
        if made.name in scores:
            (made.folder / "checkpoint").mkdir(parents=True)
            (made.folder / f"checkpoint/step-{made.config.steps:08d}.pt").touch()
            (made.folder / "config.json").write_text("{}")
            rows = [["step", "fid", "inception_score_mean", "kid_mean", "seconds", "protocol", "network", "weights"]]
            for step, fid, score in scores[made.name]:
                cell = "" if np.isnan(fid) else f"{fid}"
                rows.append([str(step), cell, f"{score}", "", "1", protocol, "abc", "raw"])
            (made.folder / "metrics.csv").write_text("\n".join(",".join(r) for r in rows) + "\n")


def test_a_table_has_means_and_standard_errors_of_last_and_best_and_marks_what_is_missing(tmp_path):
    choices = [{"norm": "sn"}, {"norm": "bsn"}, {"norm": "none"}]
    runs = plan.runs("x", Grid("", ("norm", "seed"), product("digits", [SMALL], choices, seeds(3))), tmp_path, tmp_path)
    scores = {
        "norm-sn,seed-0": [(2, 8.0, 1.0), (4, 6.0, 2.0)],
        "norm-sn,seed-1": [(2, 3.0, 5.0), (4, 9.0, 4.0)],
        "norm-sn,seed-2": [(2, 7.0, 1.5), (4, 7.0, 3.0)],
        "norm-bsn,seed-0": [(2, 5.0, 1.0), (4, float("nan"), 1.0)],
        "norm-bsn,seed-1": [(2, 4.0, 1.0), (4, 2.0, 3.0)],
    }
    scored(runs, scores)
    rows = table.rows(runs)
    assert set(rows[0]) == {"run", "state", "norm", "seed", *table._SCORES}
    table.write(tmp_path / "rows.csv", rows, {})
    assert table.read(tmp_path / "rows.csv") == rows

    def expected(*found: float) -> str:
        return f"{statistics.mean(found):.2f} ± {np.std(found, ddof=1) / np.sqrt(len(found)):.2f}"

    lines = table.markdown(rows).splitlines()
    assert lines[0] == "| norm | seeds | digit FID, last | digit FID, best | digit score, last | digit score, best |"
    cells = [expected(6, 9, 7), expected(6, 3, 7), expected(2, 4, 3), expected(2, 5, 3)]
    assert lines[2] == f"| sn | 3 | {' | '.join(cells)} |"
    cells = ["2.00 (1 not finite)", expected(5, 2), expected(1, 3), expected(1, 3)]
    assert lines[3] == f"| bsn | 2 of 3 (1 new) | {' | '.join(cells)} |"
    assert lines[4] == "| none | 0 of 3 (3 new) | – | – | – | – |"


def test_runs_of_different_protocols_are_not_put_into_one_table(tmp_path):
    runs = plan.runs("x", Grid("", ("seed",), product("digits", [SMALL], seeds(2))), tmp_path, tmp_path)
    scored(runs[:1], {"seed-0": [(4, 1.0, 1.0)]})
    scored(runs[1:], {"seed-1": [(4, 1.0, 1.0)]}, "digits-8r")
    message = r"runs of one table must be scored by one protocol, got digits-8r \(seed-1\), digits-9r \(seed-0\)"
    with pytest.raises(ValueError, match=message):
        table.rows(runs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--slots", "cpu:1", "--slurm"], "slots must not be given with --slurm, got cpu:1"),
        (["--slurm-options", "a=1"], "slurm-options must be given with --slurm, got a=1"),
        (["--slots", "gpu"], "slots must be cpu:N or numbers of this machine's"),
        (["--slurm", "--slurm-options", "fast"], "slurm-options must be KEY=VALUE, got 'fast'"),
    ],
)
def test_bad_command_lines_are_one_line(given, message, tmp_path):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        sweep.main(["run", "digits-scales", "--runs", str(tmp_path), *given])
    assert list(tmp_path.iterdir()) == []


GRID = """
from gan.sweep.grid import Grid, product, seeds
GRIDS = {"three": Grid("Three tiny runs", ("norm", "seed"), product("digits", [FIELDS], [{"norm": "sn"}], seeds(3)))}
"""


def test_from_a_killed_sweep_over_a_full_disk_to_the_table(tmp_path, classifier_cache, grid_files, monkeypatch, capsys):
    """Real runs: the sweep is killed while the first one trains, the second one meets a full disk, the same line goes
    on to the end, and once more costs nothing."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    runs = tmp_path / "runs"
    for made in (runs, tmp_path / "tmp"):
        made.mkdir()
    fields = {**SMALL, "steps": 40, "eval_every": 20, "checkpoint_every": 40, "log_every": 5}
    (grid_files / "mine.py").write_text(GRID.replace("FIELDS", repr(fields)))
    share_classifier(classifier_cache, runs)
    first, second, third = plan.runs("three", grid.find("three"), runs, tmp_path)
    run.claim(second.config, digit_store(8), False, torch.device("cpu"))
    (second.folder / "worker.log").symlink_to("/dev/full")
    line = ["run", "three", "--runs", str(runs), "--slots", "cpu:1"]
    script = [sys.executable, str(ROOT / "tests/with_grids.py"), str(grid_files), str(ROOT / "train/sweep.py")]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*script, *line], env=environment, stderr=subprocess.DEVNULL) as killed:
        wait_until(lambda: state.step_of(first.config) > 0 or killed.poll() is not None)
        killed.send_signal(signal.SIGKILL)
    assert state.state(first.config) is State.RUNNING

    def main(*args: str) -> str:
        with pytest.raises(SystemExit) as ended:
            sweep.main(list(args))
        return str(ended.value)

    assert "room on the disk" in main(*line)  # once the first one, which nobody watches, has left the slot
    assert [state.state(r.config) for r in (first, second, third)] == [State.DONE, State.CRASHED, State.NEW]
    assert "No space left on device" in state.reason(second.config)
    (second.folder / "worker.log").unlink()
    sweep.main(["retry", *line[1:]])
    sweep.main(line)
    capsys.readouterr()
    sweep.main(["status", *line[1:4]])
    assert "3 runs: 3 done" in capsys.readouterr().out
    records = {p: p.read_bytes() for p in (runs / "three/.sweep").iterdir()}
    sweep.main(line)
    sweep.main(["retry", *line[1:]])
    assert {p: p.read_bytes() for p in (runs / "three/.sweep").iterdir()} == records
    capsys.readouterr()
    sweep.main(["table", *line[1:4], "--out", str(tmp_path / "rows.csv")])
    assert "| 3 |" in capsys.readouterr().out
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["seed"], r["step"]) for r in rows] == [(str(s), step) for s in range(3) for step in ("20", "40")]
    with threads(len(os.sched_getaffinity(0))):  # as the slot cpu:1
        alone = tiny(tmp_path, classifier_cache, "alone", **{**fields, "seed": 2, "norm": "sn"})
    with open(alone / "metrics.csv", newline="") as file:
        assert [x["fid"] for x in csv.DictReader(file)] == [r["fid"] for r in rows if r["seed"] == "2"]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
