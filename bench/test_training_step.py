"""What normalisation adds to a whole training step of the CIFAR10 discriminator: hinge loss, backward, Adam."""

from __future__ import annotations

import statistics
from functools import lru_cache

import measure
import pytest
import torch
import torch.nn.functional as F
import workloads
from contestants import CONTESTANTS, GROWING
from measure import DEVICE, Step
from torch import Tensor, nn

import fastsn

PLAIN = "no normalisation"
BATCH = 64 if DEVICE.type == "cuda" else 8  # real images, and as many fake ones; 64 is the papers'
SECONDS = 20.0

pytestmark = pytest.mark.timeout(1200)


class Discriminator(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        *convolutions, last = self.layers
        for layer in convolutions:
            x = F.leaky_relu(layer(x), 0.1)
        return last(x.flatten(1))


def _step(name: str) -> Step:
    layers = workloads.build(workloads.CIFAR10, DEVICE)
    if name != PLAIN:
        layers = nn.ModuleList([CONTESTANTS[name].normalise(layer) for layer in layers])
    model = Discriminator(layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.5, 0.999))
    real, fake = torch.randn(2, BATCH, 3, 32, 32, device=DEVICE)

    def train() -> None:
        optimizer.zero_grad()
        loss = F.relu(1 - model(real)).mean() + F.relu(1 + model(fake)).mean()
        loss.backward()
        optimizer.step()

    def train_whole_model() -> None:
        with fastsn.step(model):
            train()

    return train_whole_model if name.endswith("whole model") else train


@lru_cache
def _steps() -> dict[str, Step]:
    return {name: _step(name) for name in (PLAIN, *GROWING)}


@lru_cache
def _rounds() -> dict[str, list[float]]:
    return measure.interleaved(_steps(), SECONDS)


@pytest.mark.parametrize("name", [PLAIN, *GROWING])
def test_training_step(benchmark, name):
    found, plain = _rounds()[name], _rounds()[PLAIN]
    benchmark.extra_info |= {
        "contestant": name,
        "batch": BATCH,
        "step_ms": statistics.median(found) * 1e3,
        # Round by round, because a step varies by more than normalisation costs.
        "normalisation_ms": statistics.median(x - y for x, y in zip(found, plain, strict=True)) * 1e3,
        "rounds": len(found),
    }
    benchmark.pedantic(_steps()[name], rounds=3, warmup_rounds=1)
