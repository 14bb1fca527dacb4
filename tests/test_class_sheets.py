"""train/sample.py and train/export.py of conditional generators: which classes, in which order, where they are
named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from PIL import Image

import conditional
import export
import sample
from gan import streams, weights


@pytest.fixture
def generator(tmp_path, monkeypatch):
    """The file of its weights."""
    monkeypatch.setattr("gan.models.build", lambda *_: (conditional.Shown(), None))
    return conditional.saved(tmp_path / "g.safetensors")


def sampled(generator, out, **options):
    sample.main(generator, out, device="cpu", **options)
    return out


def labels_in(images):
    """Of images (N, S, S, 3)."""
    return [int(image[0, 0, 0]) / 40 for image in images]


def test_a_sheet_has_a_row_of_each_class_whose_images_share_their_z(generator, tmp_path):
    with Image.open(sampled(generator, tmp_path / "a.png", per_class=4)) as picture:
        sheet = np.asarray(picture)
    assert sheet.shape == (3 * 33 - 1, 4 * 33 - 1, 3)
    rows = [[sheet[33 * row :, 33 * column :][:32, :32] for column in range(4)] for row in range(3)]
    assert [labels_in(row) for row in rows] == [[label] * 4 for label in range(3)]
    for column in range(4):
        assert np.array_equal(rows[0][column][..., 1:], rows[2][column][..., 1:])
    assert not np.array_equal(rows[0][0], rows[0][1])
    with Image.open(sampled(generator, tmp_path / "b.png", per_class=2, classes=(2, 0))) as picture:
        part = np.asarray(picture)
    assert np.array_equal(part[:32], sheet[66:, :65])  # whatever the other classes, and however many
    assert np.array_equal(part[33:], sheet[:32, :65])


def test_an_array_has_labels(generator, tmp_path):
    for options, labels in (
        ({"per_class": 40}, [0] * 40 + [1] * 40 + [2] * 40),  # more than one batch
        ({"per_class": 2, "classes": (2, 1)}, [2, 2, 1, 1]),
        ({"count": 5}, [0, 1, 2, 0, 1]),
    ):
        with np.load(sampled(generator, tmp_path / "a.npz", **options)) as file:
            assert file["labels"].dtype == np.int64
            assert file["labels"].tolist() == labels_in(file["images"]) == labels
            images = file["images"]
    z = streams.numbered(0, "sample", 0, 5, conditional.LATENT)
    with torch.no_grad():
        expected = conditional.Shown()(z, torch.tensor(labels))
    assert np.abs(images / 127.5 - 1 - expected.permute(0, 2, 3, 1).numpy()).max() < 1 / 250


def test_a_folder_has_one_of_each_class(generator, tmp_path):
    sampled(generator, tmp_path / "files", per_class=2, classes=(0, 2), seed=3)
    found = sorted((tmp_path / "files").rglob("*.png"))
    names = [str(path.relative_to(tmp_path / "files")) for path in found]
    assert names == ["0/000000.png", "0/000001.png", "2/000000.png", "2/000001.png"]
    sampled(generator, tmp_path / "a.npz", per_class=2, classes=(0, 2), seed=3)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in found]), file["images"])


def test_classes_that_there_are_not(generator, tmp_path, monkeypatch):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            sampled(generator, tmp_path / "a.png", **options)

    refused(r"classes must be labels from 0 to 2, got 3 -1$", per_class=1, classes=(3, 0, -1))
    refused(r"count must be left out with per_class 2, got 5", per_class=2, count=5)
    refused(r"classes must be left out without per_class, got 1 2", classes=(1, 2))
    refused(r"per_class must be at least 1, got 0", per_class=0)
    plain = weights.Trained(conditional.Shown(), conditional.Config(name="x"), 3, torch.device("cpu"))
    monkeypatch.setattr(sample, "load", lambda *_: plain)
    refused(r"per_class must be left out for a generator that takes no labels, got 2", per_class=2)
    assert not list(tmp_path.glob("*.png"))


def test_onnx_of_a_conditional_generator_takes_labels(generator, tmp_path):
    export.main(generator, tmp_path / "g.onnx")
    z, labels = torch.randn(5, conditional.LATENT), torch.tensor([2, 0, 1, 1, 2])
    inputs = {"z": z.numpy(), "labels": labels.numpy()}
    (made,) = ReferenceEvaluator(str(tmp_path / "g.onnx")).run(None, inputs)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(made), conditional.Shown()(z, labels), rtol=1e-4, atol=1e-5)
