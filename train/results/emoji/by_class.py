"""In what two classes of pictures differ, and their fakes: python by_class.py DATA SAMPLES OUT.csv

DATA: a folder of prepare.py. SAMPLES: a folder of sample.py --per-class. Of each class of either: the share of pixels
that are not white (all channels 250 or more), and the mean red, green and blue, 0 to 255.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def row(name: str, images: np.ndarray) -> list[object]:
    """images: uint8 (N, S, S, 3)."""
    covered = (images.min(-1) < 250).mean()
    return [name, len(images), f"{covered:.3f}", *(f"{mean:.1f}" for mean in images.mean((0, 1, 2)))]


def main(data: Path, samples: Path, out: Path) -> None:
    """Write OUT.csv, a row of each class."""
    images, labels = np.load(data / "images.npy"), np.load(data / "labels.npy")
    rows = [row(f"reals of class {label}", images[labels == label]) for label in np.unique(labels)]
    for folder in sorted(samples.iterdir()):
        files = sorted(folder.glob("*.png"))
        rows.append(row(f"fakes of class {folder.name}", np.stack([np.asarray(Image.open(x)) for x in files])))
    with open(out, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["set", "images", "covered", "red", "green", "blue"], *rows])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
