"""Runs that are killed, resumed, refused, or that meet a damaged file or a full disk."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import forked
from gan import checkpoint, pictures
from gan.loop import REQUEUE
from gan.outputs import Outputs
from gan.run import log_to
from tiny_runs import arguments, rows, share_classifier, tiny

LONG = {"steps": 32, "eval_every": 4, "checkpoint_every": 6, "n_dis": 2}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_and_asked_to_stop_and_resumed_equals_never_stopped(tmp_path, classifier_cache):
    """SIGKILL at a moment that no checkpoint was waiting for, then SIGUSR1, which leaves one."""
    whole = tiny(tmp_path, classifier_cache, "whole", **LONG)
    args = [*arguments(tmp_path, "stopped", **LONG), "--resume"]
    stopped = tmp_path / "stopped"
    for number, status, rows_to_see in ((signal.SIGKILL, -signal.SIGKILL, 2), (signal.SIGUSR1, REQUEUE, 5)):
        process = forked.script(args, tmp_path / "errors")
        deadline = time.monotonic() + 120
        while not (stopped / "metrics.csv").exists() or len(rows(stopped)) < rows_to_see:
            assert process.exitcode is None, (tmp_path / "errors").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == status
        assert len(rows(stopped)) < len(rows(whole))
    log = (stopped / "worker.log").read_text()
    assert "stopped by SIGUSR1 at step" in log
    assert "Traceback" not in log  # it was asked for
    tiny(tmp_path, classifier_cache, "stopped", resume=True, **LONG)
    assert rows(stopped) == rows(whole)
    for run in (whole, stopped):
        assert len(rows(run)) == 8
    ends = [checkpoint.try_load(checkpoint.of_step(run / "checkpoint", 32)) for run in (whole, stopped)]
    for part in ("generator", "discriminator"):
        a, b = (end[part] for end in ends)
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (whole / "weights/best.safetensors").read_bytes() == (stopped / "weights/best.safetensors").read_bytes()
    log = (stopped / "worker.log").read_text()
    assert "continuing from" in log
    lines = [(run / "scalars.jsonl").read_text().splitlines() for run in (whole, stopped)]
    assert [json.loads(x)["step"] for x in lines[0]] == [json.loads(x)["step"] for x in lines[1]]
    assert json.loads(lines[0][-1])["loss/d"] == json.loads(lines[1][-1])["loss/d"]


def test_a_run_from_before_a_field_was_there_continues_with_its_default(tmp_path, classifier_cache):
    run = tiny(tmp_path, classifier_cache, "a")
    about = json.loads((run / "config.json").read_text())
    del about["config"]["bn_groups"]
    (run / "config.json").write_text(json.dumps(about))
    tiny(tmp_path, classifier_cache, "a", resume=True)
    with pytest.raises(ValueError, match=r"with another \(bn_groups: 1 there, 2 here\)"):
        tiny(tmp_path, classifier_cache, "a", resume=True, bn_groups=2)


def test_a_torn_row_and_rows_after_the_checkpoint_are_written_again(tmp_path, classifier_cache):
    run = tiny(tmp_path, classifier_cache, "a")
    expected = rows(run)
    checkpoint.of_step(run / "checkpoint", 10).unlink()  # as if killed after step 10's row, before its checkpoint
    with open(run / "metrics.csv", "a") as file:
        file.write("12,3.")
    tiny(tmp_path, classifier_cache, "a", resume=True)
    assert rows(run) == expected


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, classifier_cache, damage):
    run = tiny(tmp_path, classifier_cache, "a")
    expected, last = rows(run), checkpoint.of_step(run / "checkpoint", 10)
    data = last.read_bytes()
    last.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "garbage": os.urandom(len(data))}[damage])
    tiny(tmp_path, classifier_cache, "a", resume=True)
    assert rows(run) == expected
    log = (run / "worker.log").read_text()
    assert f"{last} is damaged and ignored" in log
    assert f"continuing from {checkpoint.of_step(run / 'checkpoint', 8)}" in log


def test_a_checkpoint_cut_anywhere_is_damaged(tmp_path, caplog):
    net = torch.nn.Linear(100, 100)
    checkpoint.save(checkpoint.of_step(tmp_path, 1), {"step": 1})
    path = checkpoint.of_step(tmp_path, 2)
    checkpoint.save(path, {"step": 2, "net": net.state_dict()})
    whole = path.read_bytes()
    assert checkpoint.newest(tmp_path)["step"] == 2
    for length in range(0, len(whole), 331):
        caplog.clear()
        path.write_bytes(whole[:length])
        assert checkpoint.newest(tmp_path) == {"step": 1}
        assert f"{path} is damaged" in caplog.text


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_again_unasked(tmp_path, classifier_cache):
    run = tiny(tmp_path, classifier_cache, "a")
    expected = rows(run)
    for path in (run / "checkpoint").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint must hold a whole checkpoint, got 2 damaged: delete them"):
        tiny(tmp_path, classifier_cache, "a", resume=True)
    assert rows(run) == expected


def test_a_damaged_classifier_is_trained_again(tmp_path, classifier_cache):
    share_classifier(classifier_cache, tmp_path)
    (file,) = tmp_path.glob("digit-classifier-*.npz")
    good = file.read_bytes()
    file.write_bytes(good[:1000])
    from gan.data.digits import digits
    from gan.metrics import protocols
    from gan.metrics.digits import digit_classifier

    digit_classifier(digits(8), protocols.find("digits").scale, tmp_path)
    assert file.read_bytes() == good


def test_resuming_a_complete_run_changes_nothing_but_its_log(tmp_path, classifier_cache):
    run = tiny(tmp_path, classifier_cache, "a")
    before = contents(run)
    tiny(tmp_path, classifier_cache, "a", resume=True)
    after = contents(run)
    assert "is complete at step 10" in after.pop("worker.log").decode()
    before.pop("worker.log")
    assert after == before


@pytest.mark.parametrize(
    ("resume", "changes", "message"),
    [
        (False, {}, "name must be free, got .*a, which holds this run: pass --resume to continue it"),
        (False, {"seed": 1}, "another .*seed: 0 there, 1 here"),
        (
            True,
            {"norm": "ssn", "scale": 2.0},
            "another .*norm: 'sn' there, 'ssn' here, scale: 1.0 there, 2.0 here",
        ),
    ],
)
def test_a_folder_with_a_run_is_refused_and_untouched(tmp_path, classifier_cache, resume, changes, message):
    run = tiny(tmp_path, classifier_cache, "a")
    before = contents(run)
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, classifier_cache, "a", resume=resume, **changes)
    assert contents(run) == before


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_something_else_is_refused_and_untouched(tmp_path, classifier_cache, resume):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        tiny(tmp_path, classifier_cache, "a", resume=resume)
    assert contents(tmp_path / "a") == {"thesis.tex": b"x"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"config": 1}'])
def test_a_config_json_that_is_no_runs_is_refused_and_untouched(tmp_path, classifier_cache, text):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"name must be free or hold a run, got .*/a, whose config.json is no run's"):
        tiny(tmp_path, classifier_cache, "a", resume=True)
    assert contents(tmp_path / "a") == {"config.json": text.encode()}


def test_a_log_that_does_not_fit_is_named(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"cannot write {tmp_path}/worker.log: File too large"), log_to(tmp_path):
            log_until_full()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    logging.getLogger("gan").info("the next run's log is not this one's")


def log_until_full() -> None:
    while True:
        logging.getLogger("gan").info("x" * 100)


@pytest.mark.parametrize("change", [{"batch_size": 2000}, {"scale": 2.0}, {"device": "cuda"}])
def test_a_run_that_cannot_start_leaves_no_folder(tmp_path, classifier_cache, change):
    if torch.cuda.is_available() and change == {"device": "cuda"}:
        pytest.skip("a CUDA device is there")
    with pytest.raises(ValueError, match="must be"):
        tiny(tmp_path, classifier_cache, "a", **change)
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_an_error_and_leaves_the_previous_checkpoint(tmp_path):
    """A limit on file size is what a process without root has of a full disk: the write fails half way."""
    path = checkpoint.of_step(tmp_path, 1)
    checkpoint.save(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for target in (checkpoint.of_step(tmp_path, 2), path):
            with pytest.raises(
                OSError, match=rf"cannot write {target}: File too large; what was there before is intact"
            ):
                checkpoint.save(target, {"step": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.newest(tmp_path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.fixture
def errors(tmp_path_factory) -> Path:
    """A file outside of the folder of runs."""
    return tmp_path_factory.mktemp("errors") / "errors"


def run_to_failure(args: list[str], errors: Path, largest_file: int | None = None) -> str:
    process = forked.script(args, errors, largest_file)
    process.join(120)
    said = errors.read_text()
    assert process.exitcode == 1, said
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


def test_the_command_line_says_what_is_full_in_one_line(tmp_path, classifier_cache):
    share_classifier(classifier_cache, tmp_path)
    last = run_to_failure(arguments(tmp_path, "a", width=0.2), tmp_path / "errors", 60_000)
    assert last.startswith("error: ")
    assert "weights/last.safetensors: File too large" in last
    assert len(rows(tmp_path / "a")) == 1
    assert "stopped" in (tmp_path / "a" / "worker.log").read_text()


def write_a_sample(outputs: Outputs) -> None:
    outputs.sample(1, pictures.grid(torch.randint(0, 256, (100, 1, 8, 8), dtype=torch.uint8), 10))


def write_a_scalar(outputs: Outputs) -> None:
    outputs.scalars(1, {"x": 1.0})
    outputs.flush()


@pytest.mark.parametrize(
    ("named", "write"),
    [
        ("metrics.csv", lambda outputs: outputs.metrics(1, {"fid": 1.0, "protocol": "x"}, "raw")),
        ("time.txt", lambda outputs: outputs.time(1, "starts")),
        ("sample/step-00000001.png", write_a_sample),
        ("tensorboard", write_a_scalar),
    ],
)
def test_every_output_that_does_not_fit_is_named(tmp_path, monkeypatch, named, write):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's writer thread speaks up itself, too
    outputs = Outputs(tmp_path, 0, 0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"cannot write {tmp_path}/{named}: File too large"):
            write_until_full(outputs, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_until_full(outputs: Outputs, write: Callable[[Outputs], None]) -> None:
    with outputs:
        while True:
            write(outputs)


@pytest.mark.parametrize("kind", ["a file", "a system folder", "read-only"])
def test_the_command_line_says_what_cannot_be_written_in_one_line(tmp_path, errors, kind):
    folder = Path("/proc/runs") if kind == "a system folder" else tmp_path / "runs"
    if kind == "a file":
        folder.write_text("")
    elif kind == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        folder.mkdir(mode=0o555)
    last = run_to_failure(arguments(folder, "a"), errors)
    assert last.startswith("error: ")
    assert f"cannot write {folder}/a/config.json: " in last


def test_the_command_line_refuses_mistakes_in_one_line(tmp_path, errors):
    last = run_to_failure(arguments(tmp_path, "a", batch_size=2000), errors)
    assert "batch_size must be at most the 1797 images" in last
    assert list(tmp_path.iterdir()) == []
