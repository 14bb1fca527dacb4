"""What is logged beside the losses: slopes of the discriminator."""

from __future__ import annotations

import torch
from torch import Tensor

from gan.training import Training


def slopes(training: Training) -> dict[str, Tensor]:
    """Mean, least and greatest norm of the gradient of D at the last real and fake images; u and v stay."""
    found = {}
    real, labels, fake, fake_labels = training.last
    with training.norm.at_rest():
        for name, images, own in (("real", real, labels), ("fake", fake, fake_labels)):
            points = images.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(training.discriminator(points, own).sum(), points)
            norms = training.ranks.joined(gradient.flatten(1).norm(dim=1))
            found |= {f"slope/{name}_{how}": getattr(norms, how)() for how in ("mean", "min", "max")}
    return found
