"""apply, reset_parameters and nn.init reach the weights of layers that are normalized already."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook

import fastsn


def weights_init(module: nn.Module) -> None:
    """Of the DCGAN tutorial."""
    if "Conv" in type(module).__name__:
        nn.init.normal_(module.weight.data, 0.0, 0.02)
    elif "Linear" in type(module).__name__:
        nn.init.constant_(module.weight, 0.5)
        nn.init.zeros_(module.bias)


CONVERTED = {
    "plain": lambda: fastsn.convert(nn.Sequential(nn.Conv2d(3, 64, 4), nn.Linear(4, 2)), "bssn", scale=1.4),
    "hook": lambda: fastsn.convert(nn.Sequential(hook(nn.Conv2d(3, 64, 4)), hook(nn.Linear(4, 2)))),
    "parametrization": lambda: fastsn.convert(
        nn.Sequential(*map(parametrizations.spectral_norm, (nn.Conv2d(3, 64, 4), nn.Linear(4, 2))))
    ),
    "drop-in": lambda: nn.Sequential(*map(fastsn.spectral_norm, (nn.Conv2d(3, 64, 4), nn.Linear(4, 2)))),
}


@pytest.mark.parametrize("make", CONVERTED.values(), ids=CONVERTED)
@pytest.mark.parametrize("copied", [False, True])
def test_weights_init_is_not_ignored_by_layers_that_are_normalized_already(make, copied):
    model = copy.deepcopy(make()) if copied else make()
    parameters = list(model.parameters())
    assert model.apply(weights_init) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))  # an optimizer keeps them
    conv, linear = (layer.parametrizations.weight.original for layer in model)
    assert float(conv.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(linear, torch.full((2, 4), 0.5))
    assert torch.equal(model[1].bias, torch.zeros(2))
    for name, weight in (("0", conv.detach().flatten(1)), ("1", linear.detach())):  # u and v belong to the new weights
        assert fastsn.sigmas(model)[name].sigma_out == pytest.approx(
            float(torch.linalg.matrix_norm(weight, 2)), rel=0.05
        )


def test_apply_that_only_looks_changes_nothing_and_sees_the_normalized_weight():
    model, seen = CONVERTED["plain"](), []
    with torch.no_grad():
        model[1].parametrizations.weight.original[0, 0] = float("nan")
    expected = [layer.weight.detach() for layer in model.eval()]
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    model.apply(
        lambda module: seen.append(module.weight.detach()) if isinstance(module, nn.Conv2d | nn.Linear) else None
    )
    torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(model[0].weight, model[0].weight)  # a use is a use again


def test_reset_parameters_of_normalized_layers_draws_the_weight_anew():
    for layer in (fastsn.spectral_norm(nn.Linear(4, 3)), fastsn.spectral_norm(nn.Conv2d(3, 4, 3), "bias")):
        before = [p.clone() for p in layer.parameters()]
        layer.reset_parameters()
        assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    plain_layer = nn.Conv2d(3, 4, 3)
    assert torch.equal(layer.weight, plain_layer.weight)


def test_apply_on_models_without_values_and_apply_that_folds():
    with torch.device("meta"):
        CONVERTED["drop-in"]().apply(weights_init)
    model = CONVERTED["plain"]()
    model.apply(lambda m: fastsn.fold(m) if isinstance(m, nn.Linear | nn.Conv2d) else None)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.Linear]
    assert model.apply(weights_init)[1].weight.unique().item() == 0.5


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def test_apply_of_reset_parameters():
    model = CONVERTED["drop-in"]()
    torch.manual_seed(3)
    model.apply(reset)
    torch.manual_seed(3)
    plain_layer = nn.Conv2d(3, 64, 4)
    weight = model[0].parametrizations.weight.original
    assert torch.equal(weight, plain_layer.weight)
    found, exact = fastsn.sigmas(model)["0"].sigma_out, torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
    assert found == pytest.approx(float(exact), rel=0.05)


class Own(nn.Linear):
    """Methods of the names that nn.Module and torch's layers have, and that mean something else."""

    def apply(self, x):
        return self(x)

    def reset_parameters(self, gain=1.0):
        nn.init.constant_(self.weight, gain)
        nn.init.zeros_(self.bias)
        return gain


def test_methods_of_a_users_own_layer_keep_their_meaning():
    layer, untouched = Own(3, 4), parametrizations.spectral_norm(Own(3, 4))
    fastsn.convert(copy.deepcopy(untouched))
    assert "keeping" not in type(untouched).reset_parameters.__qualname__
    fastsn.spectral_norm(layer)
    x = torch.randn(2, 3)
    assert torch.equal(layer.eval().apply(x), layer(x))
    assert layer.reset_parameters(gain=2.0) == 2.0
    assert layer.parametrizations.weight.original.unique().item() == 2


def test_recurrent_layers_are_drawn_anew_and_a_learnt_scale_is_not():
    scale = nn.Parameter(torch.tensor(1.4))
    layer = fastsn.spectral_norm(nn.LSTM(3, 4), "weight_hh_l0", variant="ssn", scale=scale)
    original = layer.parametrizations.weight_hh_l0.original
    before = original.clone()
    layer.reset_parameters()
    assert not torch.equal(original, before)
    assert float(scale.detach()) == pytest.approx(1.4)
    (sigma,) = fastsn.sigmas(layer).values()
    assert sigma.sigma_out == pytest.approx(float(torch.linalg.matrix_norm(original.detach(), 2)), rel=0.05)


def test_what_apply_shows_is_as_trainable_as_the_weight_and_a_copy_made_there_trains_on():
    layer, seen, copies = fastsn.spectral_norm(nn.Linear(3, 4)), [], []

    def look(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            seen.append(module.weight.requires_grad)
            copies.append(copy.deepcopy(module))

    layer.apply(look)
    layer.requires_grad_(False).apply(look)
    assert seen == [True, False]
    for made in copies:
        made.parametrizations.weight.original.data.zero_()
        assert not made.eval().weight.any()
