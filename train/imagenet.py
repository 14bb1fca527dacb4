"""Train the papers' residual GANs on ImageNet, 128 pixels a side, on one GPU, on all of a machine, or on several nodes.

    python train/prepare.py imagenet ILSVRC2012_img_train.tar --out data/imagenet
    torchrun --nproc_per_node 8 train/imagenet.py --name imagenet/bssn --data data/imagenet --norm bssn --scale 1.4
    torchrun --nproc_per_node 4 train/imagenet.py --name imagenet/proj --data data/imagenet --preset sngan-projection

Batch sizes are those of all processes together, and so are groups of batch norms (--bn-groups): a recipe is the same on
any number of GPUs. Writes runs/<name>/ as the other recipes do. The same line with --resume continues after an
interruption, on as many processes or on another number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gan import cli, recipe
from gan.config import Architecture, Config, ZOfG
from gan.presets import IMAGENET, METHODS


@dataclass(frozen=True, kw_only=True)
class ImageNet(Config):
    """The BSN authors' settings (Lin et al., NeurIPS 2021), whose scales are 1 to 1.6: preset bsn."""

    data: Path
    """The folder that prepare.py has made."""
    architecture: Architecture = "bsn-resnet"
    image_size: int = 128
    steps: int = 500_000
    batch_size: int = 16
    batch_size_g: int = 32
    n_dis: int = 5
    z_of_g: ZOfG = "fresh"
    batch_norm_in_d_steps: bool = False
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    beta1: float = 0.0
    beta2: float = 0.9
    channels_last: bool = True


def main(config: ImageNet, resume: bool = False, dry_run: bool = False) -> None:
    """Train one run; with --resume continue it, with --dry-run say what it would be. --preset NAME and --method
    NAME: rows of the papers' tables."""
    recipe.train(config, recipe.open_data(config), resume, dry_run)


if __name__ == "__main__":
    cli.start(main, IMAGENET, methods=METHODS)
