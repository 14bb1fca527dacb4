"""Real handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gan.data.store import Store, memory_store


def digits(image_size: int) -> Store:
    """1,797 of them, 8x8 in 17 grey levels (Alpaydin and Kaynak 1998), enlarged, with labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    images = F.interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return memory_store("digits", images.round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), found.target)
