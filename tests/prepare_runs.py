"""Runs of train/prepare.py in this process: the small archives that they take, what they leave, how they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import real_archives as real
from gan.data.store import open_store

RNG = np.random.default_rng(0)
CIFAR = RNG.integers(0, 256, (20, 3072), dtype=np.uint8)
CIFAR_LABELS = [int(x) for x in RNG.integers(0, 10, 20)]
STL = RNG.integers(0, 256, 7 * 3 * 96 * 96, dtype=np.uint8).tobytes()
CELEBA = real.celeba_members(RNG, 6)
# Neither classes nor pictures are in the order of their names.
IMAGENET = {wnid: dict(reversed(real.imagenet_pictures(RNG, 9).items())) for wnid in ("n02084071", "n01440764")}
# The arguments for archives that hold a part of the real ones.
PART = {"cifar10": ["--no-checksum", "--expect", "20"], "stl10": ["--no-checksum", "--expect", "7"]}
PART |= {"celeba": ["--no-checksum", "--expect", "6", "--workers", "1"], "folder": ["--size", "16", "--workers", "1"]}
PART |= {"imagenet": ["--no-checksum", "--expect", "18", "--workers", "1"]}


def run(*args: str | Path) -> None:
    prepare.main([str(arg) for arg in args])


def images(folder: Path) -> np.ndarray:
    found = open_store(folder)
    return found.read(np.arange(found.count))


def refusal(*args: str | Path) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        run(*args)
    message = str(ended.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def antialiased(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear by torch, which shares no code with Pillow."""
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].double()
    y = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return y[0].permute(1, 2, 0).numpy()


def cifar10(folder: Path, members: dict[str, bytes] | None = None) -> Path:
    return real.tar(folder / "cifar.tar.gz", members or real.cifar_members(CIFAR, CIFAR_LABELS))


def stl10(folder: Path, content: bytes = STL) -> Path:
    members = {"stl10_binary/train_X.bin": b"x" * 1000, "stl10_binary/unlabeled_X.bin": content}
    return real.tar(folder / "stl.tar.gz", members)


def celeba(folder: Path, members: dict[str, bytes] | None = None) -> Path:
    return real.zipped(folder / "celeba.zip", members or CELEBA)


def imagenet(folder: Path, classes: Mapping[str, Mapping[str, bytes]] | None = None) -> Path:
    return real.tar_of_classes(folder / "ilsvrc.tar", IMAGENET if classes is None else classes)


def pictures(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


ARCHIVES = {"cifar10": cifar10, "stl10": stl10, "celeba": celeba, "imagenet": imagenet}
