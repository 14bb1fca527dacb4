"""Evaluation of conditional generators: their labels, and the distance of each class alone."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import conditional
import evaluate
import prepare
import sample
from gan import streams, weights
from gan.metrics import features
from small_evaluations import Tiny, fid_of_scipy

NAMES = ("cat", "dog", "eel")
COUNTS = (12, 9, 15)
IMAGES = [
    np.random.RandomState(c).randint(0, 200 + 20 * c, (n, 32, 32, 3)).astype(np.uint8) for c, n in enumerate(COUNTS)
]


def save(folder, names=NAMES):
    for name, images in zip(names, IMAGES, strict=False):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture
def network(monkeypatch):
    found = Tiny(size=32)
    monkeypatch.setattr(features, "lite0", lambda _: features.with_checksum(found))
    return found


@pytest.fixture
def generator(tmp_path, monkeypatch):
    """The file of its weights."""
    monkeypatch.setattr("gan.models.build", lambda *_: (conditional.Shown(), None))
    return conditional.saved(tmp_path / "g.safetensors")


@pytest.fixture
def data(tmp_path):
    return save(tmp_path / "data")


def evaluated(tmp_path, path, data, **options):
    return evaluate.main(path, "lite0", data, device="cpu", cache=tmp_path / "cache", **options)


def intra(tmp_path, path, data, **options):
    return evaluated(tmp_path, path, data, intra=True, intra_fakes=25, **options)


def distance(network, label, fakes):
    """fakes: (N, 3, 32, 32), pixels."""
    reals = torch.from_numpy(IMAGES[label]).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        return fid_of_scipy(network(reals)[0], network(fakes)[0])


def expected(network, label):
    z = streams.numbered(5, "intra", label * 25, 25, conditional.LATENT)
    with torch.no_grad():
        images = conditional.Shown()(z, torch.full((25,), label))
    return distance(network, label, (images * 127.5 + 127.5).round().clamp(0, 255))


def test_scores_are_those_of_the_labels_of_training(tmp_path, generator, data, network, monkeypatch):
    shown = conditional.Shown()
    monkeypatch.setattr("gan.models.build", lambda *_: (shown, None))
    found = evaluated(tmp_path, generator, data)
    assert shown.seen == [i % 3 for i in range(2000)]
    assert found.protocol == "lite0-36r-2000f"
    assert len(network.seen) == 21


def test_intra_fid_is_the_mean_of_the_distances_of_the_classes(tmp_path, generator, data, network, capsys):
    found = intra(tmp_path, generator, data, batch_size=7, out=tmp_path / "out.csv")
    assert [row[:3] for row in found] == [(label, n, 25) for label, n in enumerate(COUNTS)]
    assert [row.fid for row in found] == pytest.approx([expected(network, label) for label in range(3)], rel=1e-6)
    said = capsys.readouterr().out
    assert f"3 classes, network {features.with_checksum(network).checksum}" in said
    assert f"intra-lite0-FD: {sum(row.fid for row in found) / 3:.4f}\n" in said
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["label", "reals", "fakes", "fid"], *([str(x) for x in row] for row in found)]
    some = intra(tmp_path, generator, data, classes=(2, 0), seed=5)
    assert [row.label for row in some] == [2, 0]
    assert [row.fid for row in some] == pytest.approx([found[2].fid, found[0].fid], rel=1e-6)
    other = intra(tmp_path, generator, data, classes=(2,), seed=6)
    assert abs(other[0].fid / found[2].fid - 1) > 1e-3


@pytest.mark.usefixtures("network")
def test_a_prepared_data_folder_gives_the_classes_of_its_class_folders(tmp_path, generator, data):
    prepare.main(["folder", str(data), "--size", "32", "--workers", "1", "--out", str(tmp_path / "prepared")])
    assert intra(tmp_path, generator, tmp_path / "prepared") == intra(tmp_path, generator, data)


def test_class_folders_are_called_as_the_classes_or_by_their_labels(tmp_path, generator, data, network):
    folder = tmp_path / "samples"
    sample.main(generator, folder, per_class=11, classes=(1, 2), device="cpu")
    found = intra(tmp_path, folder, data, classes=(1, 2))
    assert [row[:3] for row in found] == [(1, 9, 11), (2, 15, 11)]
    for row in found:
        pixels = [np.asarray(Image.open(path)) for path in sorted((folder / str(row.label)).iterdir())]
        fakes = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
        assert row.fid == pytest.approx(distance(network, row.label, fakes), rel=1e-6)
    for label in (1, 2):
        (folder / str(label)).rename(folder / NAMES[label])
    assert intra(tmp_path, folder, data, classes=(1, 2)) == found


@pytest.mark.usefixtures("network")
def test_what_has_no_distance_of_each_class(tmp_path, generator, data, monkeypatch):
    def refused(message, path=generator, of=data, **options):
        with pytest.raises(ValueError, match=message):
            intra(tmp_path, path, of, **options)

    refused(r"classes must be labels from 0 to 2, got 3 -1", classes=(0, 3, -1))
    refused(r"data: expected the images of .* in class folders, got 000.png in none", of=data / "cat")
    refused(r"path: expected the images of .* in class folders, got 000.png in none", path=data / "cat")
    one = save(tmp_path / "one", ("1",))
    names = r"called cat, dog, eel, as the classes of the data, or by labels from 0 to 2"
    refused(
        rf"path: expected class folders {names}, got cat, dog, fox", path=save(tmp_path / "a", ("cat", "dog", "fox"))
    )
    refused(rf"path: expected class folders {names}, got 1, 2, 3", path=save(tmp_path / "b", ("1", "2", "3")))
    two = save(tmp_path / "c", ("1", "2"))  # nobody can tell whether a folder 1 is of the class 1 or of the label 1
    refused(r"called 1, 2, as the classes of the data, or by labels from 0 to 1, got 1", path=one, of=two)
    refused(r"data: expected 3 classes, as the generator has, got c with 2", of=two)
    refused(r"classes: expected at least 2 reals and 2 fakes of each class, got 12 and 0 of class 0", path=one)
    prepare.main(["folder", str(data / "cat"), "--size", "32", "--workers", "1", "--out", str(tmp_path / "plain")])
    refused(r"data: expected images with labels for --intra, got cat without", of=tmp_path / "plain")
    with pytest.raises(ValueError, match=r"classes: expected only with --intra"):
        evaluated(tmp_path, generator, data, classes=(1,))
    with pytest.raises(ValueError, match=r"out: expected only with --intra"):
        evaluated(tmp_path, generator, data, out=tmp_path / "x.csv")
    monkeypatch.setattr(conditional.Shown, "forward", lambda *_: torch.full((25, 3, 32, 32), torch.nan))
    refused(r"path: expected finite images, got fakes of class 1 that are not, from number 0 on", classes=(1, 2))
    plain = weights.Trained(conditional.Shown(), conditional.Config(name="x"), 0, torch.device("cpu"))
    monkeypatch.setattr(weights, "load", lambda *_: plain)
    refused(r"intra: expected a generator that takes labels, got .*g.safetensors with conditional 'none'")


@pytest.mark.parametrize("protocol", ["bsn", "modern"])  # which compare thousands of images, of all classes
def test_without_the_network_it_is_said_what_is_missing(tmp_path, generator, data, monkeypatch, capsys, protocol):
    def missing(*_):
        raise features.MissingNetwork("pip install it")

    monkeypatch.setattr(features, "inception", missing)
    out = tmp_path / "out.csv"
    assert evaluate.main(generator, protocol, data, device="cpu", cache=tmp_path, intra=True, out=out) == []
    assert capsys.readouterr().out == f"intra, {protocol}: 3 classes, network missing\npip install it\n"
    assert not out.exists()
