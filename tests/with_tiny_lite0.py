"""Runs a script with arguments, as python does, with a network of random weights in the place of lite0, and few fakes:
python tests/with_tiny_lite0.py SCRIPT ARGUMENTS
"""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from gan.metrics import features, protocols


class TinyNetwork(nn.Module):
    """Means of sixteenths of the image to five features and seven logits."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.features, self.logits = nn.Linear(48, 5), nn.Linear(5, 7)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = self.features(nn.functional.adaptive_avg_pool2d(pixels / 255, 4).flatten(1))
        return found, self.logits(found)


def instead_of_lite0() -> None:
    features.lite0 = lambda _: features.with_checksum(TinyNetwork())
    few = dataclasses.replace(protocols.PROTOCOLS["lite0"], fakes=60, score_fakes=60)
    protocols.PROTOCOLS["lite0"] = few


if __name__ == "__main__":
    instead_of_lite0()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
