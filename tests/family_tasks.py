"""What the models of families.py learn here: small ones, with the losses of their recipes, on data made on the spot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families import MultiScaleDiscriminator, SNGPClassifier, UNetDiscriminator


def images(bright: float = 0.0) -> Tensor:
    return torch.rand(2, 3, 16, 16) + bright


def waves(pitch: float) -> Tensor:
    return torch.sin(pitch * torch.arange(512.0) + 6 * torch.rand(2, 1, 1))


def moons(count: int = 32) -> tuple[Tensor, Tensor]:
    angle, label = torch.pi * torch.rand(count), torch.arange(count) % 2
    x = torch.stack([angle.cos() + label - 0.5, (1 - 2 * label) * (angle.sin() - 0.25)], 1)
    return x + 0.05 * torch.randn(count, 2), label


def gan_loss(logits: Tensor, is_real: bool) -> Tensor:
    """Real-ESRGAN's."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(is_real)))


def upscaler_loss(model: nn.Module) -> Tensor:
    return gan_loss(model(images(0.5)), True) + gan_loss(model(images()), False)


def vocoder_loss(model: nn.Module) -> Tensor:
    """HiFi-GAN's."""
    reals, generated, _, _ = model(waves(0.05), waves(0.2))
    return sum((1 - r).square().mean() + g.square().mean() for r, g in zip(reals, generated, strict=True))


def classifier_loss(model: nn.Module) -> Tensor:
    x, label = moons()
    return F.cross_entropy(model(x), label)


class Family(NamedTuple):
    """How to build a small one, its loss, inputs for evaluation, and how many of its weights have spectral norms."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    inputs: Callable[[], tuple[Tensor, ...]]
    norms: int


FAMILIES = {
    "upscaler": Family(partial(UNetDiscriminator, width=8), upscaler_loss, lambda: (images(),), 8),
    "vocoder": Family(partial(MultiScaleDiscriminator, 16), vocoder_loss, lambda: (waves(0.05), waves(0.2)), 8),
    "classifier": Family(
        partial(SNGPClassifier, width=32, depth=4, features=64), classifier_loss, lambda: (moons()[0],), 4
    ),
}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def train(model: nn.Module, loss: Callable, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> list[float]:
    """The losses; data and dropout are the same for the same seed."""
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def trained(family: Family, steps: int = 3) -> nn.Module:
    """As users have it: trained with torch's norms."""
    model = family.build()
    train(model, family.loss, adam(model), steps)
    return model


def tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    else:
        yield from itertools.chain.from_iterable(map(tensors, output))


@torch.no_grad()
def evaluated(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """All that it returns in evaluation, feature maps and variances too."""
    mode = model.training
    found = [*tensors(model.eval()(*inputs))]
    model.train(mode)
    return found
