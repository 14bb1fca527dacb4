"""FID, Inception Score and KID from sums over images.

Every field of the sums is a tensor that adds up: sums over parts of the images, added, are the sums over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from gan.distributed import ranks


@dataclass
class Sums:
    """What several processes add field by field."""


def add_over_ranks(sums: Iterable[Sums]) -> None:
    """Replace every field of ``sums``, all of one device, by its sum over the ranks."""
    tensors = [getattr(x, field.name) for x in sums for field in fields(x)]
    for dtype in dict.fromkeys(x.dtype for x in tensors):  # the same order on all ranks
        ranks().sum_(x for x in tensors if x.dtype == dtype)


@dataclass
class Moments(Sums):
    """Of features f, in float64: their number, the sum of f (D,), the sum of f fᵀ (D, D)."""

    count: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Moments:
        """Of no features."""
        zeros = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), width, (width, width))]
        return cls(*zeros)

    def update(self, features: Tensor) -> None:
        """features: (n, D)."""
        features = features.double()
        self.count += len(features)
        self.first += features.sum(0)
        self.second.addmm_(features.T, features)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """The covariance is divided by count - 1."""
        mean = self.first / self.count
        return mean, (self.second - self.count * torch.outer(mean, mean)) / (self.count - 1)


@dataclass
class Predictions(Sums):
    """Of class probabilities p, in float64, for each split: their number, the sum of p (splits, C), of Σ p log p."""

    count: Tensor
    total: Tensor
    p_log_p: Tensor

    @classmethod
    def empty(cls, splits: int, classes: int, device: torch.device) -> Predictions:
        """Of no images."""
        shapes = (splits, (splits, classes), splits)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def update(self, logits: Tensor, split: Tensor) -> None:
        """logits: (n, C); split: int64 (n,), to which split each belongs."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        self.count.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))
        self.total.index_add_(0, split, p)
        self.p_log_p.index_add_(0, split, (p * log_p).sum(1))


@dataclass
class Pool(Sums):
    """Features of the images 0 to M - 1, float32 (M, D); zero where another process has them."""

    features: Tensor

    @classmethod
    def empty(cls, size: int, width: int, device: torch.device) -> Pool:
        """Of no images."""
        return cls(torch.zeros(size, width, device=device))

    def update(self, features: Tensor, number: Tensor) -> None:
        """features: (n, D) of the images ``number``, int64 (n,); those past the end are not kept."""
        kept = number < len(self.features)
        self.features[number[kept]] = features[kept].float()


def split_of(number: Tensor, count: int, splits: int) -> Tensor:
    """The split that image ``number`` of ``count`` is in: split i begins with image i * count // splits."""
    begins = torch.arange(1, splits, device=number.device) * count // splits
    return torch.bucketize(number.contiguous(), begins, right=True)


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μa - μb‖² + tr(Ca + Cb - 2 (Ca Cb)^½). With W Wᵀ = Ca, Ca Cb has the eigenvalues of the symmetric Wᵀ Cb W."""
    (mean_a, cov_a), (mean_b, cov_b) = a.mean_and_covariance(), b.mean_and_covariance()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def inception_score(sums: Predictions) -> tuple[float, float]:
    """Mean and standard deviation over the splits (divided by their number) of exp(mean KL(p ‖ mean p))."""
    mean = sums.total / sums.count[:, None]
    scores = (sums.p_log_p / sums.count - torch.special.xlogy(mean, mean).sum(1)).exp()
    return scores.mean().item(), scores.std(correction=0).item()


def kernel_distance(reals: Pool, fakes: Pool, subsets: int, size: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased squared MMD with the kernel (xᵀy / D + 1)³."""
    generator = np.random.RandomState(seed)  # as torch-fidelity draws
    found = []
    for _ in range(subsets):
        x, y = (
            pool.features[torch.from_numpy(generator.choice(len(pool.features), size, replace=False))].double()
            for pool in (reals, fakes)
        )
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        found.append((within / (size * (size - 1)) - 2 * xy.mean()).item())
    return math.fsum(found) / subsets, float(np.std(found))
