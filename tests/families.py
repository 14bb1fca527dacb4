"""Four models of users, rebuilt from their papers at any width, with torch's spectral norms as users have them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook

Wrap = Callable[[nn.Module], nn.Module]


class UNetDiscriminator(nn.Module):
    """Real-ESRGAN (Wang et al., 2021): a logit for each pixel. Down three times, up again, with skip connections. All
    convolutions but the first and the last are normalized and have no bias."""

    def __init__(self, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        down = ((width, 2 * width), (2 * width, 4 * width), (4 * width, 8 * width))
        up = ((8 * width, 4 * width), (4 * width, 2 * width), (2 * width, width))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(hook(nn.Conv2d(i, o, 4, stride=2, padding=1, bias=False)) for i, o in down)
        self.up = nn.ModuleList(hook(nn.Conv2d(i, o, 3, padding=1, bias=False)) for i, o in up)
        self.refine = nn.ModuleList(hook(nn.Conv2d(width, width, 3, padding=1, bias=False)) for _ in range(2))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.2)
        skips = []
        for layer in self.down:
            skips.append(x)
            x = F.leaky_relu(layer(x), 0.2)
        for layer in self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = F.leaky_relu(layer(x), 0.2) + skips.pop()
        for layer in self.refine:
            x = F.leaky_relu(layer(x), 0.2)
        return self.last(x)


class ScaleDiscriminator(nn.Module):
    """One of HiFi-GAN's: long kernels, grouped and strided; returns logits and the feature map of every layer."""

    def __init__(self, width: int, wrap: Wrap) -> None:
        super().__init__()
        w = width  # (in, out, kernel, stride, groups)
        sizes = [(1, w, 15, 1, 1), (w, w, 41, 2, 4), (w, 2 * w, 41, 2, 16), (2 * w, 4 * w, 41, 4, 16)]
        sizes += [(4 * w, 8 * w, 41, 4, 16), (8 * w, 8 * w, 41, 1, 16), (8 * w, 8 * w, 5, 1, 1)]
        self.convs = nn.ModuleList(
            wrap(nn.Conv1d(i, o, kernel, stride, groups=groups, padding=kernel // 2))
            for i, o, kernel, stride, groups in sizes
        )
        self.last = wrap(nn.Conv1d(8 * w, 1, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            maps.append(x)
        maps.append(self.last(x))
        return maps[-1].flatten(1), maps


class MultiScaleDiscriminator(nn.Module):
    """HiFi-GAN (Kong et al., 2020): three of them, on the waveform, at half and at quarter rate. The first has spectral
    norms, the others weight norms (torch's old hook or its parametrization). A forward takes real and generated."""

    def __init__(self, width: int = 128, weight_norm: Wrap = parametrizations.weight_norm) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(ScaleDiscriminator(width, w) for w in (hook, weight_norm, weight_norm))
        self.pool = nn.AvgPool1d(4, stride=2, padding=2)

    def forward(
        self, y: Tensor, y_hat: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]], list[list[Tensor]]]:
        found: list[list] = [[], [], [], []]
        for i, discriminator in enumerate(self.discriminators):
            if i:
                y, y_hat = self.pool(y), self.pool(y_hat)
            (real, real_maps), (generated, generated_maps) = discriminator(y), discriminator(y_hat)
            for values, value in zip(found, (real, generated, real_maps, generated_maps), strict=True):
                values.append(value)
        return tuple(found)


class ResidualBlock(nn.Module):
    """Of SN-GAN's discriminators: two normalized convolutions beside a shortcut, which is one too where it has to be.
    The first block of a network takes pixels: no activation before it, and its shortcut comes after the pool."""

    def __init__(self, inputs: int, outputs: int, down: bool, first: bool = False) -> None:
        super().__init__()
        self.conv1 = hook(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv2 = hook(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = hook(nn.Conv2d(inputs, outputs, 1)) if down or inputs != outputs else nn.Identity()
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.conv2(F.relu(self.conv1(x if self.first else F.relu(x)))))
        return h + (self.shortcut(self.pool(x)) if self.first else self.pool(self.shortcut(x)))


class ProjectionDiscriminator(nn.Module):
    """SN-GAN's residual discriminator (Miyato et al., 2018) of images of 32 x 32 pixels, with labels as a projection
    (Miyato and Koyama, 2018), as torch_mimicry has it. Every weight is normalized."""

    def __init__(self, classes: int = 10, width: int = 128) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            ResidualBlock(3, width, down=True, first=True),
            ResidualBlock(width, width, down=True),
            ResidualBlock(width, width, down=False),
            ResidualBlock(width, width, down=False),
        )
        self.linear = hook(nn.Linear(width, 1))
        self.embedding = hook(nn.Embedding(classes, width))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = F.relu(self.blocks(x)).sum((2, 3))
        return self.linear(h) + (self.embedding(label) * h).sum(1, keepdim=True)


class RandomFeatureGaussianProcess(nn.Module):
    """SNGP's last layer: fixed random cosines of the features, linear in what is learnt, so that Laplace's
    approximation of the posterior is one precision matrix per class, gathered during training."""

    def __init__(self, inputs: int, classes: int, features: int, length: float = 2.0, momentum: float = 0.95) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(features, inputs) / length)
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.register_buffer("precision", torch.eye(features).repeat(classes, 1, 1))
        self.output = nn.Linear(features, classes, bias=False)
        self.momentum = momentum

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        phi = math.sqrt(2 / len(self.phases)) * torch.cos(F.linear(x, self.frequencies, self.phases))
        logits = self.output(phi)
        if self.training:
            with torch.no_grad():
                p = logits.softmax(-1)
                seen = torch.einsum("nk,ni,nj->kij", p * (1 - p), phi, phi)
                self.precision.lerp_(seen.to(self.precision), 1 - self.momentum)
            return logits
        phi = phi.to(self.precision)
        return logits, torch.einsum("ni,kij,nj->nk", phi, torch.linalg.inv(self.precision), phi)


class SNGPClassifier(nn.Module):
    """SNGP (Liu et al., 2020): a residual network whose hidden layers are normalized, so that distances survive, and a
    Gaussian process on top. Logits in training; in evaluation their variance too, larger far from the data."""

    def __init__(
        self, inputs: int = 2, width: int = 128, depth: int = 6, classes: int = 2, features: int = 1024
    ) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width).requires_grad_(False)
        self.hidden = nn.ModuleList(parametrizations.spectral_norm(nn.Linear(width, width)) for _ in range(depth))
        self.dropout = nn.Dropout(0.1)
        self.process = RandomFeatureGaussianProcess(width, classes, features)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.first(x)
        for layer in self.hidden:
            x = x + self.dropout(F.relu(layer(x)))
        return self.process(x)
