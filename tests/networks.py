"""A network with everything in it that whole-model functions meet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastsn


def network() -> nn.Sequential:
    """Layers and drop-ins, nested, one used twice, one weight normalised by something else."""
    shared = fastsn.BSSNConv2d(4, 4, 3, padding=1, scale=1.3)
    block = nn.Sequential(shared, nn.ReLU(), shared, fastsn.spectral_norm(nn.Conv2d(4, 4, 3, padding=1), variant="bsn"))
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(2, 4, 3, padding=1)),
        block,
        fastsn.spectral_norm(nn.ConvTranspose2d(4, 3, 2)),
        nn.Flatten(),
        fastsn.SNLinear(3 * 7 * 7, 2),
    )


def batch() -> Tensor:
    return torch.randn(2, 2, 6, 6)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.named_buffers()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {k for k, v in model.named_buffers() if not torch.equal(before[k], v)}
