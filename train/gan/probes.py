"""What is logged beside the losses: slopes of the discriminator, its sigmas, the time of each phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gan.training import Training


def slopes(training: Training) -> dict[str, Tensor]:
    """Mean, least and greatest norm of the gradient of D at the last real and fake images; u and v stay."""
    found = {}
    real, labels, fake, fake_labels = training.last
    with training.norm.at_rest():
        for name, images, own in (("real", real, labels), ("fake", fake, fake_labels)):
            points = images.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(training.discriminator(points, own).sum(), points)
            norms = gradient.flatten(1).norm(dim=1)
            found |= {f"slope/{name}_{how}": getattr(norms, how)() for how in ("mean", "min", "max")}
    return found


class Phases:
    """Seconds that phases of a run have taken since they were last asked for."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def taken(self) -> dict[str, float]:
        """Share of each, in percent of all."""
        total = sum(self._seconds.values()) or 1.0
        found = {f"time/{name}_percent": 100 * seconds / total for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return found
