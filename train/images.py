"""Train the papers' CNN GAN on images of your own, of any size that is a multiple of 8 up to 256.

    python train/prepare.py folder my/images --size 64 --out data/mine
    python train/images.py --name mine/bssn --data data/mine --norm bssn --scale 1.2
    python train/images.py --name mine/bssn --data data/mine --norm bssn --scale 1.2 --resume

For another size than 64, --image-size too. Writes runs/<name>/ as the other recipes do. Scores are distances between
features of a network that ships with a package (EfficientNet-lite0): they need no download, and are not FID.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gan import cli, recipe
from gan.config import Config
from gan.presets import METHODS, PRESETS


@dataclass(frozen=True, kw_only=True)
class Images(Config):
    """SN-GAN's setting C (Miyato et al., ICLR 2018, Table 1) with hinge loss and an average of the generator."""

    data: Path
    """The folder that prepare.py has made."""
    image_size: int = 64
    """That of the data, a multiple of 8 up to 256."""
    steps: int = 50_000
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    ema: float = 0.999
    protocol: str = "lite0"
    eval_every: int = 2000
    sample_every: int = 500
    checkpoint_every: int = 2000


def main(config: Images, resume: bool = False, dry_run: bool = False) -> None:
    """Train one run; with --resume continue it, with --dry-run say what it would be. --preset NAME and --method
    NAME: rows of the papers' tables."""
    recipe.train(config, recipe.open_data(config), resume, dry_run)


if __name__ == "__main__":
    cli.start(main, PRESETS, methods=METHODS)
