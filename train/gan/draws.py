"""What the host has for the networks in one step: images and labels that were picked, and random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gan import streams
from gan.config import Numbers
from gan.devices import sent
from gan.distributed import Ranks
from gan.phases import Phases


class OfDiscriminator(NamedTuple):
    """This rank's part of a discriminator step, on the device, N images and as many fakes."""

    images: Tensor
    """uint8 (N, C, S, S)."""
    labels: Tensor | None
    z: Tensor
    """(N, latent)."""
    fake_labels: Tensor | None
    noise: Tensor | None
    """U(0, 1) of the images' shape, to dequantize them."""
    alpha: Tensor | None
    """U(0, 1), (N, 1, 1, 1), of the gradient penalty."""


class OfGenerator(NamedTuple):
    """This rank's part of a generator step, on the device."""

    z: Tensor
    labels: Tensor | None


Drawn = OfDiscriminator | OfGenerator


class Draws:
    """Of a training: every number depends on the seed, on what it is for, and on the step."""

    def __init__(self, config: Numbers, classes: int, device: torch.device, ranks: Ranks, phases: Phases) -> None:
        self.config, self.classes, self.device, self.ranks, self.phases = config, classes, device, ranks, phases

    def of_step(self, step: int, batches: Iterator[tuple[Tensor, Tensor | None]]) -> Iterator[Drawn]:
        """For the steps of both networks in their order, each drawn when it is asked for."""
        config = self.config
        if config.order == "g_first":
            yield self._of_generator(step)
        for i in range(config.n_dis):
            with self.phases("data"):
                images, labels = next(batches)
            z, fake_labels = self._fakes("d", config.batch_size, step, i)
            noise, alpha = self._noise(images, step, i), self._alpha(step, i)
            yield OfDiscriminator(images, labels, z, fake_labels, noise, alpha)
        if config.order == "d_first":
            yield OfGenerator(z, fake_labels) if config.z_of_g == "reused" else self._of_generator(step)

    def _of_generator(self, step: int) -> OfGenerator:
        return OfGenerator(*self._fakes("g", self.config.batch_size_g or self.config.batch_size, step, 0))

    def _fakes(self, of: str, count: int, *moment: int) -> tuple[Tensor, Tensor | None]:
        seed = self.config.seed
        z = self._part(streams.normal(seed, f"z of {of}", (count, self.config.latent), *moment))
        if not self.classes:
            return z, None
        return z, self._part(streams.labels(seed, f"labels of {of}", count, self.classes, *moment))

    def _noise(self, images: Tensor, *moment: int) -> Tensor | None:
        """Drawn image by image: a rank draws its own only."""
        if not self.config.dequantize:
            return None
        first, shape = self.ranks.share(self.config.batch_size).start, tuple(images.shape[1:])
        numbers = range(first, first + len(images))
        drawn = [streams.uniform(self.config.seed, "dequantization", shape, *moment, number) for number in numbers]
        return sent(torch.stack(drawn), self.device)

    def _alpha(self, *moment: int) -> Tensor | None:
        if not self.config.gradient_penalty:
            return None
        return self._part(streams.uniform(self.config.seed, "penalty", (self.config.batch_size, 1, 1, 1), *moment))

    def _part(self, batch: Tensor) -> Tensor:
        """This rank's, on the device."""
        return sent(batch[self.ranks.share(len(batch))], self.device)
