"""warm_up, sigmas and fold on whole networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastsn
from dispatched import SYNCS, Counted
from networks import batch, moved, network, state
from shapes import TABLE


def test_measuring_moves_nothing_that_stands_before_the_norm():
    layer = fastsn.SNConv2d(3, 4, 3)
    parametrizations.spectral_norm(layer)
    for _ in range(2):
        with pytest.warns(UserWarning, match="has a spectral norm already"):
            fastsn.spectral_norm(layer)
    before = state(layer)
    assert set(fastsn.sigmas(layer)) == {"1", "2", "spectral_norm"}
    with fastsn.step(layer, advance=False):
        pass
    assert moved(before, layer) == set()


def test_warm_up_brings_vectors_to_foreign_weights_in_any_mode():
    net = network().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    assert fastsn.warm_up(net, 2000) is net
    for name, (sigma, sigma_out, _) in fastsn.sigmas(net).items():
        if name == "4":
            assert sigma == sigma_out
            true = torch.linalg.matrix_norm(net[4].weight.detach(), 2)
            assert sigma == pytest.approx(float(true), rel=1e-5)
    plain = fastsn.fold(net)
    assert float(torch.linalg.matrix_norm(plain[4].weight.detach(), 2)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_advance_stores_one_iteration_of_every_layer_in_one_call_and_waits_for_nothing(training):
    net = network().train(training)
    for parameter in net.parameters():
        nn.init.normal_(parameter)  # so that the vectors have somewhere to go
    twin = copy.deepcopy(net)
    with Counted() as ours, Counted("aten") as rest:
        assert fastsn.advance(net) is net
    assert ours.names == ["power_iteration_"]
    assert not SYNCS & set(rest.names)
    with fastsn.step(twin.train()):
        pass
    assert moved(state(twin), net) == set()  # bit by bit
    assert fastsn.advance(net, 3).training == training
    for _ in range(3):
        fastsn.advance(twin)
    assert moved(state(twin), net) == set()


def test_advance_follows_norms_that_stand_on_one_tensor():
    layer = nn.Linear(5, 7)
    fastsn.spectral_norm(layer)
    with pytest.warns(UserWarning, match="has a spectral norm already"):
        fastsn.spectral_norm(layer, variant="bsn")
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for each in (layer, twin):
            each.parametrizations.weight.original.copy_(torch.arange(35.0).reshape(7, 5).sin())
    fastsn.advance(layer.eval())
    twin.train()(torch.ones(1, 5))
    assert moved(state(twin), layer) == set()


def test_warm_up_draws_vectors_that_are_still_on_meta():
    with torch.device("meta"):
        layer = fastsn.BSSNConv2d(4, 6, 3)
    layer.weight, layer.bias = nn.Conv2d(4, 6, 3).parameters()
    for function in (fastsn.sigmas, fastsn.fold):
        with pytest.raises(
            ValueError, match=r"u and v of 'BSSNConv2d' must have values, got meta tensors: call fastsn.warm_up first"
        ):
            function(layer)
    fastsn.warm_up(layer, 500)
    top = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
    assert fastsn.sigmas(layer)[""].sigma_out == pytest.approx(float(top), rel=1e-4)


def test_measuring_leaves_the_modes_of_other_parametrizations_alone():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, weight: Tensor) -> Tensor:
            if weight.isnan().any():
                raise ArithmeticError
            return self.drop(weight)

    layer = nn.Linear(4, 4)
    noisy = Noisy()
    parametrize.register_parametrization(layer, "weight", noisy)
    noisy.drop.eval()
    fastsn.spectral_norm(layer)
    fastsn.sigmas(layer)
    assert (noisy.training, noisy.drop.training) == (True, False)
    layer.parametrizations.weight.original.data.fill_(torch.nan)
    with pytest.raises(ArithmeticError):
        fastsn.sigmas(layer)
    assert (noisy.training, noisy.drop.training) == (True, False)


def test_sigmas_names_and_contents():
    net = network()
    before = state(net)
    found = fastsn.sigmas(net)
    assert list(found) == ["1.0", "1.3", "2", "4"]
    assert moved(before, net) == set()
    for name in ("1.0", "1.3"):
        assert found[name].sigma == pytest.approx((found[name].sigma_out + found[name].sigma_in) / 2, rel=1e-6)
    assert found["2"].sigma == found["2"].sigma_out
    weight = net[2].parametrizations.weight.original.detach()
    untracked = float(torch.linalg.matrix_norm(weight.flatten(1), 2))  # stored (cin, cout, k, k)
    assert found["2"].sigma_in == pytest.approx(untracked, rel=1e-3)
    assert found["2"].sigma_in <= untracked * (1 + 1e-6)
    assert found["4"].sigma_in == found["4"].sigma_out == found["4"].sigma  # a matrix has one norm
    assert fastsn.sigmas(nn.Linear(2, 2)) == {}
    bias = fastsn.spectral_norm(nn.Linear(3, 4), "bias")
    original = bias.parametrizations.bias.original.detach()
    assert fastsn.sigmas(bias)["bias"] == pytest.approx([float(original.norm())] * 3)
    state_of_chance = torch.get_rng_state()
    assert fastsn.sigmas(net) == found
    assert torch.equal(torch.get_rng_state(), state_of_chance)


@pytest.mark.parametrize("prefix", ["SN", "BSSN", "drop-in"])
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_fold_gives_the_plain_layer_with_evaluations_output_bit_for_bit(case, prefix):
    if prefix == "drop-in":
        layer = fastsn.spectral_norm(case.build(), variant="bssn", scale=1.4)
    else:
        scale = {"scale": 1.4, "scale_bias": case.layer != "Embedding"} if prefix == "BSSN" else {}
        layer = case.build(prefix, **scale)
    x = case.input()
    layer(x)
    before = copy.deepcopy(layer)
    expected = layer.eval()(x)
    folded = fastsn.fold(layer.train())
    assert folded is layer
    assert type(folded) is type(case.build())
    assert sorted(folded.state_dict()) == sorted(case.build().state_dict())
    assert repr(folded) == repr(case.build())
    assert torch.equal(folded(x), expected)
    assert folded.weight.requires_grad
    assert isinstance(before, type(case.build()))


def test_fold_has_the_bits_of_evaluation_where_torchs_matmul_asks_whether_the_weight_requires_grad():
    x = torch.randn(8, 5, 3, 16).to(memory_format=torch.channels_last)
    for _ in range(20):
        layer = fastsn.SNLinear(16, 3).eval()
        with torch.no_grad():
            without = layer(x)
        with_gradient = layer(x)
        folded = fastsn.fold(layer)
        assert torch.equal(folded(x), with_gradient)
        with torch.no_grad():
            assert torch.equal(folded.requires_grad_(False)(x), without)


def test_fold_bakes_evaluation_in_wherever_it_is_called():
    net, x = network(), batch()
    expected = copy.deepcopy(net).eval()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), fastsn.step(net, advance=False):
        folded = fastsn.fold(net)
    assert {p.dtype for p in folded.parameters()} == {torch.float32}
    assert torch.equal(folded.eval()(x), expected)


def test_fold_of_a_tensor_that_parametrizations_build_from_several():
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    fastsn.spectral_norm(layer)
    x = torch.randn(2, 4)
    expected = layer.eval()(x)
    assert type(fastsn.fold(layer.train())) is nn.Linear
    assert sorted(name for name, _ in layer.named_parameters()) == ["bias", "weight"]
    assert layer.weight.requires_grad
    assert torch.equal(layer(x), expected)


def test_fold_leaves_tied_raw_weights_alone():
    raw = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = raw.weight
    value = raw.weight.detach().clone()
    fastsn.fold(fastsn.spectral_norm(tied))
    assert torch.equal(raw.weight, value)
    layer = fastsn.SNLinear(4, 4)
    layer.weight = raw.weight
    fastsn.fold(layer)
    assert torch.equal(raw.weight, value)


def test_fold_keeps_frozen_weights_frozen_and_buffers_buffers():
    layer = fastsn.SSNLinear(3, 4, scale=2.0, scale_bias=True).requires_grad_(False)
    expected = 2 * layer.bias
    fastsn.fold(layer)
    assert torch.equal(layer.bias, expected)
    assert [p.requires_grad for p in layer.parameters()] == [False, False]
    module = nn.Module()
    module.register_buffer("kernel", torch.randn(3, 4))
    fastsn.fold(fastsn.spectral_norm(module, "kernel"))
    assert isinstance(module.kernel, Tensor)
    assert "kernel" in dict(module.named_buffers())


def test_the_default_device_is_not_that_of_the_model():
    nets = network(), network()
    nets[1].load_state_dict(nets[0].state_dict())
    expected = fastsn.sigmas(fastsn.warm_up(nets[0], 3))
    with torch.device("meta"):  # as torch.set_default_device
        found = fastsn.sigmas(fastsn.warm_up(nets[1], 3))
        with fastsn.step(nets[1]):
            pass
        fastsn.fold(nets[1])
    assert found == expected


@pytest.mark.parametrize("folded", ["the copy", "the original"])
def test_fold_leaves_copies_alone(folded):
    """They share the class that parametrizing has made, and the property of the tensor is in it."""
    model = nn.Sequential(fastsn.spectral_norm(nn.Linear(4, 3)), fastsn.SNLinear(3, 2))
    clone, x = copy.deepcopy(model), torch.randn(2, 4)
    gone, left = (clone, model) if folded == "the copy" else (model, clone)
    fastsn.fold(gone)
    left(x).sum().backward()
    expected = left.eval()(x)
    assert torch.equal(fastsn.fold(left)(x), expected)


def test_a_module_dict_of_the_users_own_may_be_called_parametrizations():
    model = nn.Sequential(fastsn.SNLinear(3, 4), nn.Module())
    model[1].parametrizations = nn.ModuleDict({"weight": nn.Linear(2, 2), "deep": fastsn.SNLinear(2, 2)})
    assert set(fastsn.sigmas(model)) == {"0", "1.parametrizations.deep"}
    fastsn.convert(model, "ssn")
    assert type(model[1].parametrizations["deep"]) is fastsn.SSNLinear
