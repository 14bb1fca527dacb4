"""Models with norms of every kind, used in steps or fused, whose plans tests look at."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastsn
from fastsn import plan
from fastsn.layers import NormalizedLayer

Context = AbstractContextManager[object]
DEVICE = torch.get_default_device().type


class Doubled(nn.Module):
    """A parametrization of another kind."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Weights(nn.Module):
    """Its forward gives every W̄, so that weights of any dtype and shape stand side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.learnt = fastsn.BSSNConv2d(3, 4, 3, scale=nn.Parameter(torch.tensor(1.4)))
        self.dropin = fastsn.spectral_norm(nn.Conv2d(4, 3, 3))
        self.plain = nn.Linear(4, 4)
        self.plain.other = nn.Parameter(torch.randn(3, 5))
        self.doubled = fastsn.spectral_norm(nn.Linear(5, 4), variant="bsn")
        parametrize.register_parametrization(self.doubled, "weight", Doubled())
        self.list = nn.ModuleList([fastsn.SNLinear(4, 4), nn.Sequential(fastsn.SSNLinear(4, 4, scale=0.7))])

    def forward(self) -> list[Tensor]:
        return weights_of(self)


class AlsoBehind(Weights):
    """A weight has to be asked for, each time."""

    def __init__(self) -> None:
        super().__init__()
        self.behind = nn.Linear(4, 5)
        parametrize.register_parametrization(self.behind, "weight", Doubled())
        fastsn.spectral_norm(self.behind)


def weights_of(model: nn.Module) -> list[Tensor]:
    found = []
    for module in model.modules():
        if isinstance(module, NormalizedLayer):
            found.append(module.normalized()[0])
        elif parametrize.is_parametrized(module):
            found += [getattr(module, name) for name in module.parametrizations]
    return found


def train(model: nn.Module, scope: str) -> list[Tensor]:
    """A step and its backward: what it has served, the gradients and the vectors."""
    model.zero_grad()
    with fastsn.step(model) if scope == "step" else nullcontext():
        made = model() if scope == "fuse" else weights_of(model)
        loss = sum((w.double() * torch.linspace(-1, 1, w.numel()).view_as(w)).sum() for w in made)
    if loss.requires_grad:
        loss.backward()
    return [*made, *(torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()), *model.buffers()]


def assert_right(model: nn.Module, scope: str, context: Callable[[], Context] = nullcontext) -> None:
    """A step is that of a copy, for which nothing was ever found."""
    twin = copy.deepcopy(model)
    assert twin.__dict__.get("_fastsn_plan") is None
    with context():
        found = train(model, scope)
    with context():  # parametrize.cached() has one entry for a layer and its copies
        expected = train(twin, scope)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.stride(), a.requires_grad) == (b.dtype, b.stride(), b.requires_grad)
        assert torch.equal(a, b)


def used(scope: str, make: Callable[[], nn.Module] = Weights) -> nn.Module:
    """A model that has been used twice."""
    model = fastsn.fuse(make()) if scope == "fuse" else make()
    for _ in range(2):
        train(model, scope)
    return model


def searched(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """A list that grows by each model in which norms are looked for."""
    models: list[nn.Module] = []

    def weights(model: nn.Module, *rest: bool) -> list[object]:
        models.append(model)
        return sites_weights(model, *rest)

    sites_weights = plan.weights
    monkeypatch.setattr(plan, "weights", weights)
    return models
