"""GAN losses on discriminator scores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] (Miyato et al., ICLR 2018, equation 16)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_g(fake: Tensor) -> Tensor:
    """-E[D(G(z))] (Miyato et al., ICLR 2018, equation 17)."""
    return -fake.mean()
