"""The weights that are normalized in the benchmarks: one table, a reason beside every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

# Compiling takes minutes, and time on a machine with a GPU is short: there it is done for one network.
LONG = not torch.cuda.is_available()

Layer = Callable[[], nn.Module]


@dataclass(frozen=True)
class Workload:
    """The layers of a network that are normalized, and why they are measured."""

    name: str
    layers: tuple[Layer, ...]
    reason: str
    compiled: bool = False  # whether the compiled contestants take part: they compile for 3 seconds and more per layer
    seconds: float = 3.0  # what the interleaved measurement of one case may take


def conv1d(i: int, o: int, kernel: int, groups: int = 1) -> Layer:
    return partial(nn.Conv1d, i, o, kernel, groups=groups)


def conv2d(i: int, o: int, kernel: int) -> Layer:
    """As discriminators have them: 4x4 halves the image, 3x3 and 1x1 keep its size."""
    return partial(nn.Conv2d, i, o, kernel, stride=2 if kernel == 4 else 1, padding=0 if kernel == 1 else 1)


def sn_gan_convolutions(width: int = 64) -> tuple[Layer, ...]:
    w = width
    shapes = ((3, w, 3), (w, w, 4), (w, 2 * w, 3), (2 * w, 2 * w, 4), (2 * w, 4 * w, 3), (4 * w, 4 * w, 4))
    return tuple(conv2d(*shape) for shape in (*shapes, (4 * w, 8 * w, 3)))


def resnet_blocks() -> tuple[Layer, ...]:
    """The six residual blocks of BSSN's code: two 3x3, and a learnt 1x1 shortcut in each, the last one too."""
    widths = (3, 64, 128, 256, 512, 1024, 1024)
    return tuple(layer for i, o in pairwise(widths) for layer in (conv2d(i, o, 3), conv2d(o, o, 3), conv2d(i, o, 1)))


def cifar10_cnn(width: int = 64) -> tuple[Layer, ...]:
    return *sn_gan_convolutions(width), partial(nn.Linear, 8 * width * 4 * 4, 1)


CIFAR10 = Workload(
    "CIFAR10 CNN",
    cifar10_cnn(),
    "SN-GAN's and BSSN's CNN discriminator: the network that every SN paper reports",
    compiled=True,
    seconds=8.0,
)
SMALL_CONVS = Workload(
    "64 small convs",
    (conv2d(64, 64, 3),) * 64,
    "deep and narrow, 147 KB a layer: what is paid per layer",
)
WORKLOADS = (
    CIFAR10,
    Workload(
        "CelebA CNN",
        (*sn_gan_convolutions(), partial(nn.Linear, 512 * 8 * 8, 1)),
        "the same for 64x64 images: a last Linear of 128 KB that is a single row",
    ),
    Workload(
        "ImageNet ResNet",
        (*resnet_blocks(), partial(nn.Linear, 1024, 1)),
        "BSSN's ResNet discriminator: far larger than any cache, with layers of 7 KB to 38 MB",
        compiled=LONG,
    ),
    Workload(
        "Real-ESRGAN U-Net",
        tuple(
            conv2d(*shape)
            for shape in (
                *((64, 128, 4), (128, 256, 4), (256, 512, 4)),
                *((512, 256, 3), (256, 128, 3), (128, 64, 3), (64, 64, 3), (64, 64, 3)),
            )
        ),
        "UNetDiscriminatorSN, the SN network with the most users; its first and last layer are not normalized",
    ),
    Workload(
        "HiFi-GAN scale D",
        (
            conv1d(1, 128, 15),
            conv1d(128, 128, 41, groups=4),
            *(conv1d(i, o, 41, groups=16) for i, o in ((128, 256), (256, 512), (512, 1024), (1024, 1024))),
            *(conv1d(1024, 1024, 5), conv1d(1024, 1, 3)),
        ),
        "vocoders: 1-D kernels of 41 positions, grouped, so that the two reshapes differ most",
    ),
    Workload(
        "4 Linear 4096",
        (partial(nn.Linear, 4096, 4096),) * 4,
        "large matrices of a single view: bandwidth and nothing else",
        compiled=LONG,
    ),
    SMALL_CONVS,
)


def build(workload: Workload, device: torch.device) -> nn.ModuleList:
    """The plain layers, the same at every call."""
    torch.manual_seed(0)
    layers = nn.ModuleList([layer() for layer in workload.layers])
    for layer in layers:
        _plant(layer.weight)
    return layers.to(device)


@torch.no_grad()
def _plant(weight: Tensor) -> None:
    """Add u ⊗ a ⊗ b three times as large as the noise: a dominant direction, as trained layers have, in every reshape.

    Power iteration then meets the singular value decomposition after a few rounds, which the gate asks of everybody.
    """
    o, i, k = weight.flatten(2).shape if weight.ndim > 2 else (*weight.shape, 1)
    noise = weight.std() if weight.numel() > 1 else weight.abs().max()
    size = 3 * noise * max(o**0.5 + (i * k) ** 0.5, (o * k) ** 0.5 + i**0.5)
    u, a, b = (nn.functional.normalize(torch.randn(n), dim=0) for n in (o, i, k))
    weight += size * torch.einsum("o,i,k->oik", u, a, b).view(weight.shape)
