"""The CNN of the SN-GAN paper (Miyato et al., ICLR 2018, Table 3) and of the BSN authors' code (fjxmlzn/BSN), for any
image size that is a multiple of 8, with a width factor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gan import norms
from gan.config import Numbers
from gan.models.batch_norm import BatchNorm1d, BatchNorm2d


def _widths(width: float) -> tuple[int, int, int, int]:
    a, b, c, d = (max(1, round(width * channels)) for channels in (64, 128, 256, 512))
    return a, b, c, d


class Generator(nn.Module):
    """z (N, latent) to images (N, channels, size, size) in [-1, 1].

    Dense to (size/8)² x 512, with architecture "bsn" then BN over all features and ReLU; three deconv 4x4 stride 2 to
    256, 128, 64, each BN and ReLU; deconv 3x3 to the image; tanh. All weights N(0, 0.02), biases 0; BN momentum 0.1,
    eps 1e-5. Labels are not used.
    """

    classes = 0

    def __init__(self, config: Numbers, channels: int, draw: torch.Generator) -> None:
        super().__init__()
        a, b, c, d = _widths(config.width)
        side = config.image_size // 8
        self.start, features = (d, side, side), d * side**2
        normalized = [BatchNorm1d(features, config.bn_groups), nn.ReLU()] if config.architecture == "bsn" else []
        self.dense = nn.Sequential(nn.Linear(config.latent, features), *normalized)
        self.convs = nn.Sequential(
            *(layer for i, o in ((d, c), (c, b), (b, a)) for layer in _up(i, o, config.bn_groups)),
            nn.ConvTranspose2d(a, channels, 3, stride=1, padding=1),
            nn.Tanh(),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.02, generator=draw)
                nn.init.zeros_(module.bias)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:  # noqa: ARG002 - for conditional networks
        return self.convs(self.dense(z).unflatten(1, self.start))


def _up(i: int, o: int, groups: int) -> tuple[nn.Module, ...]:
    return nn.ConvTranspose2d(i, o, 4, stride=2, padding=1), BatchNorm2d(o, groups), nn.ReLU()


class Discriminator(nn.Module):
    """Images (N, channels, size, size) to scores (N, 1).

    Seven convolutions 64, 64, 128, 128, 256, 256, 512 (3x3 stride 1 and 4x4 stride 2 by turns; the last one times
    last_width), each leaky ReLU 0.1, then a linear layer, all normalized. Convolutions truncated normal 0.02, linear
    N(0, 0.02), biases 0. Labels are not used.
    """

    def __init__(self, config: Numbers, channels: int, draw: torch.Generator) -> None:
        super().__init__()
        make = norms.layers(config)
        a, b, c, d = _widths(config.width)
        d = max(1, round(config.width * config.last_width * 512))
        layers: list[nn.Module] = []
        for i, o, kernel in ((channels, a, 3), (a, a, 4), (a, b, 3), (b, b, 4), (b, c, 3), (c, c, 4), (c, d, 3)):
            layers += [make.conv(i, o, kernel, stride=kernel - 2, padding=1), nn.LeakyReLU(0.1)]
        self.convs = nn.Sequential(*layers)
        self.linear = make.linear(d * (config.image_size // 8) ** 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04, generator=draw)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=draw)
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.zeros_(module.bias)
        norms.start(self, config, channels, draw)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return self.linear(self.convs(images).flatten(1))
