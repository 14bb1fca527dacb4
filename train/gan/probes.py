"""What is logged beside the losses: slopes of the discriminator, and what the flags --log-... ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from gan import norms
from gan.config import Runtime
from gan.training import Training


def measured(training: Training, runtime: Runtime) -> dict[str, Tensor]:
    """All that a run logs of its discriminator at a step, by tag. No weight, u, v or random number moves, and every
    rank has the same values."""
    found = slopes(training)
    if runtime.log_gradients:
        found |= gradients(training)
    if runtime.log_variances:
        found |= variances(training)
    return found


def slopes(training: Training) -> dict[str, Tensor]:
    """Mean, least and greatest norm of the gradient of D at the last real and fake images; u and v stay."""
    found = {}
    real, labels, fake, fake_labels = training.last
    with training.norm.at_rest():
        for name, images, own in (("real", real, labels), ("fake", fake, fake_labels)):
            points = images.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(training.discriminator(points, own).sum(), points)
            lengths = training.ranks.joined(gradient.flatten(1).norm(dim=1))
            found |= {f"slope/{name}_{how}": getattr(lengths, how)() for how in ("mean", "min", "max")}
    return found


def gradients(training: Training) -> dict[str, Tensor]:
    """Frobenius norm of dL/dW of every layer of D, where L is the loss of the last discriminator step, penalties
    included, and W the weight that the optimizer changes (of two or more parts, all of them). The gradient is still
    there from that step, averaged over the ranks: nothing is computed but the norm. The
    blog of Lin et al., NeurIPS 2021, Fig. 4."""
    found = {}
    for name, layer in norms.layers_of(training.discriminator).items():
        parts = [p.grad.norm() for p in layer.parameters() if p.ndim > 1 and p.grad is not None]
        found[f"gradient/{name}"] = torch.stack(parts).norm()
    return found


def variances(training: Training) -> dict[str, Tensor]:
    """Variance of the entries of every layer's normalized weight, the mean of (w - mean of w)^2. Lin et al., NeurIPS
    2021, Fig. 5, find it near 1/max(m, n) of the m x n reshape under SN."""
    return {f"variance/{name}": weight.var(correction=0) for name, weight in training.norm.weights().items()}
