"""The random numbers of training: each a function of the seed, of what it is for, and of the step.

Nothing is stored: a run that continues draws what it would have drawn.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_BLOCK = 256  # numbers of a noise stream that are drawn together


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A generator on the CPU, so that every device gets the same numbers, for one purpose at one moment."""
    digest = hashlib.blake2b(repr((seed, purpose, counters)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(seed: int, purpose: str, shape: tuple[int, ...], *counters: int) -> Tensor:
    """N(0, 1) of a moment."""
    return torch.randn(shape, generator=generator(seed, purpose, *counters))


def uniform(seed: int, purpose: str, shape: tuple[int, ...], *counters: int) -> Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(shape, generator=generator(seed, purpose, *counters))


def labels(seed: int, purpose: str, count: int, classes: int, *counters: int) -> Tensor:
    """Uniform over the classes, int64."""
    return torch.randint(classes, (count,), generator=generator(seed, purpose, *counters))


def numbered(seed: int, purpose: str, first: int, count: int, latent: int) -> Tensor:
    """z number first, first + 1, ...: the same for a number however many are asked for at a time."""
    begin = first // _BLOCK
    blocks = range(begin, (first + count - 1) // _BLOCK + 1)
    drawn = torch.cat([normal(seed, purpose, (_BLOCK, latent), block) for block in blocks])
    return drawn[first - begin * _BLOCK :][:count]


def numbered_labels(first: int, count: int, classes: int) -> Tensor:
    """Classes of z number first, first + 1, ...: every class equally often."""
    return torch.arange(first, first + count) % classes
