"""The residual networks of the BSN authors' code (fjxmlzn/BSN, no_gamma-ResNet) and of the SN-GAN paper (Miyato et al.,
ICLR 2018, B.4) with its authors' code (pfnet-research/sngan_projection), unconditional or conditional (Miyato and
Koyama, ICLR 2018), with a width factor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gan import norms
from gan.config import Numbers
from gan.models import labels as given
from gan.models.batch_norm import BatchNorm2d, ConditionalBatchNorm2d
from gan.models.blocks import FLAVOURS, DownBlock, UpBlock, initialize

EMBEDDED = 128  # channels of the labels of a concat discriminator


@dataclass(frozen=True)
class Plan:
    """Channels of the two networks for one image size."""

    generator: tuple[int, ...]
    """After the dense layer, and after each block."""
    down: tuple[int, ...]
    """After each block of the discriminator that halves the size."""
    same: tuple[int, ...]
    """After each block of the discriminator that follows."""
    concat_after: int = 3
    """The block of the discriminator, counted from 1, whose output has the labels of "concat" put beside it."""
    head_bias: bool = True


# The BSN authors have 128 pixels only; smaller images have the same construction with fewer blocks, a square of 4 or 6
# pixels a side in the middle. The SN-GAN authors: CIFAR10 and STL10 are the paper's, 64 and 128 are their code's. Their
# concat discriminator, of 128 pixels, has the labels after the block that gives 256 channels; the one of 32 pixels has
# none such, and takes them after the last block that halves.
PLANS: dict[str, dict[int, Plan]] = {
    "bsn-resnet": {
        32: Plan((256, 256, 128, 64), (64, 128, 256), (256,)),
        48: Plan((256, 256, 128, 64), (64, 128, 256), (256,)),
        64: Plan((512, 512, 256, 128, 64), (64, 128, 256, 512), (512,)),
        128: Plan((1024, 1024, 512, 256, 128, 64), (64, 128, 256, 512, 1024), (1024,)),
    },
    "sngan-resnet": {
        32: Plan((256, 256, 256, 256), (128, 128), (128, 128), concat_after=2, head_bias=False),
        48: Plan((512, 256, 128, 64), (64, 128, 256, 512), (1024,)),
        64: Plan((1024, 512, 256, 128, 64), (64, 128, 256, 512, 1024), ()),
        128: Plan((1024, 1024, 512, 256, 128, 64), (64, 128, 256, 512, 1024), (1024,)),
    },
}


def _scaled(channels: int, width: float) -> int:
    return max(1, round(width * channels))


class Generator(nn.Module):
    """z (N, latent), and labels (N,) where it is conditional, to images (N, channels, size, size) in [-1, 1].

    A dense layer, blocks that double the size, batch norm, ReLU, conv 3x3, tanh. Conditional: the batch norms of the
    blocks are; the last one is not. ``classes``: how many, 0 where labels are not used.

    Raises ValueError for labels that are missing or of another shape, and in evaluation for those that are no class.
    """

    def __init__(self, config: Numbers, channels: int, classes: int, draw: torch.Generator) -> None:
        super().__init__()
        plan, eps = PLANS[config.architecture][config.image_size], FLAVOURS[config.architecture].eps
        first, *rest = (_scaled(c, config.width) for c in plan.generator)
        self.classes = classes if config.conditional != "none" else 0
        self.start = (first, *[config.image_size // 2 ** len(rest)] * 2)
        self.dense = nn.Linear(config.latent, first * self.start[1] ** 2)
        plain = partial(BatchNorm2d, groups=config.bn_groups, eps=eps)
        norm = partial(ConditionalBatchNorm2d, classes=classes, groups=config.bn_groups, eps=eps)
        inputs = (first, *rest[:-1])
        self.blocks = nn.ModuleList(
            UpBlock(norm if self.classes else plain, i, o) for i, o in zip(inputs, rest, strict=True)
        )
        self.norm = plain(rest[-1])
        self.to_image = nn.Conv2d(rest[-1], channels, 3, padding=1)
        initialize(self, draw)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.classes:
            labels = given.required(labels, z, self.classes, not self.training)
        x = self.dense(z).unflatten(1, self.start)
        for block in self.blocks:
            x = block(x, labels)
        return torch.tanh(self.to_image(F.relu(self.norm(x))))


class Discriminator(nn.Module):
    """Images (N, channels, size, size), and labels (N,) where it is conditional, to scores (N, 1).

    Blocks, ReLU, sum over pixels h (N, C), a linear layer, all normalized. projection: plus <e(y), h>, with e(y) the
    row of label y in a normalized table (classes, C). concat: rows of a normalized table (classes, 128) are channels,
    alike at all pixels, beside those of a block in the middle.

    Raises ValueError for labels that are missing or of another shape, and in evaluation for those that are no class.
    """

    def __init__(self, config: Numbers, channels: int, classes: int, draw: torch.Generator) -> None:
        super().__init__()
        make, flavour = norms.layers(config), FLAVOURS[config.architecture]
        plan = PLANS[config.architecture][config.image_size]
        self.classes = classes if config.conditional != "none" else 0
        self.concat_after = plan.concat_after if config.conditional == "concat" else 0
        blocks, i = [], channels
        for number, o in enumerate((_scaled(c, config.width) for c in (*plan.down, *plan.same)), 1):
            blocks.append(DownBlock(make, i, o, flavour, down=number <= len(plan.down), first=number == 1))
            i = o
            if number == self.concat_after:
                self.embedding = make.embedding(classes, _scaled(EMBEDDED, config.width))
                i += _scaled(EMBEDDED, config.width)
        self.blocks = nn.ModuleList(blocks)
        self.linear = make.linear(i, 1, bias=plan.head_bias)
        if config.conditional == "projection":
            self.embedding = make.embedding(classes, i)
        initialize(self, draw)
        norms.start(self, config, channels, draw)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        embedded = None
        if self.classes:
            embedded = self.embedding(given.required(labels, images, self.classes, not self.training))
        x = images
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if embedded is not None and number == self.concat_after:
                x = torch.cat([x, embedded[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
        h = F.relu(x).sum((2, 3))
        scores: Tensor = self.linear(h)
        if embedded is not None and not self.concat_after:
            scores = scores + (embedded * h).sum(1, keepdim=True)
        return scores
