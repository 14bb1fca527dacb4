"""What several processes are given wrong is one line of the first one, and a status of all."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import gan_rank_jobs as jobs
from gan import checkpoint
from gan.data.sources import Folder
from gan.data.writer import write
from gan.distributed import CommonError, LostPeer
from gan.run import log_to
from real_archives import encoded, picture

NARROW = ["--image-size", "32", "--width", "0.02", "--batch-size", "4", "--batch-size-g", "4", "--n-dis", "1"]
NARROW += ["--bn-groups", "2", "--steps", "1", "--eval-every", "0", "--device", "cpu", "--conditional", "projection"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(8):
        path = folder / "pictures" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(rng, 40, 40)))
    write(Folder(folder / "pictures", 32), folder / "data", 1)
    return folder / "data"


def both(two, tmp_path, data, *more, second=None):
    """Exits of both ranks, the second one with other flags if they are given."""
    given = ["--name", "x", "--runs", str(tmp_path / "runs"), "--data", str(data), *NARROW]
    return two(jobs.command, [[*given, *more], [*given, *(more if second is None else second)]])


def test_one_run_of_both_and_only_with_resume_again(two, tmp_path, data):
    assert both(two, tmp_path, data) == [0, 0]
    said, status = both(two, tmp_path, data)
    assert status == 1
    assert "name must be free, got" in said
    assert said.endswith("which holds this run: pass --resume to continue it")
    assert both(two, tmp_path, data, "--resume") == [0, 0]


def test_ranks_with_other_arguments(two, tmp_path, data):
    found = both(two, tmp_path, data, "--seed", "1", second=["--seed", "2"])
    said = "error: the configuration must be the same on all ranks, got seed 1 on rank 0, 2 on rank 1"
    assert found == [said, 1]
    said, status = both(two, tmp_path, data, second=["--sed", "2"])
    assert said.startswith("error: rank 1: ")
    assert "--sed" in said
    assert status == 1
    assert not (tmp_path / "runs").exists()


def test_data_that_is_on_one_node_only(two, tmp_path, data):
    found = both(two, tmp_path, data, second=["--data", str(tmp_path / "none")])
    assert found == [
        f"error: rank 1: data: expected a folder written by prepare.py, with meta.json in it, got {tmp_path / 'none'}",
        1,
    ]


def test_labels_outside_the_classes(two, tmp_path, data):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    np.save(own / "labels.npy", np.array([0, 1, 2, 0, 1, 0, 1, 0]))
    said, status = both(two, tmp_path, own)
    assert said.startswith(f"error: data: expected {own / 'labels.npy'} to be 8 int64 from 0 to 1, got ")
    assert said.endswith("0 to 2")
    assert status == 1


def test_a_checkpoint_of_another_model(two, tmp_path, data):
    assert both(two, tmp_path, data) == [0, 0]
    folder = tmp_path / "runs/x/checkpoint"
    state = checkpoint.newest(folder)
    del state["generator"]["norm.weight"]
    checkpoint.save(checkpoint.of_step(folder, 1), state)
    said, status = both(two, tmp_path, data, "--resume")
    assert said.startswith("error: resume: expected a checkpoint of this run's networks, got another: ")
    assert "norm.weight" in said
    assert status == 1


def test_a_conditional_network_without_labels(two, tmp_path):
    own = tmp_path / "data"
    rng = np.random.default_rng(0)
    for i in range(4):
        path = tmp_path / "pictures" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(rng, 40, 40)))
    write(Folder(tmp_path / "pictures", 32), own, 1)
    found = both(two, tmp_path, own)
    assert found == ["error: data: expected images with labels, got pictures without", 1]


def test_only_what_a_rank_dies_of_alone_goes_from_it_into_the_log(tmp_path):
    for error in (LostPeer("gone"), CommonError("bad")):
        with pytest.raises(type(error)), log_to(tmp_path, rank=2):
            raise error
    assert not (tmp_path / "worker.log").exists()
    with pytest.raises(RuntimeError), log_to(tmp_path, rank=2):
        raise RuntimeError("out of memory")
    log = (tmp_path / "worker.log").read_text()
    assert "ERROR rank 2: stopped\nTraceback" in log
    assert log.endswith("RuntimeError: out of memory\n")
