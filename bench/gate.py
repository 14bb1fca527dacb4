"""No figure on a wrong result: what every contestant must compute before it is timed, against float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from contestants import Contestant, Forward
from torch import Tensor, nn

ROUNDS = 8  # the weights have a dominant direction, see workloads.build: each round gains a factor of 9
GRAM = 1024  # up to this size, singular values come from an eigendecomposition; beyond it takes minutes

Norms = list[float]


def matrices(weight: Tensor, bssn: bool) -> list[tuple[str, Tensor]]:
    """The reshapes that are measured, with the suffix of their vectors."""
    w = weight.detach()
    if not bssn or w.ndim == 2 or w[0, 0].numel() == 1:
        return [("", w.flatten(1))]
    return [("", w.flatten(1)), ("_in", w.flatten(2).transpose(1, 2).flatten(0, 1))]


def true_norms(plain: nn.ModuleList) -> list[Norms]:
    """The largest singular values of the reshapes of every weight, [out] or [out, in]."""
    return [[_norm(m.double()) for _, m in matrices(layer.weight, bssn=True)] for layer in plain]


def _norm(matrix: Tensor) -> float:
    """By the eigenvalues of the smaller Gram matrix; of large matrices by 15 power iterations in float64."""
    if min(matrix.shape) <= GRAM:
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        return float(torch.linalg.eigvalsh(gram)[-1].sqrt())
    v = torch.ones_like(matrix[0])
    for _ in range(15):
        v = F.normalize(matrix.T @ (matrix @ v), dim=0)
    return float(torch.linalg.vector_norm(matrix @ v))


def check(
    contestant: Contestant, layers: nn.ModuleList, forward: Forward, gradients: Sequence[Tensor], norms: list[Norms]
) -> None:
    """One iteration from random vectors, the weight and the gradient that belong to it; then the true norms."""
    layers.train()
    starts = [_randomize(layer) for layer in layers]
    weights = forward()
    torch.autograd.backward(weights, list(gradients))
    for layer, start, w, g in zip(layers, starts, weights, gradients, strict=True):
        _check_one_step(contestant, layer, start, w.detach(), g)
    del weights
    for _ in range(ROUNDS):
        forward()
    with torch.no_grad():
        _check_norms(contestant, layers, forward(), norms)
        if not contestant.compiled:  # it would compile once more, and is not timed in evaluation
            layers.eval()
            before = [_vectors(layer) for layer in layers]
            _check_norms(contestant, layers, forward(), norms)
            after = [_vectors(layer) for layer in layers]
            assert all(torch.equal(b[k], a[k]) for b, a in zip(before, after, strict=True) for k in b)
            layers.train()


def _vectors(layer: nn.Module) -> dict[str, Tensor]:
    return {k: x.clone() for k, x in layer.parametrizations.weight[0].named_buffers()}


def _randomize(layer: nn.Module) -> dict[str, Tensor]:
    """New unit vectors, far from the singular ones: an iteration that is skipped, or done twice, then shows."""
    for vector in layer.parametrizations.weight[0].buffers():
        vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
    return _vectors(layer)


def _check_one_step(
    contestant: Contestant, layer: nn.Module, start: dict[str, Tensor], normalized: Tensor, gradient: Tensor
) -> None:
    chain = layer.parametrizations.weight
    original, found = chain.original, _vectors(layer)
    weight, c, sigmas, outer = original.detach().double(), contestant.scale, [], torch.zeros(())
    views = matrices(weight, contestant.bssn)
    for suffix, matrix in views:
        u = F.normalize(matrix @ start["_v" + suffix].double(), dim=0)
        v = F.normalize(matrix.T @ u, dim=0)
        _close(found["_u" + suffix], u, "u" + suffix)
        _close(found["_v" + suffix], v, "v" + suffix)
        sigmas.append(torch.dot(u, matrix @ v))
        product = torch.outer(u, v)
        if suffix:
            o, i = weight.shape[:2]
            product = product.view(o, -1, i).transpose(1, 2)
        outer = outer.to(product.device) + product.reshape(weight.shape) / len(views)
    sigma = torch.stack(sigmas).mean()
    expected = c * weight / sigma
    _close(normalized, expected, "weight")
    g = gradient.double()
    _close(original.grad, c / sigma * g - (g * expected).sum() / sigma * outer, "gradient")
    original.grad = None


def _check_norms(contestant: Contestant, layers: nn.ModuleList, found: Sequence[Tensor], norms: list[Norms]) -> None:
    for layer, normalized, true in zip(layers, found, norms, strict=True):
        sigma = sum(true) / len(true) if contestant.bssn else true[0]
        _close(
            normalized, contestant.scale / sigma * layer.parametrizations.weight.original.detach(), "normalized weight"
        )


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    """To 1e-4 of the largest entry: a hundred times float32's rounding, and far from any mistake."""
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error < 1e-4, f"{what} is off by {error:.1e} of its largest entry"
