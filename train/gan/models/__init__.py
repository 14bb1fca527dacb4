"""The networks of a run."""

from __future__ import annotations

import torch
from torch import nn

from gan.config import Numbers
from gan.models import cnn, resnet

__all__ = ["build"]


def build(config: Numbers, channels: int, classes: int = 0) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator on the CPU, drawn from the seed without touching the global random state. ``classes``
    is 0 for data without labels.

    The weights have a generator of their own, so that every normalization starts from the same ones.

    Raises:
        ValueError: a conditional config without classes.
    """
    if config.conditional != "none" and classes == 0:
        raise ValueError(f"conditional must be 'none' for data without labels, got {config.conditional!r}")
    draw = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the first u and v
        if config.architecture in resnet.PLANS:
            given = config, channels, classes, draw
            return resnet.Generator(*given), resnet.Discriminator(*given)
        return cnn.Generator(config, channels, draw), cnn.Discriminator(config, channels, draw)
