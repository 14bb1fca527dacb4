"""Images of a trained generator: one picture, a folder of files, or an array.

python train/sample.py runs/cifar10/bssn --out samples.png                  # a grid
python train/sample.py runs/cifar10/bssn --out samples.npz --count 50000    # images: uint8 (N, S, S, C)
python train/sample.py runs/cifar10/bssn --out samples/ --count 1000        # 000000.png, 000001.png, ...
python train/sample.py runs/imagenet/sn  --out classes.png --per-class 8 --classes 0 207 985     # a row of each class

Of a conditional generator, an array has labels, int64 (N,), too; with --per-class, a folder has one of each label.
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
from gan.labels import chosen
from gan.weights import Trained, load

_BATCH = 100


def main(
    path: Annotated[Path, tyro.conf.Positional],
    out: Path,
    count: int | None = None,
    seed: int = 0,
    per_class: int | None = None,
    classes: tuple[int, ...] = (),
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Write COUNT images of the generator in PATH to OUT, whose name says how.

    Args:
        path: The folder of a run, a checkpoint, or weights (.safetensors).
        out: A .png file (a grid), a .npz file, or a folder that is empty or not there.
        count: How many images, of every class in turn; default: 100.
        seed: Image number k is a function of the seed and of k; with --per-class of the label, too. Number k of all
            classes is made of the same z.
        per_class: How many images of each class, in place of --count.
        classes: Labels of the classes for --per-class; default: all.
        device: Where to compute.
    """
    _check(out, count, per_class, classes)
    trained = load(path, device)
    if per_class is None:
        total = 100 if count is None else count
        z, labels = streams.numbered(seed, "sample", 0, total, trained.config.latent), trained.numbered_labels(0, total)
        columns, names = math.ceil(math.sqrt(total)), [f"{k:06d}.png" for k in range(total)]
    else:
        if not trained.conditional:
            raise ValueError(f"per_class must be left out for a generator that takes no labels, got {per_class}")
        each = chosen(classes, trained.classes)
        z = streams.numbered(seed, "sample", 0, per_class, trained.config.latent).repeat(len(each), 1)
        labels = torch.tensor(each).repeat_interleave(per_class)
        columns, names = per_class, [f"{label}/{k:06d}.png" for label in each for k in range(per_class)]
    batches = _images(trained, z, labels)
    if not out.suffix:
        for name, image in zip(names, (image for batch in batches for image in batch), strict=True):
            checkpoint.atomic_write(out / name, _png(pictures.grid(image[None], 1)))
        return
    images = torch.cat(list(batches))
    if out.suffix == ".png":
        checkpoint.atomic_write(out, _png(pictures.grid(images, columns)))
    else:
        arrays = {"images": images.permute(0, 2, 3, 1).numpy()}
        if labels is not None:
            arrays["labels"] = labels.numpy()
        array = io.BytesIO()
        np.savez(array, **arrays)
        checkpoint.atomic_write(out, array.getbuffer())


def _check(out: Path, count: int | None, per_class: int | None, classes: tuple[int, ...]) -> None:
    for name, value in (("count", count), ("per_class", per_class)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if count is not None and per_class is not None:
        raise ValueError(f"count must be left out with per_class {per_class}, got {count}")
    if classes and per_class is None:
        raise ValueError(f"classes must be left out without per_class, got {' '.join(map(str, classes))}")
    if out.suffix not in ("", ".png", ".npz"):
        raise ValueError(f"out must be a .png file, a .npz file or a folder, got {out}")
    if not out.suffix and out.exists() and any(out.iterdir()):
        raise ValueError(f"out must be an empty folder or none yet, got {out}, which holds something")


@torch.no_grad()
def _images(trained: Trained, z: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
    """uint8 (n, C, S, S)."""
    for first in range(0, len(z), _BATCH):
        part = slice(first, first + _BATCH)
        yield to_uint8(trained.images(z[part], None if labels is None else labels[part])).cpu()


def _png(picture: Image.Image) -> memoryview:
    data = io.BytesIO()
    picture.save(data, "png")
    return data.getbuffer()


if __name__ == "__main__":
    cli.start(main)
