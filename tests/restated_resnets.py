"""The residual networks of the BSN authors' graph (fjxmlzn/BSN) and of the SN-GAN authors' Chainer code, written down
again in plain functions of tensors: no module, no autograd.Function and nothing of fastsn.

Convolutions of shortcuts come where the authors have them: before the pool (but in the first block), after the unpool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from restated_bsn import Parameters, iterated, matrices

Vectors = dict[str, list[Tensor]]
# Of a discriminator's blocks after the first: whether it halves, and whether its shortcut is a convolution.
DISCRIMINATORS = {
    ("bsn-resnet", 32): [(True, True), (True, True), (False, True)],
    ("sngan-resnet", 32): [(True, True), (False, False), (False, False)],
    ("sngan-resnet", 48): [(True, True), (True, True), (True, True), (False, True)],
}


def normalized(p: Parameters, vectors: Vectors, views: int, scale: float) -> tuple[Parameters, Vectors]:
    """scale * W / sigma in the place of every weight, by one iteration from the vectors; what they are after it."""
    found, after = dict(p), {}
    for layer, old in vectors.items():
        weight, sigmas, after[layer] = p[f"{layer}.weight"], [], []
        alike = weight[0, 0].numel() == 1  # both views are one matrix
        for m, v in zip(matrices(weight, 1 if alike else views), old, strict=True):
            u, v = iterated(m.detach(), v)
            sigmas.append(u @ m @ v)
            after[layer].append(v)
        found[f"{layer}.weight"] = scale * weight / (sum(sigmas) / len(sigmas))
    return found, after


def conv(p: Parameters, name: str, x: Tensor) -> Tensor:
    weight = p[f"{name}.weight"]
    return F.conv2d(x, weight, p[f"{name}.bias"], padding=weight.shape[-1] // 2)


def halved(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def discriminator(p: Parameters, code: tuple[str, int], x: Tensor, y: Tensor | None = None, concat: int = 0) -> Tensor:
    """Scores; ``p`` is normalized. Labels are a projection, or channels after block number ``concat``."""

    def beside(x: Tensor, number: int) -> Tensor:
        if number != concat:
            return x
        e = p["embedding.weight"][y]
        return torch.cat([x, e.view(*e.shape, 1, 1) * torch.ones_like(x[:, :1])], 1)

    h = conv(p, "blocks.0.conv2", conv(p, "blocks.0.conv1", x).relu())
    h = beside(halved(h) + conv(p, "blocks.0.shortcut", halved(x)), 1)
    for number, (down, learnt) in enumerate(DISCRIMINATORS[code], 1):
        block, x = f"blocks.{number}", h
        h = conv(p, f"{block}.conv2", conv(p, f"{block}.conv1", x.relu()).relu())
        x = conv(p, f"{block}.shortcut", x) if learnt or number == concat else x  # labels change the width
        h = beside(halved(h) + halved(x) if down else h + x, number + 1)
    h = h.relu().sum((2, 3))
    scores = h @ p["linear.weight"].T
    if "linear.bias" in p:
        scores = scores + p["linear.bias"]
    if y is not None and not concat:
        scores = scores + (p["embedding.weight"][y] * h).sum(1, keepdim=True)
    return scores


def generator(p: Parameters, blocks: int, z: Tensor, y: Tensor | None, side: int, groups: int, eps: float) -> Tensor:
    """Images, batch norms by the statistics of each of so many equal parts of the batch."""

    def batch_norm(x: Tensor, name: str, y: Tensor | None) -> Tensor:
        parts = []
        for part in x.split(len(x) // groups):
            mean = part.mean((0, 2, 3), keepdim=True)
            parts.append((part - mean) / (((part - mean) ** 2).mean((0, 2, 3), keepdim=True) + eps).sqrt())
        if y is None:
            gamma, beta = p[f"{name}.weight"][None], p[f"{name}.bias"][None]
        else:
            gamma, beta = p[f"{name}.gamma"][y], p[f"{name}.beta"][y]
        return torch.cat(parts) * gamma[:, :, None, None] + beta[:, :, None, None]

    h = (z @ p["dense.weight"].T + p["dense.bias"]).view(len(z), -1, side, side)
    for block in (f"blocks.{i}" for i in range(blocks)):
        x = h
        h = conv(p, f"{block}.conv1", doubled(batch_norm(x, f"{block}.bn1", y).relu()))
        h = conv(p, f"{block}.conv2", batch_norm(h, f"{block}.bn2", y).relu())
        h = h + conv(p, f"{block}.shortcut", doubled(x))
    return conv(p, "to_image", batch_norm(h, "norm", None).relu()).tanh()
