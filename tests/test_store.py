"""Data folders that are read, batches of them, and which images a batch has."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import real_archives as real
from gan.data import picks
from gan.data.batches import AHEAD, Batches
from gan.data.images import to_float, to_uint8
from gan.data.store import memory_store, open_store

RNG = np.random.default_rng(1)
IMAGES = RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(40) % 3
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Forty images of three classes."""
    for i, image in enumerate(IMAGES):
        path = tmp_path / "in" / str(LABELS[i]) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(real.encoded(image, "PNG"))
    command = ["folder", str(tmp_path / "in"), "--out", str(tmp_path / "data"), "--size", "8", "--workers", "1"]
    prepare.main(command)
    return tmp_path / "data"


ORDER = np.argsort(LABELS, kind="stable")  # class after class, as the folder is written


def test_images_are_read_by_any_index(folder):
    found = open_store(folder)
    for index in ([3], [5, 4, 4, 39, 0], list(range(10, 30)), [7, 8, 9, 2, 3], []):
        assert np.array_equal(found.read(np.array(index, np.int64)), IMAGES[ORDER][index])
    assert np.array_equal(found.labels, LABELS[ORDER])
    assert found.classes == 3


@pytest.mark.parametrize("index", [[40], [-1], [0, 41]])
def test_an_index_outside_is_refused(folder, index):
    with pytest.raises(IndexError, match="expected 0 to 39"):
        open_store(folder).read(np.array(index))


def test_the_key_is_of_the_content(folder):
    key = open_store(folder).key
    assert memory_store("x", IMAGES[ORDER], LABELS[ORDER]).key == key
    changed = IMAGES[ORDER].copy()
    changed[39, 7, 7, 2] ^= 1
    others = {memory_store("x", changed, LABELS[ORDER]).key, memory_store("x", IMAGES[ORDER]).key}
    others |= {memory_store("x", IMAGES, LABELS).key, memory_store("x", IMAGES.reshape(10, 16, 16, 3)).key}
    assert len(others | {key}) == 5


@pytest.mark.parametrize("resident_gb", [4.0, 0.0])
def test_batches_are_the_images_that_were_picked(folder, resident_gb):
    batches = Batches(open_store(folder), lambda draw: (np.arange(6) * 7 + draw) % 40, CPU, resident_gb, start=3)
    for draw in range(3, 20):
        images, labels = batches.next()
        index = ORDER[(np.arange(6) * 7 + draw) % 40]
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), IMAGES[index])
        assert images.is_contiguous()  # strides decide which convolution is used
        assert labels.tolist() == LABELS[index].tolist()
    batches.close()


def test_batches_of_changing_size_without_labels():
    batches = Batches(memory_store("x", IMAGES[..., :1]), lambda draw: np.arange(1 + draw % 5), CPU, 0.0, workers=3)
    for draw in range(12):
        images, labels = batches.next()
        assert labels is None
        assert np.array_equal(images[:, 0].numpy(), IMAGES[: 1 + draw % 5, ..., 0])
    batches.close()


def test_a_batch_stays_as_it_was_when_later_ones_are_read(folder):
    batches = Batches(open_store(folder), lambda draw: (np.arange(4) + draw) % 40, CPU, 0.0)
    kept = [batches.next()[0] for _ in range(3 * AHEAD)]
    for draw, images in enumerate(kept):
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), IMAGES[ORDER][(np.arange(4) + draw) % 40])
    batches.close()


@pytest.mark.parametrize("resident_gb", [4.0, 0.0])
def test_a_dead_disk_is_an_error_that_names_the_file(folder, monkeypatch, resident_gb):
    found = open_store(folder)

    def dead(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def draw() -> None:
        batches = Batches(found, lambda _: np.arange(4), CPU, resident_gb)
        try:
            batches.next()
        finally:
            batches.close()

    monkeypatch.setattr(os, "preadv", dead)
    with pytest.raises(OSError, match=r"Input/output error: .*images\.npy"):
        draw()


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error_that_names_it(folder):
    found = open_store(folder)
    os.truncate(folder / "images.npy", 1000)
    with pytest.raises(OSError, match=r"shorter.*images\.npy"):
        found.read(np.array([39]))


@pytest.mark.parametrize("pick", [picks.with_replacement, picks.by_epochs])
def test_picks_depend_on_seed_and_draw_alone(pick):
    drawn = [pick(1, draw, 16, 50) for draw in range(8)]
    assert all(np.array_equal(pick(1, draw, 16, 50), drawn[draw]) for draw in reversed(range(8)))
    assert len({x.tobytes() for x in [*drawn, pick(2, 0, 16, 50)]}) == 9
    assert all(x.dtype == np.int64 and x.min() >= 0 and x.max() < 50 for x in drawn)


@pytest.mark.parametrize(("batch_size", "count"), [(4, 12), (5, 12), (7, 7), (5, 6)])
def test_every_image_is_picked_once_an_epoch(batch_size, count):
    drawn = np.concatenate([picks.by_epochs(3, draw, batch_size, count) for draw in range(5 * count)])
    epochs = drawn.reshape(-1, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    assert len({epoch.tobytes() for epoch in epochs}) > 1


def test_picks_with_replacement_are_uniform():
    drawn = np.concatenate([picks.with_replacement(0, draw, 100, 100) for draw in range(1000)])
    counts = np.bincount(drawn, minlength=100)
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 99) < 5 * np.sqrt(2 * 99)  # chi squared of 99 degrees
    assert len(np.unique(drawn[:100])) < 100


@pytest.mark.parametrize("pick", [picks.with_replacement, picks.by_epochs])
def test_a_batch_larger_than_the_set_is_refused(pick):
    with pytest.raises(ValueError, match="batch_size: expected 1 to 10, the number of images, got 11"):
        pick(0, 0, 11, 10)


def test_data_of_another_kind_than_a_recipe_needs_is_refused():
    grey = memory_store("mine", IMAGES[..., :1])
    grey.require(image_size=8, channels=1)
    with pytest.raises(ValueError, match="data: expected images of 32 x 32 pixels, got mine of 8 x 8"):
        grey.require(image_size=32, channels=1)
    with pytest.raises(ValueError, match="data: expected images of 3 channels, got mine with 1"):
        grey.require(image_size=8)
    with pytest.raises(ValueError, match="data: expected images with labels, got mine without"):
        grey.require(image_size=8, channels=1, labels=True)


def cut(folder: Path) -> None:
    os.truncate(folder / "images.npy", 2000)


def rewritten(**fields: object) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | fields))

    return rewrite


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / "meta.json").unlink(), "with meta.json in it"),
        (lambda folder: (folder / "meta.json").write_text("{"), "as prepare.py writes it"),
        (rewritten(format=99), "of format 1, got 99"),
        (rewritten(count=41), r"of shape \(41, 8, 8, 3\)"),
        (rewritten(classes=["0"]), r"int64 from 0 to 0, got 0 to \d"),
        (cut, r"images\.npy of 7808 bytes, as its header says, got 2000"),
        (lambda folder: (folder / "images.npy").write_bytes(b"GIF89a"), "to be a .npy file"),
        (lambda folder: (folder / "labels.npy").write_bytes(b"GIF89a"), "labels.npy"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder, damage, why):
    damage(folder)
    with pytest.raises(ValueError, match=f"^data: .*{why}"):
        open_store(folder)


def test_a_folder_that_is_being_written_is_named(folder):
    folder.rename(folder.with_name("data.partial"))
    with pytest.raises(ValueError, match=r"not finished: .*data\.partial"):
        open_store(folder)


def test_uint8_comes_back_from_floats():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_float(every)[[0, 255]].tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("labels", "found"),
    [(np.array([0, -1]), "-1 to 0"), (np.array([0, 3]), "0 to 3"), (np.array([0]), r"int64 of shape \(1,\)")],
)
def test_labels_that_are_no_classes_are_refused(labels, found):
    store = memory_store("x", IMAGES[:2])
    with pytest.raises(ValueError, match=f"labels: expected them to be 2 int64 from 0 to 2, got {found}"):
        dataclasses.replace(store, labels=labels, classes=3)
