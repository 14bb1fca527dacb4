"""GAN losses on discriminator scores, and the gradient penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    """Of the discriminator's scores of real and fake images, and of those of the generator's fakes."""

    d: Callable[[Tensor, Tensor], Tensor]
    g: Callable[[Tensor], Tensor]


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] (Miyato et al., ICLR 2018, equation 16)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def standard_d(real: Tensor, fake: Tensor) -> Tensor:
    """-E[log sigmoid D(x)] - E[log(1 - sigmoid D(G(z)))] (Goodfellow et al., NeurIPS 2014, equation 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def standard_g(fake: Tensor) -> Tensor:
    """-E[log sigmoid D(G(z))], which does not saturate."""
    return F.softplus(-fake).mean()


def wasserstein_d(real: Tensor, fake: Tensor) -> Tensor:
    """E[D(G(z))] - E[D(x)] (Arjovsky et al., ICML 2017)."""
    return fake.mean() - real.mean()


def negative_mean(fake: Tensor) -> Tensor:
    """-E[D(G(z))] (Miyato et al., ICLR 2018, equation 17)."""
    return -fake.mean()


LOSSES = {
    "hinge": Loss(hinge_d, negative_mean),
    "standard": Loss(standard_d, standard_g),
    "wasserstein": Loss(wasserstein_d, negative_mean),
}


def gradient_penalty(score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """E[(|dD/dx| - 1)^2] at x = real + alpha (fake - real), alpha (N, 1, 1, 1) (Gulrajani et al., NeurIPS 2017).

    The norm is sqrt(sum of squares + 1e-8), as in the BSN authors' code.
    """
    points = (real + alpha * (fake - real)).requires_grad_()
    (gradient,) = torch.autograd.grad(score(points).sum(), points, create_graph=True)
    return ((gradient.square().sum(dim=(1, 2, 3)) + 1e-8).sqrt() - 1).square().mean()
