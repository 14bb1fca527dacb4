"""What normalization adds to a whole training step of the CIFAR10 discriminator: hinge loss, backward, Adam."""

from __future__ import annotations

import statistics
import warnings
from functools import lru_cache

import measure
import pytest
import torch
import torch.nn.functional as F
import workloads
from contestants import BASELINE, CONTESTANTS
from measure import DEVICE, Step
from torch import Tensor, nn

import fastsn

PLAIN, PLAIN_COMPILED = "no normalization", "no normalization, compiled"
PER_LAYER = "fastsn BSSN per layer"
# Who it is -> how its layers are normalized (None: not at all), and what it is compared with.
STEPS: dict[str, tuple[str | None, str]] = {
    PLAIN: (None, PLAIN),
    BASELINE: (BASELINE, PLAIN),
    PER_LAYER: (PER_LAYER, PLAIN),
    "fastsn BSSN fused": (PER_LAYER, PLAIN),  # one iteration per forward, as those above
    "fastsn BSSN whole model": (PER_LAYER, PLAIN),  # one iteration for both forwards
    PLAIN_COMPILED: (None, PLAIN_COMPILED),
    "torch SN compiled": (BASELINE, PLAIN_COMPILED),
    "fastsn BSSN fused, compiled": (PER_LAYER, PLAIN_COMPILED),
}
BATCH = 64 if DEVICE.type == "cuda" else 8  # real images, and as many fake ones; 64 is the papers'
SECONDS = 10.0 if DEVICE.type == "cuda" else 40.0

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
    contestant, plain = STEPS[name]
    layers = workloads.build(workloads.CIFAR10, DEVICE)
    if contestant is not None:
        layers = nn.ModuleList([CONTESTANTS[contestant].normalize(layer) for layer in layers])
    model = Discriminator(layers)
    if "fused" in name:
        fastsn.fuse(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.5, 0.999))
    real, fake = torch.randn(2, BATCH, 3, 32, 32, device=DEVICE)
    forward = torch.compile(model, fullgraph=True) if plain == PLAIN_COMPILED else model

    def train() -> None:
        optimizer.zero_grad()
        loss = F.relu(1 - forward(real)).mean() + F.relu(1 + forward(fake)).mean()
        loss.backward()
        optimizer.step()

    def train_whole_model() -> None:
        with fastsn.step(model):
            train()

    step = train_whole_model if name.endswith("whole model") else train
    with warnings.catch_warnings():  # the compiler imports modules that torch itself has deprecated
        warnings.simplefilter("ignore")
        step()
    return step


@lru_cache
def _steps() -> dict[str, Step]:
    return {name: _step(name) for name in STEPS}


@lru_cache
def _rounds() -> dict[str, list[float]]:
    return measure.interleaved(_steps(), SECONDS)


@pytest.mark.parametrize("name", STEPS)
def test_training_step(benchmark, name):
    plain = STEPS[name][1]
    pairs = list(zip(_rounds()[name], _rounds()[plain], strict=True))
    benchmark.extra_info |= {
        "contestant": name,
        "plain": plain,
        "batch": BATCH,
        "step_ms": statistics.median(found for found, _ in pairs) * 1e3,
        # Round by round, because a step varies by more than normalization costs.
        "normalization_ms": statistics.median(found - without for found, without in pairs) * 1e3,
        "rounds": len(pairs),
    }
    benchmark.pedantic(_steps()[name], rounds=3, warmup_rounds=1)
