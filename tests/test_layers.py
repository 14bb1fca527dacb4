"""The 32 layers are torch's layers with a normalized weight, and live like any module."""

from __future__ import annotations

import copy
import inspect
import pickle
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import fastsn
from conftest import ON
from shapes import TABLE, truth

PREFIXES = ("SN", "SSN", "BSN", "BSSN")
ALL = [f"{p}{layer}" for p in PREFIXES for layer in dict.fromkeys(c.layer for c in TABLE)]


def free_scale(prefix: str) -> bool:
    return prefix in ("SSN", "BSSN")


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_layer_computes_what_the_plain_layer_computes_with_the_normalized_weight(case, prefix, impl):
    layer = case.build(prefix, scale=1.5 if free_scale(prefix) else 1.0, impl=impl)
    x = case.input()
    y = layer(x)
    plain = case.build()
    assert isinstance(layer, type(plain))
    plain.weight.data = layer.eval().normalized()[0].detach()
    if getattr(plain, "bias", None) is not None:
        plain.bias = layer.bias
    assert torch.equal(layer(x), plain(x))
    if impl == "reference":
        assert torch.equal(layer(x), y)
    else:  # kernels get sigma from the iteration in training, by measuring in evaluation: two orders of summation
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_layer_and_the_parametrized_plain_layer_agree(case):
    torch.manual_seed(1)
    layer = case.build("BSSN", scale=1.2)
    torch.manual_seed(1)
    dropin = fastsn.spectral_norm(case.build().eval(), variant="bssn", scale=1.2).train()
    x = case.input()
    for _ in range(3):
        assert torch.equal(layer(x), dropin(x))


@pytest.mark.parametrize("name", ALL)
def test_signature_and_docstring_are_torchs_and_ours(name):
    layer = getattr(fastsn, name)
    own = ["scale", "n_power_iterations", "eps", "scale_bias", "impl"]
    torchs = list(inspect.signature(layer.plain).parameters)
    assert list(inspect.signature(layer).parameters) == torchs + own
    assert f"nn.{layer.plain.__name__}" in layer.__doc__
    assert "Miyato" in layer.__doc__ or "Lin et al." in layer.__doc__


def test_a_users_subclass_shows_its_own_signature():
    class Mine(fastsn.SNLinear):
        def __init__(self, width: int) -> None:
            super().__init__(width, width)

    assert list(inspect.signature(Mine).parameters) == ["width"]
    assert Mine(3)(torch.randn(2, 3)).shape == (2, 3)


def test_arguments_of_the_torch_layer_are_passed_on():
    x = torch.randn(2, 4, 9, 9)
    conv = fastsn.SNConv2d(4, 6, 3, 2, padding=2, dilation=2, groups=2, bias=False, padding_mode="reflect")
    plain = nn.Conv2d(4, 6, 3, 2, padding=2, dilation=2, groups=2, bias=False, padding_mode="reflect")
    plain.weight.data = conv.eval().normalized()[0].detach()
    assert torch.equal(conv(x), plain(x))
    up = fastsn.SNConvTranspose2d(4, 6, 3, stride=2, padding=1)
    assert up(x, output_size=[18, 18]).shape[-2:] == (18, 18)
    lookup = fastsn.SNEmbedding(9, 4, padding_idx=0)
    lookup(torch.tensor([0, 3])).sum().backward()
    assert lookup.weight.grad.isfinite().all()
    pretrained = fastsn.SNEmbedding.from_pretrained(torch.eye(3) * 5)
    if ON == "cuda":  # the Triton kernels divide by sigma in two factors, of which one is rounded
        torch.testing.assert_close(pretrained(torch.arange(3)), torch.eye(3))
    else:
        assert torch.equal(pretrained(torch.arange(3)), torch.eye(3))
    assert not pretrained.weight.requires_grad


def test_the_parameter_stays_weight_and_init_works_on_it():
    layer = fastsn.BSSNConv2d(4, 6, 3, scale=1.4)
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    nn.init.orthogonal_(layer.weight)
    fastsn.warm_up(layer)
    assert fastsn.sigmas(layer)[""].sigma_out == pytest.approx(1, abs=1e-5)


def test_reset_parameters_brings_the_vectors_of_both_views_along():
    layer = fastsn.warm_up(fastsn.BSNConv2d(3, 8, 3), 500)
    errors = []
    for _ in range(5):  # of which one may have two largest singular values that are near to one another
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.reset_parameters()
        assert all(not torch.equal(before[name], value) for name, value in layer.state_dict().items())
        found, true = fastsn.sigmas(layer)[""], truth(layer.weight, 0)
        errors.append(max(abs(found.sigma_out / true["out"] - 1), abs(found.sigma_in / true["in"] - 1)))
    assert errors[0] < 0.05 or ON == "cuda"  # which draws other numbers
    assert statistics.median(errors) < 0.05


def test_a_learnable_scale_is_shared_learnt_and_multiplies_the_bias():
    gamma = nn.Parameter(torch.tensor(1.0))
    net = nn.Sequential(
        fastsn.SSNLinear(4, 5, scale=gamma, scale_bias=True), fastsn.SSNLinear(5, 1, scale=gamma, scale_bias=True)
    )
    assert sum(p is gamma for p in net.parameters()) == 1
    x = torch.randn(3, 4)
    before = net.eval()(x)
    gamma.data.fill_(2.0)
    weight, bias = net[0].normalized()
    assert torch.equal(bias, 2 * net[0].bias)
    expected = nn.functional.linear(nn.functional.linear(x, weight, bias), *net[1].normalized())
    assert torch.equal(net(x), expected)
    assert not torch.equal(net(x), before)
    net(x).sum().backward()
    assert float(gamma.grad) != 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.step()
    assert float(gamma.detach()) != 2.0


def test_a_scale_that_is_assigned_counts_at_the_next_use():
    layer, x = fastsn.SSNLinear(4, 4, bias=False).eval(), torch.randn(2, 4)
    once = layer(x)
    layer.spectral_norm.scale = 2
    assert type(layer.spectral_norm.scale) is float
    torch.testing.assert_close(layer(x), 2 * once)
    layer.spectral_norm.scale = nn.Parameter(torch.tensor(3.0))
    torch.testing.assert_close(layer(x), 3 * once)
    assert "spectral_norm.scale" in dict(layer.named_parameters())


@pytest.mark.parametrize("two", [2, np.float32(2), np.float64(2), np.int64(2), Fraction(2)])
def test_numbers_of_other_packages_are_numbers(two):
    layer = fastsn.SSNLinear(4, 4, scale=two, eps=two)
    assert type(layer.spectral_norm.scale) is type(layer.spectral_norm.eps) is float
    assert layer.spectral_norm.scale == 2
    if isinstance(two, np.integer):
        layer = fastsn.spectral_norm(nn.Conv2d(3, 4, 2), n_power_iterations=two, dim=two)
        assert layer.parametrizations.weight[0]._u.shape == (2,)
        assert type(layer.parametrizations.weight[0].n_power_iterations) is int


def test_a_scale_that_passes_through_zero_keeps_learning():
    layer = fastsn.SSNLinear(4, 5, scale=nn.Parameter(torch.tensor(1.0)))
    layer.spectral_norm.scale.data.zero_()
    layer(torch.randn(3, 4)).sum().backward()
    assert float(layer.spectral_norm.scale.grad) != 0
    assert layer.weight.grad.isfinite().all()


def test_a_tensor_scale_moves_with_the_module_and_is_saved():
    layer = fastsn.BSSNLinear(4, 5, scale=torch.tensor(1.5))
    assert "spectral_norm.scale" in layer.state_dict()
    assert "spectral_norm.scale" not in dict(layer.named_parameters())
    assert layer.to("meta").spectral_norm.scale.is_meta


@pytest.mark.parametrize("name", ["SNLinear", "BSSNConv2d"])
def test_deepcopy_pickle_and_state_dict(name):
    sizes = (4, 6) if name == "SNLinear" else (4, 6, 3)
    x = torch.randn(2, 4) if name == "SNLinear" else torch.randn(2, 4, 5, 5)
    layer = getattr(fastsn, name)(*sizes)
    layer(x)
    fresh = getattr(fastsn, name)(*sizes)
    fresh.load_state_dict(layer.state_dict())
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh]
    with fastsn.step(layer):
        layer(x)
        copies += [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    layer.load_state_dict(copies[0].state_dict())
    copies[3:] = [m.load_state_dict(copies[0].state_dict()) and m for m in copies[3:]]
    expected = layer(x)
    assert all(torch.equal(m(x), expected) for m in copies)


def test_copies_are_whole_while_a_backward_is_due_and_inside_a_step():
    """torch's old hook leaves a graph on the module, which no copy can have."""
    for make in (fastsn.fuse, nn.Sequential):
        model = make(nn.Sequential(fastsn.BSSNConv2d(2, 4, 3, scale=1.4), fastsn.spectral_norm(nn.Conv2d(4, 2, 3))))
        x = torch.randn(2, 2, 5, 5)
        loss = model(x).sum()
        copies = [copy.deepcopy(model)]
        with fastsn.step(model):
            model(x)
            copies.append(copy.deepcopy(model))
        expected = copy.deepcopy(model).eval()(x)
        loss.backward()
        copies[0].load_state_dict(model.state_dict())
        assert all(torch.equal(each.eval()(x), expected) for each in copies)


def test_meta_then_materialize_and_warm_up():
    with torch.device("meta"):
        net = nn.Sequential(fastsn.BSSNConv2d(4, 6, 3, scale=1.3), fastsn.SNConv2d(6, 6, 1))
        net.append(fastsn.spectral_norm(nn.Conv2d(6, 5, 1)))
    assert net(torch.randn(1, 4, 5, 5, device="meta")).shape == (1, 5, 3, 3)
    for fill in (0.0, torch.nan, 1e30):  # whatever to_empty leaves in u and v
        materialized = copy.deepcopy(net).to_empty(device="cpu")
        for buffer in materialized.buffers():
            buffer.fill_(fill)
        for parameter in materialized.parameters():
            nn.init.normal_(parameter)
        fastsn.warm_up(materialized, 1000)
        for name, weight in (("1", materialized[1].weight), ("2", materialized[2].parametrizations.weight.original)):
            assert fastsn.sigmas(materialized)[name].sigma == pytest.approx(truth(weight, 0)["out"], rel=1e-5)


def test_repr_tells_the_variant_and_the_scale():
    assert "variant='bssn', scale=1.4" in repr(fastsn.BSSNConv2d(3, 4, 3, scale=1.4))
    assert "scale=2 (learnable)" in repr(fastsn.SSNLinear(3, 4, scale=nn.Parameter(torch.tensor(2.0))))
    assert "n_power_iterations=3" in repr(fastsn.SNLinear(3, 4, n_power_iterations=3))
    with torch.device("meta"):
        assert "scale=meta" in repr(fastsn.SSNLinear(3, 4, scale=torch.ones(1)))


def test_repr_says_which_implementation_computes():
    kernels = "triton" if ON == "cuda" else "cpp" if fastsn.backends()["cpp"].available else "reference"
    for dtype, impl in ((torch.float32, kernels), (torch.bfloat16, kernels), (torch.complex64, "reference")):
        layer = fastsn.SNLinear(3, 4, dtype=dtype)
        assert f"impl={impl!r}" in repr(layer).splitlines()[1]
        assert f"impl={impl!r}" in repr(fastsn.spectral_norm(nn.Linear(3, 4, dtype=dtype)))
    assert "impl='reference'" in repr(fastsn.SNLinear(3, 4, impl="reference"))
    assert "impl='auto'" in repr(fastsn.SNLinear(3, 4, device="meta"))  # nobody computes there
