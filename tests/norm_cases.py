"""What the tests of the discriminators' normalizations share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gan import config as configs
from gan.config import Config
from gan.training import Training

CPU = torch.device("cpu")
NORMS = get_args(configs.Norm)
SCHEDULES = get_args(configs.Schedule)
CNN = {"batch_size": 6, "width": 0.05, "image_size": 8, "latent": 5, "steps": 10, "lr_g": 1e-3, "lr_d": 1e-3}
RESNET = {**CNN, "architecture": "sngan-resnet", "image_size": 32, "width": 0.02}
LAYERS = nn.Conv2d | nn.Linear | nn.Embedding


def training(base: dict[str, Any] = CNN, classes: int = 0, **changes: Any) -> Training:
    return Training(Config(name="x", **{**base, **changes}), 3, classes, CPU)


def batches(of: Training, seed: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
    draw, size, count = torch.Generator().manual_seed(seed), of.config.image_size, of.config.batch_size
    while True:
        images = torch.randint(0, 256, (count, 3, size, size), generator=draw, dtype=torch.uint8)
        yield images, torch.randint(of.classes, (count,), generator=draw) if of.classes else None


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in net.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
