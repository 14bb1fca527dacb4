"""Every recipe at a sixteenth of its width, from an archive in the real format to pictures, scores and weights."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import celeba
import cifar10
import images
import prepare
import real_archives as real
import stl10
from gan import recipe
from gan.config import Config
from gan.data.store import memory_store
from gan.metrics import features
from gan.weights import load_generator
from test_evaluate import Tiny

RNG = np.random.default_rng(0)
TINY = {"width": 1 / 16, "steps": 2, "batch_size": 4, "log_every": 1, "sample_every": 2, "checkpoint_every": 2}


def archive(name: str, folder: Path) -> list[str]:
    """Written to the folder; the arguments of prepare.py for it."""
    if name == "cifar10":
        data = RNG.integers(0, 256, (10, 3072), dtype=np.uint8)
        return [str(real.tar(folder / "c.tar.gz", real.cifar_members(data, list(range(10))))), "--expect", "10"]
    if name == "stl10":
        content = RNG.integers(0, 256, 5 * 3 * 96 * 96, dtype=np.uint8).tobytes()
        return [str(real.tar(folder / "s.tar.gz", {"stl10_binary/unlabeled_X.bin": content})), "--expect", "5"]
    if name == "celeba":
        return [str(real.zipped(folder / "a.zip", real.celeba_members(RNG, 4))), "--expect", "4", "--workers", "1"]
    for i in range(6):
        path = folder / "mine" / ("cats" if i % 2 else "dogs") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(real.encoded(real.picture(RNG, 40, 50)))
    return [str(folder / "mine"), "--size", "16", "--workers", "1"]


@pytest.mark.parametrize(
    ("name", "main", "config"),
    [
        ("cifar10", cifar10.main, cifar10.Cifar10),
        ("stl10", stl10.main, stl10.Stl10),
        ("celeba", celeba.main, celeba.Celeba),
        ("folder", images.main, images.Images),
    ],
)
def test_from_an_archive_to_pictures_and_weights(name, main, config, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "lite0", lambda _: features.with_checksum(Tiny()))
    given = archive(name, tmp_path)
    checksum = [] if name == "folder" else ["--no-checksum"]
    prepare.main([name, *given, *checksum, "--out", str(tmp_path / "data")])
    own = {"image_size": 16, "eval_every": 2} if name == "folder" else {"eval_every": 0}
    if name == "folder":
        monkeypatch.setattr(Tiny, "forward", lambda self, x: (x[:, 0, 0, :6], self.logits(x[:, 0, 0, :6])))
    chosen = config(name="x", runs=tmp_path / "runs", data=tmp_path / "data", norm="bssn", scale=1.4, **TINY, **own)
    main(chosen)
    run = tmp_path / "runs/x"
    size = chosen.image_size
    with Image.open(run / "sample/step-00000002.png") as picture:
        assert picture.size == (10 * (size + 1) - 1, 10 * (size + 1) - 1)
    with Image.open(run / "reals.png") as picture:
        assert picture.mode == "RGB"
    generator, found = load_generator(run)
    assert generator(torch.randn(2, found.latent)).shape == (2, 3, size, size)
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["protocol"] for row in rows] == (["lite0-6r-2000f"] if name == "folder" else [])
    main(chosen, resume=True)
    assert "is complete at step 2" in (run / "worker.log").read_text()


def test_without_the_protocols_network_training_goes_on_and_the_row_says_why(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTSN_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    store = memory_store("black", np.zeros((5000, 8, 8, 3), np.uint8))
    recipe.train(Config(name="x", runs=tmp_path, image_size=8, eval_every=1, protocol="bsn", **TINY), store)
    with open(tmp_path / "x/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["fid"]) for row in rows] == [("1", ""), ("2", "")]
    assert all("6726825d" in row["missing"] for row in rows)


def test_a_named_file_of_weights_that_is_not_there_stops_the_run_at_once(tmp_path):
    store = memory_store("black", np.zeros((5000, 8, 8, 3), np.uint8))
    config = Config(name="x", runs=tmp_path, image_size=8, inception_weights=tmp_path / "none.pth", **TINY)
    with pytest.raises(FileNotFoundError, match=r"none.pth"):
        recipe.train(config, store)
    assert list(tmp_path.iterdir()) == []
