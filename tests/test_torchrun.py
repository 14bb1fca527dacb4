"""torchrun train/imagenet.py, from the archive to samples of each class, through all that clusters do to it."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import imagenet
import prepare
import real_archives as real
import sample
import with_tiny_lite0
from gan import checkpoint, cli, presets, rendezvous
from gan.figures import runs

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CLASSES, EACH, SIZE, STEPS = 2, 12, 32, 30
NARROW = [
    *("--preset", "sngan-projection", "--image-size", str(SIZE), "--width", "0.02", "--batch-size", "4"),
    *("--batch-size-g", "8", "--bn-groups", "2", "--n-dis", "1", "--steps", str(STEPS), "--decay-from", "20"),
    *("--checkpoint-every", "1", "--log-every", "1", "--lockstep-every", "2", "--sample-every", "10"),
    *("--device", "cpu", "--resume"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    tar = real.imagenet_tar(folder / "ILSVRC2012_img_train.tar", np.random.default_rng(0), CLASSES, EACH)
    expected = ["--expect", str(CLASSES * EACH), "--size", str(SIZE), "--workers", "1"]
    prepare.main(["imagenet", str(tar), "--no-checksum", *expected, "--out", str(folder / "data")])
    return folder / "data"


def environment(**more: str) -> dict[str, str]:
    """That of a shell in which nothing of torchrun or Slurm is set."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))}
    return {**own, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{own['PATH']}", **more}


def torchrun(options: list[str], script: list[str]) -> subprocess.Popen[str]:
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", *options, *script]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """{rank: process id} of the processes that torchrun has started."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((int(x[5:]) for x in variables if x.startswith(b"RANK=")), None)
        if rank is not None:
            found[rank] = int(child)
    return found


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None) -> None:
    """While the process runs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def step_of(run: Path) -> int:
    """The newest checkpoint's."""
    return max((int(p.stem[5:]) for p in (run / "checkpoint").glob("step-*.pt")), default=0)


def slurm_script(arguments: list[str]) -> str:
    """That of train/README.md, with two CPU processes on one node in place of its GPUs and nodes."""
    blocks = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "train/README.md").read_text(), re.DOTALL)
    (script,) = (x for x in blocks if "#SBATCH" in x)
    head, line, tail = re.fullmatch(r"(.*?)(train/imagenet\.py .*?)( &\n.*)", script, re.DOTALL).groups()
    assert "--resume" in line
    assert "--nproc_per_node 8" in head
    return head.replace("--nproc_per_node 8", "--nproc_per_node 2") + f"train/imagenet.py {' '.join(arguments)}" + tail


def slurm(folder: Path, script: str) -> subprocess.Popen[str]:
    """The script as a batch job, with an srun that starts one task, and a scontrol that notes what it is asked."""
    commands = {
        "srun": 'trap \'kill -USR1 "$task"; wait "$task"\' USR1\n"$@" & task=$!\nwait "$task"',
        "scontrol": f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {folder}/asked; fi',
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "job.sh").write_text(script)
    variables = environment(SLURM_JOB_ID="7", SLURM_NNODES="1", SLURM_JOB_NODELIST="here")
    variables["PATH"] = f"{folder}:{variables['PATH']}"
    return subprocess.Popen(
        ["bash", str(folder / "job.sh")], cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True
    )


def test_from_the_archive_to_samples_of_each_class_through_requeue_kills_and_restarts(data, tmp_path, monkeypatch):
    run = tmp_path / "runs/imagenet/sn"
    given = ["--name", "imagenet/sn", "--runs", str(tmp_path / "runs"), "--data", str(data), *NARROW]

    # A batch job is told that its time is up: a checkpoint, then back into the queue.
    with slurm(tmp_path, slurm_script([*given, "--eval-every", "0"])) as job:
        wait_for(lambda: step_of(run) >= 2, job)
        job.send_signal(signal.SIGUSR1)
        job.wait(60)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    stopped = step_of(run)
    assert f"stopped by SIGUSR1 at step {stopped}; --resume continues" in (run / "worker.log").read_text()
    assert stopped < STEPS

    # A rank is killed, and torchrun starts all again; then another one, and all end: the checkpoint is whole.
    judged = ["tests/with_tiny_lite0.py", "train/imagenet.py", *given, "--protocol", "lite0", "--eval-every", "2"]
    with torchrun(["--max-restarts", "1"], judged) as process:
        started = {}
        for kill in (1, 2):
            before = step_of(run)
            wait_for(lambda before=before: step_of(run) >= before + 2, process)
            started[kill] = ranks_of(process)
            os.kill(started[kill][1], signal.SIGKILL)
            wait_for(lambda kill=kill: all(gone(pid) for pid in started[kill].values()), None)
        said = process.communicate(timeout=60)[1]
        assert process.returncode != 0
    assert said.count("error: another process of the run has ended or is out of reach") == 2
    assert (run / "worker.log").read_text().count("continuing from") == 2
    assert checkpoint.newest(run / "checkpoint")["step"] == step_of(run) < STEPS

    # One process goes on to the end.
    with_tiny_lite0_only_here(monkeypatch)
    cli.start(imagenet.main, presets.IMAGENET, [*given, "--protocol", "lite0", "--eval-every", "2"])

    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["step"] == str(STEPS)
    assert len(rows) > 3
    assert all(float(row["fid"]) > 0 for row in rows)
    assert rows[-1]["protocol"] == f"lite0-{CLASSES * EACH}r-60f"
    scalars = runs.read(run).scalars("")
    assert list(scalars["loss/d"]) == list(range(1, STEPS + 1))
    assert {"time/reduction_percent", "time/data_percent", "images_per_s_per_process"} <= set(scalars)
    assert all(images_per_s > 0 for images_per_s in scalars["images_per_s_per_process"].values())
    assert (run / f"sample/step-{STEPS:08d}.png").exists()

    sample.main(run, tmp_path / "sheet.png", per_class=3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * (SIZE + 1) - 1, CLASSES * (SIZE + 1) - 1)
    found = evaluate.main(run, "lite0", device="cpu", cache=tmp_path, intra=True, intra_fakes=20)
    assert [(x.label, x.reals, x.fakes) for x in found] == [(label, EACH, 20) for label in range(CLASSES)]


def with_tiny_lite0_only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(with_tiny_lite0.features, "lite0", with_tiny_lite0.features.lite0)
    monkeypatch.setattr(with_tiny_lite0.protocols, "PROTOCOLS", dict(with_tiny_lite0.protocols.PROTOCOLS))
    with_tiny_lite0.instead_of_lite0()


def test_ranks_that_cannot_meet_say_where(tmp_path):
    """A port that somebody else listens at."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "train/imagenet.py", "--name", "x", "--data", str(tmp_path)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, check=False, timeout=60
        )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == done.stderr.splitlines()[-1:]
    assert f"the ranks cannot meet at 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT): " in lines[0]


def test_restarts_on_several_nodes_take_a_store_for_each_start(monkeypatch):
    """torchrun counts the starts of each node for itself."""
    variables = {"WORLD_SIZE": "4", "RANK": "0", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="must run with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), rendezvous.started():
        pass
