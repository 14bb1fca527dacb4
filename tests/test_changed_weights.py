"""Evaluation never serves a weight from before a change, however the weight or its vectors were changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsn


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def copied(layer: nn.Module) -> None:
    with torch.no_grad():
        original(layer).copy_(torch.randn(5, 6))


def loaded(layer: nn.Module) -> None:
    layer.load_state_dict(fastsn.spectral_norm(nn.Linear(6, 5)).state_dict())


CHANGES = {
    "copy_": copied,
    "load": loaded,
    "data": lambda layer: setattr(original(layer), "data", torch.randn(5, 6)),
    "double": lambda layer: layer.double(),
    "half": lambda layer: layer.to(torch.bfloat16),
    "warm_up": lambda layer: fastsn.warm_up(layer, 3),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_evaluation_after_a_change(change, fused):
    layer = fastsn.spectral_norm(nn.Linear(6, 5)).eval()
    if fused:
        fastsn.fuse(layer)
    for _ in range(2):
        before = layer(torch.ones(1, 6)).detach()
    CHANGES[change](layer)
    norm, weight = layer.parametrizations.weight[0], original(layer).detach()
    sigma = norm._u.double() @ weight.double() @ norm._v.double()
    output = layer(torch.ones(1, 6, dtype=weight.dtype)).detach()
    expected = (weight.double() / sigma).sum(1) + layer.bias.detach()
    torch.testing.assert_close(output.double(), expected[None], rtol=0, atol=2e-2 if change == "half" else 1e-5)
    assert not torch.equal(output.double(), before.double())
