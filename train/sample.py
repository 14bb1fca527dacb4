"""Images of a trained generator: one picture, a folder of files, or an array.

python train/sample.py runs/cifar10/bssn --out samples.png                  # a grid
python train/sample.py runs/cifar10/bssn --out samples.npz --count 50000    # images: uint8 (N, S, S, C)
python train/sample.py runs/cifar10/bssn --out samples/ --count 1000        # 000000.png, 000001.png, ...
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from gan import checkpoint, cli, pictures, streams
from gan.data.images import to_uint8
from gan.weights import load_generator

_BATCH = 100


def main(path: Annotated[Path, tyro.conf.Positional], out: Path, count: int = 100, seed: int = 0) -> None:
    """Write COUNT images of the generator in PATH to OUT, whose name says how.

    Args:
        path: The folder of a run, a checkpoint, or weights (.safetensors).
        out: A .png file (a grid), a .npz file, or a folder that is empty or not there.
        count: How many images.
        seed: Image number k is a function of the seed and of k; its label, if the generator takes any, is k modulo the
            classes.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if out.suffix not in ("", ".png", ".npz"):
        raise ValueError(f"out must be a .png file, a .npz file or a folder, got {out}")
    if not out.suffix and out.exists() and any(out.iterdir()):
        raise ValueError(f"out must be an empty folder or none yet, got {out}, which holds something")
    batches = _images(path, count, seed)
    if not out.suffix:
        for number, image in enumerate(image for batch in batches for image in batch):
            checkpoint.atomic_write(out / f"{number:06d}.png", _png(pictures.grid(image[None], 1)))
        return
    images = torch.cat(list(batches))
    if out.suffix == ".png":
        checkpoint.atomic_write(out, _png(pictures.grid(images, math.ceil(math.sqrt(count)))))
    else:
        array = io.BytesIO()
        np.savez(array, images=images.permute(0, 2, 3, 1).numpy())
        checkpoint.atomic_write(out, array.getbuffer())


@torch.no_grad()
def _images(path: Path, count: int, seed: int) -> Iterator[Tensor]:
    """uint8 (n, C, S, S)."""
    generator, config = load_generator(path)
    for first in range(0, count, _BATCH):
        number = min(_BATCH, count - first)
        z = streams.numbered(seed, "sample", first, number, config.latent)
        labels = streams.numbered_labels(first, number, generator.classes) if generator.classes else None
        yield to_uint8(generator(z, labels))


def _png(picture: Image.Image) -> memoryview:
    data = io.BytesIO()
    picture.save(data, "png")
    return data.getbuffer()


if __name__ == "__main__":
    cli.start(main)
