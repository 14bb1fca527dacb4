"""train/evaluate.py: what it takes for a run, a checkpoint, a folder of images, and how it compares them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate
from gan import weights
from gan.config import Config
from gan.data.store import memory_store

IMAGES = np.random.RandomState(0).randint(0, 256, (24, 8, 8, 3)).astype(np.uint8)


def save(folder, images, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.{suffix}")
    return folder


class Tiny(nn.Module):
    """In the place of a protocol's network."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features, self.logits = nn.Linear(192, 6), nn.Linear(6, 5)

    def forward(self, pixels):
        found = self.features(pixels.flatten(1) / 255)
        return found, self.logits(found)


@pytest.fixture
def tiny_lite0(monkeypatch):
    from gan.metrics import features

    monkeypatch.setattr(features, "lite0", lambda _: features.with_checksum(Tiny()))


class Painter(nn.Module):
    """A generator that keeps the latent vectors that it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, z):
        self.seen.append(z)
        return z.repeat(1, 48).view(len(z), 3, 8, 8).tanh()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run, its generator, and a data folder that its config names."""
    generator = Painter()
    data = save(tmp_path / "data", IMAGES)
    config = Config(name="x", latent=4, image_size=8)
    monkeypatch.setattr(weights, "load", lambda _, device: weights.Trained(generator, config, 0, torch.device(device)))
    folder = tmp_path / "runs/x"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"runtime": {"data": str(data)}}))
    return folder, generator


def scores(tmp_path, path, protocol="lite0", **options):
    return evaluate.main(path, protocol, device="cpu", cache=tmp_path / "cache", **options)


@pytest.mark.usefixtures("tiny_lite0")
def test_two_folders_against_each_other(tmp_path, capsys):
    one, other = save(tmp_path / "one", IMAGES), save(tmp_path / "other", IMAGES[:20] // 2, "bmp")
    same = scores(tmp_path, one, data=one)
    assert abs(same.fid) < 1e-6
    found = scores(tmp_path, other, data=one)
    assert (found.protocol, found.reals, found.fakes) == ("lite0-24r-20f", 24, 20)
    assert found.fid > 0.01
    assert f"lite0-FD: {found.fid:.4f}\nlite0-score: {found.inception_score_mean:.4f} ±" in capsys.readouterr().out


def test_a_folder_sorted_by_class_has_all_classes_in_every_split():
    classes = np.stack([np.full((8, 8, 3), 40 * (i // 10), np.uint8) for i in range(40)])
    store = memory_store("sorted", classes)
    first = torch.cat([evaluate._from_store(store)(i, 4) for i in range(0, 40, 4)])
    assert sorted(first[:, 0, 0, 0].tolist()) == sorted(classes[:, 0, 0, 0].tolist())
    assert all(len(set(part[:, 0, 0, 0].tolist())) > 1 for part in first.split(10))


@pytest.mark.usefixtures("tiny_lite0")
def test_a_run_is_compared_with_the_data_of_its_config_by_default(run, tmp_path):
    folder, generator = run
    found = scores(tmp_path, folder)
    z = torch.cat(generator.seen)
    assert found.protocol == "lite0-24r-2000f"
    assert z.shape == (2000, 4)
    assert abs(z.mean()) < 0.05
    assert abs(z.std() - 1) < 0.05
    generator.seen.clear()
    assert scores(tmp_path, folder, batch_size=7).fid == pytest.approx(found.fid, rel=1e-6)
    torch.testing.assert_close(torch.cat(generator.seen), z, rtol=0, atol=0)  # whatever the batches
    generator.seen.clear()
    assert scores(tmp_path, folder, seed=1).fid != found.fid


@pytest.mark.usefixtures("tiny_lite0")
def test_a_checkpoint_goes_the_way_of_a_run(run, tmp_path):
    folder, generator = run
    checkpoint = folder / "checkpoint/step-00000001.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"")
    assert scores(tmp_path, checkpoint, data=save(tmp_path / "others", IMAGES[:12])).protocol == "lite0-12r-2000f"
    assert generator.seen


def test_folders_that_cannot_be_compared(tmp_path):
    with pytest.raises(ValueError, match=r"protocol: expected one of bsn, .*, got fid"):
        scores(tmp_path, tmp_path, "fid")
    with pytest.raises(ValueError, match=r"path: expected a run, a checkpoint or a folder of images, got .*none"):
        scores(tmp_path, tmp_path / "none")
    with pytest.raises(ValueError, match=r"path: expected images \(.bmp .*\) in .*, got none"):
        scores(tmp_path, tmp_path)
    one = save(tmp_path / "one", IMAGES)
    with pytest.raises(ValueError, match=r"data: expected a folder to compare with, got none"):
        scores(tmp_path, one)
    with pytest.raises(ValueError, match=r"expected at least 50000 images for the protocol modern, got one with 24"):
        scores(tmp_path, one, "modern", data=one)
    (save(tmp_path / "broken", IMAGES[:2]) / "001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken: the member 001.png is broken"):
        scores(tmp_path, tmp_path / "broken", data=one)
    save(tmp_path / "sizes", IMAGES[:1])
    Image.new("RGB", (8, 6)).save(tmp_path / "sizes/001.png")
    with pytest.raises(ValueError, match=r"square images of one size, got .*001.png of 6 x 8 pixels"):
        scores(tmp_path, tmp_path / "sizes", data=one)


@pytest.mark.usefixtures("tiny_lite0")
def test_folders_of_images_of_different_sizes_are_refused(tmp_path):
    one, small = save(tmp_path / "one", IMAGES), save(tmp_path / "small", IMAGES[:, :4, :4])
    with pytest.raises(ValueError, match=r"generate: expected images of shape \(24, 3, 4, 4\), got \(24, 3, 8, 8\)"):
        scores(tmp_path, one, data=small)
