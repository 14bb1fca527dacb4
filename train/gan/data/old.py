"""Images as uint8 tensors in memory, and the sampler whose state makes a resumed run see the same batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gan.data.images import to_float, to_uint8

__all__ = ["Batches", "Dataset", "Noise", "digits", "to_float", "to_uint8"]


@dataclass(frozen=True)
class Dataset:
    """images: uint8 (N, C, S, S); labels: int64 (N,)."""

    name: str
    images: Tensor
    labels: Tensor


def digits(image_size: int) -> Dataset:
    """The 1,797 handwritten digits of scikit-learn, 8x8 in 17 grey levels (Alpaydin and Kaynak 1998), enlarged."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    images = F.interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return Dataset("digits", images.round().to(torch.uint8), torch.from_numpy(found.target).long())


class Batches:
    """Random batches, drawn with replacement as in the BSN authors' code, from a generator of their own."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, device: torch.device) -> None:
        if batch_size > len(dataset.images):
            raise ValueError(
                f"batch_size must be at most the {len(dataset.images)} images of {dataset.name}, got {batch_size}"
            )
        self.images = dataset.images.to(device)
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> Tensor:
        """float32 (batch_size, C, S, S) in [-1, 1]."""
        picks = torch.randint(len(self.images), (self.batch_size,), generator=self.generator)
        return to_float(self.images[picks.to(self.images.device)])


class Noise:
    """z ~ N(0, I) from a generator of its own, on the CPU, so that every device gets the same numbers."""

    def __init__(self, latent: int, seed: int, device: torch.device) -> None:
        self.latent, self.device = latent, device
        self.generator = torch.Generator().manual_seed(seed)

    def next(self, count: int) -> Tensor:
        """float32 (count, latent)."""
        return torch.randn(count, self.latent, generator=self.generator).to(self.device)
