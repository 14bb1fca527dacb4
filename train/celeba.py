"""Train the papers' CNN GAN on CelebA images, 64 pixels a side.

    python train/prepare.py celeba img_align_celeba.zip --out data/celeba
    python train/celeba.py --name celeba/bssn --data data/celeba --norm bssn --scale 1.4
    python train/celeba.py --name celeba/sn --data data/celeba --preset sngan-c --loss hinge

Writes runs/<name>/: worker.log, metrics.csv, scalars.jsonl, time.txt, config.json, reals.png, sample/, checkpoint/,
weights/, tensorboard/. The same line with --resume continues after an interruption.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gan import cli, recipe
from gan.config import Config
from gan.presets import METHODS, PRESETS


@dataclass(frozen=True, kw_only=True)
class Celeba(Config):
    """The BSN authors' settings of their scale sweep (Lin et al., NeurIPS 2021)."""

    data: Path
    """The folder that prepare.py has made."""
    steps: int = 400_000
    image_size: int = 64


def main(config: Celeba, resume: bool = False, dry_run: bool = False) -> None:
    """Train one run; with --resume continue it, with --dry-run say what it would be. --preset NAME and --method
    NAME: rows of the papers' tables."""
    recipe.train(config, recipe.open_data(config), resume, dry_run)


if __name__ == "__main__":
    cli.start(main, PRESETS, methods=METHODS)
