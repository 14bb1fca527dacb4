"""Evaluation never serves a weight from before a change, however the weight or its vectors were changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

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


@pytest.fixture
def swaps() -> Iterator[None]:
    """Conversions and loading swap tensors instead of setting their data, which torch refuses for tensors that C++
    refers to."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swaps")
@pytest.mark.parametrize("scope", ["step", "fuse", "none"])
@pytest.mark.parametrize("make", [lambda: fastsn.SNLinear(4, 4), lambda: fastsn.spectral_norm(nn.Linear(4, 4))])
def test_tensors_of_a_used_model_can_be_swapped(make, scope):
    net = nn.Sequential(make(), make())
    net = fastsn.fuse(net) if scope == "fuse" else net

    def use(net: nn.Module) -> Tensor:
        with fastsn.step(net) if scope == "step" else nullcontext():
            return net(torch.ones(2, 4, dtype=net[1].bias.dtype))

    changes: list[Callable[[], object]] = [
        net.double,
        lambda: net.load_state_dict(nn.Sequential(make(), make()).state_dict()),
    ]
    for change in changes:
        for _ in range(3):
            use(net)
        change()
        twin = copy.deepcopy(net)
        for _ in range(2):
            assert torch.equal(use(net), use(twin))


def test_a_weight_of_another_class_sees_the_same_calls_at_every_use():
    names: list[str] = []

    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs)

    layer = fastsn.SNLinear(4, 4)
    layer.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Seen))
    for _ in range(3):
        names.clear()
        assert type(layer.normalized()[0]) is Seen
        assert [name for name in names if name.endswith(".default")] == [
            "power_iteration_.default",
            "rescale.default",
        ]
