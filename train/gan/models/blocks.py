"""Residual blocks of the BSN authors' code (fjxmlzn/BSN) and the SN-GAN authors' (pfnet-research/sngan_projection)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gan import norms


@dataclass(frozen=True)
class Flavour:
    """In what the residual networks of the two codes differ, beside their widths."""

    hidden: Literal["in", "out"]
    """Whose channels the middle of a discriminator's block has; of the first block always the output's."""
    always_shortcut: bool
    """Whether a discriminator's block that changes neither size nor width has a 1x1 convolution as its shortcut, and
    not the identity."""
    eps: float
    """Of batch norms."""


FLAVOURS = {
    "bsn-resnet": Flavour(hidden="out", always_shortcut=True, eps=1e-5),
    "sngan-resnet": Flavour(hidden="in", always_shortcut=False, eps=2e-5),
}

# A 1x1 convolution changes places with the mean of 2x2 pixels and with their repetition. The authors have it on the
# large side, in all blocks but the discriminator's first; on the small side it is the same function for a quarter of
# the work.


class DownBlock(nn.Module):
    """(N, i, S, S) to (N, o, S/2, S/2), or (N, o, S, S) where it is not ``down``.

    ReLU (not in the ``first``), conv 3x3, ReLU, conv 3x3, mean of 2x2 pixels; plus the shortcut.
    """

    def __init__(self, make: norms.Layers, i: int, o: int, flavour: Flavour, down: bool, first: bool) -> None:
        super().__init__()
        self.down, self.first = down, first
        hidden = i if flavour.hidden == "in" and not first else o
        self.conv1 = make.conv(i, hidden, 3, padding=1)
        self.conv2 = make.conv(hidden, o, 3, padding=1)
        learnt = down or i != o or flavour.always_shortcut
        self.shortcut = make.conv(i, o, 1) if learnt else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        output: Tensor = h + self.shortcut(x)
        return output


class UpBlock(nn.Module):
    """(N, i, S, S) and labels to (N, o, 2S, 2S).

    Batch norm, ReLU, every pixel repeated 2x2, conv 3x3, batch norm, ReLU, conv 3x3; plus the shortcut, a convolution
    1x1 of repeated pixels. ``norm`` makes a batch norm of so many channels.
    """

    def __init__(self, norm: Callable[[int], nn.Module], i: int, o: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = norm(i), nn.Conv2d(i, o, 3, padding=1)
        self.bn2, self.conv2 = norm(o), nn.Conv2d(o, o, 3, padding=1)
        self.shortcut = nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = self.conv1(_repeated(F.relu(self.bn1(x, labels))))
        h = self.conv2(F.relu(self.bn2(h, labels)))
        output: Tensor = h + _repeated(self.shortcut(x))
        return output


def _repeated(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)


def initialize(net: nn.Module, draw: torch.Generator) -> None:
    """Weights Glorot uniform, U(-a, a) with a = gain sqrt(6 / (fan_in + fan_out)), with the gain sqrt(2) in the 3x3
    convolutions of blocks and 1 elsewhere; biases 0."""
    residual = [conv for m in net.modules() if isinstance(m, DownBlock | UpBlock) for conv in (m.conv1, m.conv2)]
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            gain = math.sqrt(2) if any(module is conv for conv in residual) else 1.0
            nn.init.xavier_uniform_(module.weight, gain, generator=draw)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
