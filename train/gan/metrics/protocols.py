"""The protocols: each says how many images are compared, how they are fed to which network, what is read from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# KID of torch-fidelity: 100 subsets of 1,000, here out of the first 10,000 reals and fakes.
KID_SUBSETS, KID_SUBSET_SIZE, KID_POOL = 100, 1000, 10_000


@dataclass(frozen=True)
class Protocol:
    """One row.

    reals: how many are compared, drawn once and always the same (None: all). fakes: how many they are compared with.
    score_fakes: how many the score is computed from, in ``splits`` parts. separate: those are drawn before, and apart
    from, the fakes of the distance; otherwise both begin with the same image. classes: how many of the logits the
    softmax sees, from the first on (None: all). pixels: fakes stay floats, or become uint8 by truncation or rounding.
    scale: (a, b) of (x - a) / b, which turns pixels from 0 to 255 into what the network takes; its resize is its own:
    Inception's is TensorFlow 1's bilinear one to 299, that of lite0 antialiased bilinear to 224, digits have none.
    distance, score: what the figures are called.
    """

    name: str
    network: Literal["inception", "lite0", "digits"]
    reals: int | None
    fakes: int
    score_fakes: int
    separate: bool = False
    splits: int = 10
    classes: int | None = None
    pixels: Literal["float", "truncate", "round"] = "round"
    scale: tuple[float, float] = (128.0, 128.0)
    kid: bool = False
    distance: str = "FID"
    score: str = "Inception Score"

    @property
    def first_fake(self) -> int:
        """The number of the first fake of the distance."""
        return self.score_fakes if self.separate else 0

    @property
    def all_fakes(self) -> int:
        """How many fakes there have to be."""
        return max(self.score_fakes, self.first_fake + self.fakes)

    def label(self, reals: int) -> str:
        """As metrics.csv names it: with the numbers of images where they are not those of a published protocol."""
        return self.name if self.network == "inception" else f"{self.name}-{reals}r-{self.fakes}f"

    def to_pixels(self, images: Tensor) -> Tensor:
        """float32 from 0 to 255 out of fakes in [-1, 1]; uint8 images are pixels already."""
        if images.dtype == torch.uint8:
            return images.float()
        images = images.float() * 127.5 + 127.5
        if self.pixels == "float":
            return images
        return (images.round() if self.pixels == "round" else images.trunc()).clamp(0, 255)


_ROWS = (
    # The BSN authors' gan/metric.py: pixels / 255 * 2 - 1 before the resize, the first 1,000 of the graph's logits (the
    # network's 1,008 begin with a class of its own, so this is off by one: as they did). Their code does not say
    # whether those logits have the bias; they are taken without, as OpenAI computes them.
    Protocol(
        "bsn",
        "inception",
        reals=5_000,
        fakes=10_000,
        score_fakes=50_000,
        separate=True,
        classes=1_000,
        pixels="float",
        scale=(127.5, 127.5),
    ),
    # The SN-GAN authors' evaluation.py: 10 x 5,000 images for the score, 5,000 others for FID against 10,000 reals.
    # The paper's scores are those of its flag --tf, OpenAI's code: all 1,008 logits without the bias. The port to
    # Chainer that the repository evaluates with while training drops columns after the softmax and scores real CIFAR10
    # at 12.0 instead of 11.24, so it is not offered.
    Protocol(
        "sngan",
        "inception",
        reals=10_000,
        fakes=5_000,
        score_fakes=50_000,
        separate=True,
        pixels="truncate",
    ),
    # What papers report today: all training images against 50,000, exactly as torch-fidelity computes.
    Protocol("modern", "inception", reals=None, fakes=50_000, score_fakes=50_000, kid=True),
    # A classifier trained on the digits themselves: compares runs of train/digits.py with one another.
    Protocol(
        "digits",
        "digits",
        reals=None,
        fakes=2_000,
        score_fakes=2_000,
        scale=(127.5, 127.5),
        distance="digit FID",
        score="digit score",
    ),
    # EfficientNet-lite0 comes from a package index, so this works where nothing can be downloaded. It is not FID.
    Protocol(
        "lite0",
        "lite0",
        reals=None,
        fakes=2_000,
        score_fakes=2_000,
        scale=(127.0, 128.0),
        distance="lite0-FD",
        score="lite0-score",
    ),
)
PROTOCOLS = {row.name: row for row in _ROWS}


def find(name: str) -> Protocol:
    """The row of this name."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name}")
    return PROTOCOLS[name]
