"""Turn an archive, or a folder of images, into a data folder: images.npy, labels.npy, meta.json.

    python train/prepare.py cifar10  cifar-10-python.tar.gz   --out data/cifar10
    python train/prepare.py stl10    stl10_binary.tar.gz      --out data/stl10
    python train/prepare.py celeba   img_align_celeba.zip     --out data/celeba
    python train/prepare.py imagenet ILSVRC2012_img_train.tar --out data/imagenet
    python train/prepare.py folder   my/images --size 64      --out data/mine     # class folders become labels
    python train/prepare.py npy      stl10.npy                --out data/stl10    # what the BSN authors' scripts wrote

The same command continues after an interruption. Pixels are to the bit those of the BSN authors' scripts; --preset
mimicry gives those of mimicry for stl10, celeba and imagenet, and --preset chainer nearly those of the SN-GAN authors,
with the images that they leave out left out, for imagenet.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tyro

from gan import cli
from gan.data.archives import CelebA, Cifar10, Stl10
from gan.data.imagenet import IMAGES, ImageNet
from gan.data.sources import Folder, Npy, Source
from gan.data.writer import write

CORES = os.cpu_count() or 1


def cifar10(archive: tyro.conf.Positional[Path], out: Path, checksum: bool = True, expect: int = 50_000) -> None:
    """cifar-10-python.tar.gz: the 50,000 training images, 32 x 32, with labels."""
    _write(Cifar10(archive, checksum, expect), out)


def stl10(
    archive: tyro.conf.Positional[Path],
    out: Path,
    checksum: bool = True,
    expect: int = 100_000,
    preset: str = "bsn",
) -> None:
    """stl10_binary.tar.gz: the 100,000 unlabelled images, made 48 x 48. Presets: bsn, mimicry."""
    _write(Stl10(archive, checksum, expect, preset), out)


def celeba(
    archive: tyro.conf.Positional[Path],
    out: Path,
    checksum: bool = True,
    expect: int = 202_599,
    preset: str = "bsn",
    workers: int = CORES,
) -> None:
    """img_align_celeba.zip: all 202,599 images, cropped and made 64 x 64. Presets: bsn, mimicry."""
    _write(CelebA(archive, checksum, expect, preset), out, workers)


def imagenet(
    archive: tyro.conf.Positional[Path],
    out: Path,
    checksum: bool = True,
    expect: int = IMAGES,
    preset: str = "bsn",
    size: int = 128,
    workers: int = CORES,
) -> None:
    """ILSVRC2012_img_train.tar: 1,281,167 images of 1,000 classes, made --size x --size. Presets: bsn, chainer,
    mimicry. --expect counts the images of the archive, those that chainer drops too."""
    _write(ImageNet(archive, checksum, expect, preset, size, workers), out, workers)


def folder(
    images: tyro.conf.Positional[Path],
    out: Path,
    size: int,
    expect: int | None = None,
    workers: int = CORES,
) -> None:
    """Pictures of any size: the centred square, made --size x --size. Folders in it are classes."""
    _write(Folder(images, size, expect), out, workers)


def npy(array: tyro.conf.Positional[Path], out: Path, expect: int | None = None) -> None:
    """stl10.npy or celeba.npy as the BSN authors' scripts wrote them, or any uint8 array of shape (N, S, S, 3)."""
    _write(Npy(array, expect), out)


def _write(source: Source, out: Path, workers: int = 1) -> None:
    meta = write(source, out, workers)
    size, classes = meta["image_size"], f", {len(meta['classes'])} classes" if meta["classes"] else ""
    print(f"{out}: {meta['count']:,} images of {size} x {size} x {meta['channels']}{classes}")


def main(args: list[str] | None = None) -> None:
    """The command line. A mistake of the user, a broken archive or a fault of a disk ends in one line and status 1."""
    commands = {command.__name__: cli.later(command) for command in (cifar10, stl10, celeba, imagenet, folder, npy)}
    config = (tyro.conf.FlagCreatePairsOff,)
    try:
        cli.parse_and_call(
            lambda given: tyro.extras.subcommand_cli_from_dict(commands, args=given, config=config), args
        )
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command continues")


if __name__ == "__main__":
    main()
