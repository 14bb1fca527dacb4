"""A small classifier of digits, trained here in seconds, whose features and logits stand in for Inception's.

Its distance is the *digit FID* and its score the *digit score*: they compare runs of this recipe with one another,
never with numbers that come from Inception.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gan.data.store import Store
from gan.distributed import ranks
from gan.metrics.cache import remember
from gan.metrics.features import Network, with_checksum

_log = logging.getLogger("gan")


class DigitClassifier(nn.Module):
    """Pixels (N, 1, S, S) from 0 to 255 to (features (N, 64), logits (N, 10))."""

    FEATURES = 64

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__()
        self.scale = scale
        self.convs = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
            *(nn.Linear(512, self.FEATURES), nn.BatchNorm1d(self.FEATURES, affine=False)),  # unit variance on digits
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(self.FEATURES, 10))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.convs((pixels - self.scale[0]) / self.scale[1])
        return features, self.head(features)


def train_digit_classifier(
    store: Store, scale: tuple[float, float], held_out: float = 0.2, epochs: int = 20
) -> tuple[DigitClassifier, float]:
    """A classifier with a fixed seed, and its accuracy on a fifth of the digits that it never saw."""
    pixels = torch.from_numpy(store.read(np.arange(store.count))).permute(0, 3, 1, 2).float()
    labels = torch.from_numpy(store.labels)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        order = torch.randperm(store.count)
        test, train = order.split([int(held_out * len(order)), len(order) - int(held_out * len(order))])
        net = DigitClassifier(scale)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(epochs):
            for picks in train[torch.randperm(len(train))].split(64):
                loss = F.cross_entropy(net(pixels[picks])[1], labels[picks])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            right = net.eval()(pixels[test])[1].argmax(1) == labels[test]
    return net, right.float().mean().item()


def digit_classifier(store: Store, scale: tuple[float, float], cache: Path) -> Network:
    """The classifier from its file below ``cache``, or trained now and put there: by the first rank, for all."""
    if store.channels != 1 or store.labels is None:
        raise ValueError(
            f"protocol: expected grey images with labels for digits, got {store.name} with {store.channels} channels "
            f"and {'no ' if store.labels is None else ''}labels"
        )

    def train() -> dict[str, np.ndarray]:
        net, accuracy = train_digit_classifier(store, scale)
        _log.info("digit classifier: %.2f %% of the held-out digits right", 100 * accuracy)
        if accuracy <= 0.97:
            raise RuntimeError(
                f"the digit classifier must get over 97 % right to judge digits, got {100 * accuracy:.2f} %"
            )
        return {name: value.numpy() for name, value in net.state_dict().items()}

    path = cache / f"digit-classifier-{store.image_size}-{store.key[:8]}.npz"
    state = ranks().of_first(lambda: remember(path, train))
    with torch.random.fork_rng(devices=[]):
        net = DigitClassifier(scale)
    net.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return with_checksum(net)
