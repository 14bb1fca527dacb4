"""One step of the BSN authors' graph (fjxmlzn/BSN), written down again in plain functions of tensors: no module, no
autograd.Function, no optimizer and nothing of fastsn.

Its power iteration goes u first, then v, as fastsn's; the authors' goes v first, which is the same from vectors that
belong to the weights. Adam adds epsilon as torch does, after the correction of the bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = dict[str, Tensor]
CONVS = [f"convs.{i}" for i in range(0, 14, 2)]


def matrices(weight: Tensor, views: int) -> list[Tensor]:
    """cout x (cin·k·k), and of convolutions with two views (cout·k·k) x cin: the authors swap cin and cout, and have u
    and v of it the other way round."""
    rows = weight.flatten(1)
    return [rows] if views == 1 or weight.ndim == 2 else [rows, weight.transpose(0, 1).flatten(1).T]


def iterated(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    u = m @ v
    u = u / u.norm()
    v = m.T @ u
    return u, v / v.norm()


def discriminator(p: Parameters, vectors: dict[str, list[Tensor]], x: Tensor, views: int, scale: float) -> Tensor:
    """Scores of images. Every forward iterates from the stored v and stores nothing."""

    def normalized(layer: str) -> tuple[Tensor, Tensor]:
        weight = p[f"{layer}.weight"]
        sigmas = []
        for m, v in zip(matrices(weight, views), vectors[layer], strict=True):
            u, v = iterated(m.detach(), v)
            sigmas.append(u @ m @ v)
        gamma = p.get(f"{layer}.gamma", p.get("gamma"))
        factor = torch.tensor(scale) if gamma is None else gamma
        bias = p[f"{layer}.bias"]
        return factor * weight / torch.stack(sigmas).mean(), bias if gamma is None else gamma * bias

    for layer in CONVS:
        weight, bias = normalized(layer)
        x = F.leaky_relu(F.conv2d(x, weight, bias, stride=weight.shape[-1] - 2, padding=1), 0.1)
    weight, bias = normalized("linear")
    return x.flatten(1) @ weight.T + bias


def advanced(p: Parameters, vectors: dict[str, list[Tensor]], views: int) -> dict[str, list[Tensor]]:
    """What spectral_norm_update_ops store, from the weights that the optimizer has just changed."""
    return {
        layer: [iterated(m.detach(), v)[1] for m, v in zip(matrices(p[f"{layer}.weight"], views), old, strict=True)]
        for layer, old in vectors.items()
    }


def generator(p: Parameters, z: Tensor, start: tuple[int, int, int]) -> Tensor:
    """Images, every batch norm by the statistics of the batch."""

    def batch_norm(x: Tensor, name: str) -> Tensor:
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        mean, var = x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * p[f"{name}.weight"].view(shape) + p[f"{name}.bias"].view(shape)

    x = F.relu(batch_norm(z @ p["dense.0.weight"].T + p["dense.0.bias"], "dense.1")).unflatten(1, start)
    for i in (0, 3, 6):
        x = F.conv_transpose2d(x, p[f"convs.{i}.weight"], p[f"convs.{i}.bias"], stride=2, padding=1)
        x = F.relu(batch_norm(x, f"convs.{i + 1}"))
    return torch.tanh(F.conv_transpose2d(x, p["convs.9.weight"], p["convs.9.bias"], padding=1))


def penalty(score: object, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    x = (real + alpha * (fake - real)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(score(x).sum(), x, create_graph=True)
    return ((torch.sqrt((slope * slope).sum((1, 2, 3)) + 1e-8) - 1) ** 2).mean()


def adam(
    p: Parameters, loss: Tensor, moments: dict[str, tuple[Tensor, Tensor]], t: int, lr: float, b1: float, b2: float
) -> Parameters:
    """The parameters after step t; ``moments`` change."""
    after = {}
    for (name, x), g in zip(p.items(), torch.autograd.grad(loss, list(p.values())), strict=True):
        m, s = moments.get(name, (torch.zeros_like(x), torch.zeros_like(x)))
        m, s = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g * g
        moments[name] = m, s
        change = (m / (1 - b1**t)) / ((s / (1 - b2**t)).sqrt() + 1e-8)
        after[name] = (x - lr * change).detach().requires_grad_()
    return after
