"""Data folders that are copied to a disk of the node: once, whole or not at all, and the same on every rank."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

import real_archives as real
import staging_jobs as jobs
from gan.data import staging
from gan.data.staging import staged
from gan.data.store import open_store
from prepare_runs import PART, images, pictures, run

RNG = np.random.default_rng(6)


def written(folder: Path) -> Path:
    """Four images of two classes."""
    files = {f"{i % 2}/{i}.png": real.encoded(real.picture(RNG, 16, 16), "PNG") for i in range(4)}
    run("folder", pictures(folder / "in", files), "--out", folder / "data", *PART["folder"])
    return folder / "data"


@pytest.fixture
def data(tmp_path) -> Path:
    return written(tmp_path)


@pytest.fixture
def stage(tmp_path) -> Path:
    return tmp_path / "local/disk"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stops(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_copy_is_the_data_and_is_made_once(data, stage, monkeypatch):
    monkeypatch.setattr(staging, "BLOCK", 1000)
    copy = staged(data, stage)
    assert copy.parent == stage
    assert content(copy) == content(data)
    assert sorted(path.suffix for path in stage.iterdir()) == ["", ".lock"]
    monkeypatch.setattr(os, "sendfile", stops)
    assert staged(data, stage) == copy
    assert staged(data, None) == data


def test_another_set_of_the_same_name_is_another_copy(data, stage, tmp_path):
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other")
    copies = [staged(data, stage), staged(other, stage)]
    assert [np.array_equal(images(copy), images(data)) for copy in copies] == [True, False]


def cut(copy: Path) -> None:
    os.truncate(copy / "images.npy", 1000)


def without_labels(copy: Path) -> None:
    (copy / "labels.npy").unlink()


def killed(copy: Path) -> None:
    copy.rename(copy.with_name(f"{copy.name}.partial"))


@pytest.mark.parametrize("damage", [cut, without_labels, killed])
def test_what_is_left_of_a_copy_is_replaced(data, stage, damage):
    damage(staged(data, stage))
    copy = staged(data, stage)
    assert content(copy) == content(data)
    assert sorted(path.suffix for path in stage.iterdir()) == ["", ".lock"]


def test_a_disk_without_room_is_refused_before_anything_is_copied(data, stage, monkeypatch):
    size = sum(len(x) for x in content(data).values())
    usage = namedtuple("Usage", ["free"])
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage(size - 1))
        patched.setattr(os, "sendfile", None)
        with pytest.raises(
            ValueError, match=r"^stage: expected 0\.00 GB free in .*local/disk for a copy of .*data, got"
        ):
            staged(data, stage)
    assert [path.suffix for path in stage.iterdir()] == [".lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size))
    assert content(staged(data, stage)) == content(data)


def test_a_disk_that_is_full_before_the_end_keeps_no_half(data, stage, monkeypatch):
    monkeypatch.setattr(staging, "BLOCK", 1000)
    with monkeypatch.context() as patched:
        left = iter([os.sendfile, stops])
        patched.setattr(os, "sendfile", lambda *args: next(left)(*args))
        with pytest.raises(OSError, match=r"No space left on device: .*data/images\.npy' -> .*images\.npy"):
            staged(data, stage)
    assert [path.suffix for path in stage.iterdir()] == [".lock"]
    assert content(staged(data, stage)) == content(data)


def test_of_two_processes_one_copies_and_the_other_waits(two, data, stage):
    found = two(jobs.slowly_staged, data, stage)
    assert found[0][0] == found[1][0]
    assert sorted(sent for _, sent in found) == [0, sum(len(x) for x in content(data).values())]


def test_all_ranks_read_the_copy_of_their_node(two, data, tmp_path):
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    assert two(jobs.opened, [data, data], nodes) == [open_store(data).key] * 2
    assert all(content(next(node.glob("data-*[!k]"))) == content(data) for node in nodes)


def test_data_that_only_some_ranks_have_is_named_on_all(two, data, tmp_path):
    said = two(jobs.opened, [data, tmp_path / "nowhere"], [None, None])
    assert said[0] == said[1]
    assert said[0].startswith("rank 1: data: expected a folder written by prepare.py")
    assert "nowhere" in said[0]


def test_other_data_on_a_rank_is_refused(two, data, tmp_path):
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other")
    said = two(jobs.opened, [data, other], [None, None])
    keys = [open_store(folder).key for folder in (data, other)]
    assert said == [f"data must be the same on all ranks, got {keys[0]!r} on rank 0, {keys[1]!r} on rank 1"] * 2


def test_a_full_disk_of_one_node_ends_all_ranks(two, data, tmp_path):
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    said = two(jobs.opened_with_a_full_disk, [data, data], nodes, 1)
    assert said[0] == said[1]
    assert said[0].startswith("rank 1: stage: expected 0.00 GB free in ")
