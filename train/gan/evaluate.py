"""FID and Inception Score of a generator: torchmetrics' formulas on the features of a network of our choice.

The network for digits is a small classifier trained here, so these are the *digit FID* and the *digit score*: they
compare runs of this recipe with one another, never with numbers that come from Inception.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from gan import checkpoint
from gan.data import Dataset, Noise, to_float, to_uint8

_log = logging.getLogger("gan")
_CHUNK = 500


@dataclass(frozen=True)
class Scores:
    """One row of metrics.csv: FID (lower is better), Inception Score (higher is better) over ten splits."""

    fid: float
    inception_score_mean: float
    inception_score_std: float


class DigitClassifier(nn.Module):
    """uint8 images (N, 1, S, S) to (features (N, 64), logits (N, 10))."""

    FEATURES = 64

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
            *(nn.Linear(512, self.FEATURES), nn.BatchNorm1d(self.FEATURES, affine=False)),  # unit variance on digits
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(self.FEATURES, 10))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.convs(to_float(images))
        return features, self.head(features)


def train_digit_classifier(dataset: Dataset, held_out: float = 0.2, epochs: int = 20) -> tuple[DigitClassifier, float]:
    """A classifier with a fixed seed, and its accuracy on a fifth of the digits that it never saw."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        order = torch.randperm(len(dataset.images))
        test, train = order.split([int(held_out * len(order)), len(order) - int(held_out * len(order))])
        net = DigitClassifier()
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(epochs):
            for picks in train[torch.randperm(len(train))].split(64):
                loss = F.cross_entropy(net(dataset.images[picks])[1], dataset.labels[picks])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            right = net.eval()(dataset.images[test])[1].argmax(1) == dataset.labels[test]
    return net, right.float().mean().item()


def digit_classifier(dataset: Dataset, cache: Path) -> DigitClassifier:
    """The classifier from its file below ``cache``, or trained now and put there."""
    path = cache / f"digit-classifier-{dataset.images.shape[-1]}.pt"
    net = DigitClassifier()
    saved = checkpoint.try_load(path) if path.exists() else None
    if saved is None:
        net, accuracy = train_digit_classifier(dataset)
        _log.info("digit classifier: %.2f %% of the held-out digits right", 100 * accuracy)
        if accuracy <= 0.97:
            raise RuntimeError(
                f"the digit classifier must get over 97 % right to judge digits, got {100 * accuracy:.2f} %"
            )
        checkpoint.save(path, {"accuracy": accuracy, "net": net.state_dict()})
    else:
        net.load_state_dict(saved["net"])
    return net.eval().requires_grad_(False)


class Evaluator:
    """Scores a generator against all images of a data set; the same weights and step give the same numbers."""

    def __init__(self, dataset: Dataset, net: nn.Module, features: int, fakes: int, seed: int, device: torch.device):
        self.net, self.fakes, self.seed, self.device = net.to(device), fakes, seed, device
        self.fid = FrechetInceptionDistance(feature=_Identity(features), reset_real_features=False).to(device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `InceptionScore` will save all extracted features")  # ten a fake
            self.score = InceptionScore(feature=_Identity(10)).to(device)
        self.protocol = f"{dataset.name}-cnn-{len(dataset.images)}r-{fakes}f"
        for images in dataset.images.split(_CHUNK):
            self.fid.update(self.net(images.to(device))[0], real=True)

    @torch.no_grad()
    def __call__(self, generator: nn.Module, latent: int) -> Scores:
        """Batch norm by its running statistics; images rounded to uint8; the global random state is left alone."""
        training = generator.training
        generator.eval()
        noise = Noise(latent, self.seed, self.device)
        for done in range(0, self.fakes, _CHUNK):
            images = to_uint8(generator(noise.next(min(_CHUNK, self.fakes - done))))
            features, logits = self.net(images)
            self.fid.update(features, real=False)
            self.score.update(logits)
        generator.train(training)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)  # InceptionScore shuffles by the global random state
            mean, std = self.score.compute()
        scores = Scores(self.fid.compute().item(), mean.item(), std.item())
        self.fid.reset()
        self.score.reset()
        return scores


class _Identity(nn.Module):
    """Lets torchmetrics take features that were computed once for all metrics."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
