"""Train the papers' GAN on 1,797 real handwritten digits, on a CPU, in about a minute.

    python train/digits.py --name digits/bssn --norm bssn
    python train/digits.py --name digits/bssn --norm bssn --resume     # continue after an interruption

Writes runs/<name>/ as the other recipes do.
"""

from __future__ import annotations

from dataclasses import dataclass

from gan import cli, recipe
from gan.config import Config
from gan.data.digits import digits
from gan.presets import METHODS


@dataclass(frozen=True, kw_only=True)
class Digits(Config):
    """The digits at 16 x 16, an eighth of the paper's width. Learning rates and batch are those of the grid
    digits-scales (train/grids/digits.py), which has 1,000 steps."""

    steps: int = 1500
    batch_size: int = 16
    lr_g: float = 4e-4
    lr_d: float = 4e-4
    channels_last: bool = True
    width: float = 0.125
    image_size: int = 16
    protocol: str = "digits"
    eval_every: int = 250
    log_every: int = 50
    checkpoint_every: int = 250


def main(config: Digits, resume: bool = False, dry_run: bool = False) -> None:
    """Train one run; with --resume continue it, with --dry-run say what it would be. --method NAME: a row of
    the papers' comparisons."""
    recipe.train(config, digits(config.image_size), resume, dry_run)


if __name__ == "__main__":
    cli.start(main, methods=METHODS)
