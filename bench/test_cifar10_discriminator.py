"""Normalising all weights of the paper's CIFAR10 discriminator (8 layers, 11.7 MB), forward and backward.

Floor: with one view iterated from one read, the least that must move is 1 read for the iteration, 1 read and 1 write to
rescale, 2 reads of the gradient, 1 of W̄ and 1 write: 7 x the weights' bytes over the copy bandwidth of this run.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

import fastsn

SHAPES = ((3, 64, 3), (64, 64, 4), (64, 128, 3), (128, 128, 4), (128, 256, 3), (256, 256, 4), (256, 512, 3))
PASSES = 7


def discriminator(wrap: Callable[[nn.Module], nn.Module]) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([*(wrap(nn.Conv2d(*shape)) for shape in SHAPES), wrap(nn.Linear(512 * 16, 1))])


def contestants() -> dict[str, Callable[[nn.Module], nn.Module]]:
    return {
        "torch SN": torch_spectral_norm,
        "fastsn SN, reference": fastsn.spectral_norm,
        "fastsn BSSN, reference": lambda m: fastsn.spectral_norm(m, variant="bssn", scale=1.4),
    }


def originals(layers: nn.ModuleList) -> list[Tensor]:
    return [layer.parametrizations.weight.original for layer in layers]


def check(layers: nn.ModuleList, scale: float, views: int) -> None:
    """The gate: W̄ is what the stored vectors give in float64, and they converge to the singular vectors."""
    for layer in copy.deepcopy(layers).eval():
        norm, w = layer.parametrizations.weight[0], layer.parametrizations.weight.original.detach().double()
        sigma = torch.dot(norm._u.double(), w.flatten(1) @ norm._v.double())
        if views == 2 and w.ndim > 2:
            m = w.flatten(2).transpose(1, 2).flatten(0, 1)
            sigma = (sigma + torch.dot(norm._u_in.double(), m @ norm._v_in.double())) / 2
        torch.testing.assert_close(layer.weight.detach().double(), scale * w / sigma, rtol=1e-5, atol=1e-9)


def copy_bandwidth(nbytes: int) -> float:
    """Bytes read and written per second by a warm copy of that size."""
    source, target, times = torch.randn(nbytes // 4), torch.empty(nbytes // 4), []
    for _ in range(50):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * nbytes / statistics.median(times)


@pytest.mark.parametrize("name", contestants())
def test_forward_and_backward(benchmark, name):
    layers = discriminator(contestants()[name])
    check(layers, *((1.4, 2) if "BSSN" in name else (1.0, 1)))
    gradients = [torch.randn_like(w) for w in originals(layers)]

    def step() -> None:
        torch.autograd.backward([layer.weight for layer in layers], gradients)
        for weight in originals(layers):
            weight.grad = None

    nbytes = sum(w.nbytes for w in originals(layers))
    bandwidth = copy_bandwidth(nbytes)
    benchmark.extra_info |= {
        "weights_MB": nbytes / 1e6,
        "copy_GB_per_s": bandwidth / 1e9,
        "floor_ms": PASSES * nbytes / bandwidth * 1e3,
    }
    benchmark.pedantic(step, rounds=60, iterations=1, warmup_rounds=10)
