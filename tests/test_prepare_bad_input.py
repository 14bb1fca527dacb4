"""Archives, folders, arrays and arguments that train/prepare.py cannot take: one line that names what is wrong."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import real_archives as real
from gan.data import store
from prepare_runs import ARCHIVES, CELEBA, CIFAR, CIFAR_LABELS, PART, STL, celeba, cifar10, pictures, refusal, stl10

RNG = np.random.default_rng(3)


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_with_another_md5_is_refused(tmp_path, name):
    said = refusal(name, ARCHIVES[name](tmp_path), "--out", tmp_path / "data")
    assert "md5" in said
    assert "--no-checksum" in said
    assert not list(tmp_path.glob("data*"))


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_cut_off_is_refused(tmp_path, name):
    archive = ARCHIVES[name](tmp_path)
    whole = archive.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) * 3 // 4):
        archive.write_bytes(whole[:size])
        assert archive.name in refusal(name, archive, "--out", tmp_path / "data", *PART[name])
        assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_foreign_file_is_refused(tmp_path, name):
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"GIF89a, or something like it" * 1000)
    assert "foreign" in refusal(name, foreign, "--out", tmp_path / "data", *PART[name])
    other = celeba(tmp_path) if name != "celeba" else cifar10(tmp_path)
    assert other.name in refusal(name, other, "--out", tmp_path / "data", *PART[name])
    assert "got" in refusal(name, tmp_path / "absent", "--out", tmp_path / "data", *PART[name])


@pytest.mark.parametrize(("name", "count"), [("cifar10", 20), ("stl10", 7), ("celeba", 6), ("imagenet", 18)])
@pytest.mark.parametrize("off", [-1, 1])
def test_another_number_of_images_than_expected_is_refused(tmp_path, name, count, off):
    args = ["--no-checksum", "--expect", str(count + off)]
    said = refusal(name, ARCHIVES[name](tmp_path), "--out", tmp_path / "data", *args)
    assert f"got {count}" in said
    assert f"{count + off}" in said


def test_a_missing_member_is_named(tmp_path):
    members = real.cifar_members(CIFAR, CIFAR_LABELS)
    del members["cifar-10-batches-py/data_batch_3"]
    said = refusal("cifar10", cifar10(tmp_path, members), "--out", tmp_path / "data", *PART["cifar10"])
    assert "data_batch_3" in said
    faces = {name: content for name, content in CELEBA.items() if "000004" not in name}
    said = refusal("celeba", celeba(tmp_path, faces), "--out", tmp_path / "data", *PART["celeba"])
    assert "000004.jpg is missing" in said


@pytest.mark.parametrize("damage", ["no picture", "cut off", "too small", "flipped in the zip", "text"])
def test_a_broken_member_is_named(tmp_path, monkeypatch, damage):
    workers = "2" if damage == "cut off" else "1"  # processes take a while to start: once is enough
    monkeypatch.setattr(store, "CHUNK", 3)
    name = "img_align_celeba/000005.jpg"
    content = CELEBA[name]
    broken = {
        "no picture": b"",
        "cut off": content[: len(content) // 2],
        "too small": real.encoded(real.picture(RNG, 100, 178)),
        "text": b"404 not found" * 99,
    }
    archive = celeba(tmp_path, {**CELEBA, name: broken.get(damage, content)})
    if damage == "flipped in the zip":
        whole = bytearray(archive.read_bytes())
        whole[whole.index(content) + len(content) // 2] ^= 255
        archive.write_bytes(whole)
    args = ["--no-checksum", "--expect", "6", "--workers", workers]
    said = refusal("celeba", archive, "--out", tmp_path / "data", *args)
    assert name in said
    assert archive.name in said
    assert not (tmp_path / "data").exists()


class Asks:
    """A pickle that runs something when it is read."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/this-must-not-be-made",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pickle.dumps({"data": Asks()}, 2), "mkdir"),
        (pickle.dumps(["no", "dict"], 2), "dict"),
        (real.cifar_pickle(CIFAR[:4, :100], [1, 2, 3, 4]), "3072"),
        (real.cifar_pickle(CIFAR[:4], [1, 2, 3]), "labels"),
        (real.cifar_pickle(CIFAR[:4], [1, 2, 3, 10]), "labels"),
        (real.cifar_pickle(CIFAR[:4], [1, 2, 3, 4])[:-500], "data_batch_2"),
        (b"not a pickle", "data_batch_2"),
    ],
    ids=["code", "no dict", "other width", "too few labels", "label 10", "cut off", "no pickle"],
)
def test_a_pickle_that_is_not_cifars_is_refused_unread(tmp_path, content, why):
    members = real.cifar_members(CIFAR, CIFAR_LABELS) | {"cifar-10-batches-py/data_batch_2": content}
    said = refusal("cifar10", cifar10(tmp_path, members), "--out", tmp_path / "data", *PART["cifar10"])
    assert "data_batch_2" in said
    assert why in said
    assert not Path("/tmp/this-must-not-be-made").exists()


def test_stl10_with_part_of_an_image_is_refused(tmp_path):
    assert "27648" in refusal("stl10", stl10(tmp_path, STL[:-1]), "--out", tmp_path / "data", *PART["stl10"])


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "got none"),
        ({"a.png": b"x", "b/c.png": b"x"}, "a.png beside b/"),
        ({"b/c.png": b"x"}, "b/c.png is broken"),
    ],
)
def test_a_folder_that_is_no_set_is_refused(tmp_path, files, why):
    (tmp_path / "in").mkdir()
    assert why in refusal("folder", pictures(tmp_path / "in", files), "--out", tmp_path / "data", *PART["folder"])


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "float32"),
        (np.zeros((2, 8, 9, 3), np.uint8), "(2, 8, 9, 3)"),
        (np.zeros((2, 3, 8, 8), np.uint8), "(2, 3, 8, 8)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "(0, 8, 8, 3)"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "columns"),
    ],
)
def test_an_array_of_another_kind_is_refused(tmp_path, array, why):
    np.save(tmp_path / "x.npy", array)
    assert why in refusal("npy", tmp_path / "x.npy", "--out", tmp_path / "data")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["stl10", "x", "--preset", "chainer"], "preset: expected bsn or mimicry for stl10, got chainer"),
        (["celeba", "x", "--preset", "BSN"], "preset: expected bsn or mimicry for celeba, got BSN"),
        (["folder", "x", "--size", "0"], "size: expected at least 1 pixel, got 0"),
        (["folder", "x", "--size", "8"], "expected a folder of images, got x"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, args, why):
    assert why in refusal(*args, "--out", tmp_path / "data")
