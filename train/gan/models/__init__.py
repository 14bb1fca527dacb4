"""The networks of a run."""

from __future__ import annotations

import torch

from gan.config import Numbers
from gan.models.cnn import Discriminator, Generator

__all__ = ["Discriminator", "Generator", "build"]


def build(config: Numbers, channels: int, classes: int = 0) -> tuple[Generator, Discriminator]:
    """Both networks on the CPU, drawn from the seed without touching the global random state.

    The weights have a generator of their own, so that every normalisation starts from the same ones.
    """
    draw = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the first u and v
        return Generator(config, channels, draw), Discriminator(config, channels, draw)
