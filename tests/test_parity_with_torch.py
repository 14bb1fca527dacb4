"""fastsn.spectral_norm is torch.nn.utils.parametrizations.spectral_norm, point by point."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize

import fastsn
from shapes import TABLE, laid_out

WRAPPERS = {"torch": parametrizations.spectral_norm, "fastsn": fastsn.spectral_norm}


@pytest.fixture(params=["reference", "auto"])
def impl(request, monkeypatch):
    """WRAPPERS of the reference and of the kernels."""
    monkeypatch.setitem(WRAPPERS, "fastsn", partial(fastsn.spectral_norm, impl=request.param))
    return request.param


def assert_same(theirs: torch.Tensor, ours: torch.Tensor, impl: str) -> None:
    """The reference has torch's bits on contiguous float32; kernels sum in another order."""
    if impl == "reference":
        assert torch.equal(theirs, ours)
    else:
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=2e-6)


def discriminator(wrap) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        wrap(nn.Conv2d(1, 8, 3, padding=1)),
        nn.LeakyReLU(0.1),
        wrap(nn.Conv2d(8, 16, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.1),
        wrap(nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)),
        nn.Flatten(),
        wrap(nn.Linear(8 * 8 * 8, 1)),
    )


def assert_same_state(a: nn.Module, b: nn.Module, context: object) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{context}, {n}: {m}")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_60_training_steps_of_a_discriminator_equal_torchs(optimizer, impl):
    """Two forwards before each backward, evaluation in between, weights and buffers compared at every step. Kernels in
    float64: training, Adam's first steps most of all, makes more of a last bit than any tolerance of float32."""
    dtype = torch.float32 if impl == "reference" else torch.float64
    theirs, ours = (discriminator(lambda m, wrap=wrap: wrap(m.to(dtype))) for wrap in WRAPPERS.values())
    optimizers = [optimizer(m.parameters(), lr=1e-3) for m in (theirs, ours)]
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    assert_same_state(theirs, ours, "at construction")
    for step in range(60):
        real, fake = torch.randn(2, 4, 1, 8, 8, generator=generator).to(dtype)
        losses = []
        for model, opt in zip((theirs, ours), optimizers, strict=True):
            opt.zero_grad()
            loss = F.relu(1 - model(real)).mean() + F.relu(1 + model(fake)).mean()
            if step % 5 == 0:
                model.eval()
                loss = loss + 0.1 * model(fake).mean()
                model.train()
            loss.backward()
            opt.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-7)
        assert_same_state(theirs, ours, f"step {step}")


@pytest.mark.usefixtures("impl")
def test_three_forwards_and_a_gradient_penalty_before_one_backward():
    x, found = torch.randn(4, 6, dtype=torch.float64), []
    for wrap in WRAPPERS.values():
        torch.manual_seed(7)
        model = nn.Sequential(wrap(nn.Linear(6, 5, dtype=x.dtype)), nn.Tanh(), wrap(nn.Linear(5, 2, dtype=x.dtype)))
        points = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        (model(x).sum() + model(-x).square().sum() + slope.square().sum()).backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_same_seed_same_bits(case, impl):
    """Draws, 15 + 1 iterations at registration, then training and evaluation."""
    results = []
    for wrap in WRAPPERS.values():
        torch.manual_seed(2)
        layer = wrap(case.build())
        first, second = layer.weight.detach(), layer.weight.detach()
        evaluated = layer.eval().weight.detach()
        results.append([first, second, evaluated, *layer.state_dict().values(), torch.rand(1)])
    for theirs, ours in zip(*results, strict=True):
        assert_same(theirs, ours, impl)


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, None])
def test_any_dim_and_dtype(dtype, dim):
    results = []
    for wrap in WRAPPERS.values():
        torch.manual_seed(2)
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(4, 5, 3, dtype=dtype))
        wrap(module, dim=dim)
        results.append([module.weight.detach(), *module.state_dict().values()])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-7)


def test_one_dimensional_weights_are_divided_by_their_norm_and_keep_no_state():
    for wrap in WRAPPERS.values():
        layer = wrap(nn.Linear(3, 4), "bias")
        assert float(layer.bias.detach().norm()) == pytest.approx(1)
        assert list(layer.state_dict()) == ["weight", "parametrizations.bias.original"]
        assert not hasattr(layer.parametrizations.bias[0], "n_power_iterations")


def test_class_name_identity_and_stacking():
    layer = nn.Linear(3, 4)
    original = layer.weight
    assert fastsn.spectral_norm(layer) is layer
    assert type(layer).__name__ == "ParametrizedLinear"
    assert isinstance(layer, nn.Linear)
    assert layer.parametrizations.weight.original is original
    assert "weight" not in dict(layer.named_parameters())
    with pytest.warns(UserWarning, match="has a spectral norm already"):
        fastsn.spectral_norm(layer)
    assert len(layer.parametrizations.weight) == 2
    fastsn.warm_up(layer, 200)
    assert float(torch.linalg.matrix_norm(layer.eval().weight.detach(), 2)) == pytest.approx(1, abs=1e-5)


def test_buffers_move_in_place_and_only_in_training():
    layer = fastsn.spectral_norm(nn.Linear(30, 40))
    norm = layer.parametrizations.weight[0]
    before = {n: (b, b.data_ptr(), b.clone()) for n, b in norm.named_buffers()}
    for frozen in (False, True):  # neither no_grad nor a frozen weight stops the iteration
        layer.parametrizations.weight.original.requires_grad_(not frozen)
        with nullcontext() if frozen else torch.no_grad():
            _ = layer.weight
        for name, (buffer, pointer, value) in before.items():
            now = getattr(norm, name)
            assert now is buffer
            assert now.data_ptr() == pointer
            assert not torch.equal(now, value)
            value.copy_(now)
    layer.eval()
    frozen = copy.deepcopy(norm.state_dict())
    outputs = [layer.weight for _ in range(3)]
    assert all(torch.equal(outputs[0], o) for o in outputs)
    assert all(torch.equal(frozen[n], b) for n, b in norm.state_dict().items())


@pytest.mark.parametrize("kind", ["fastsn to torch", "torch to fastsn"])
def test_state_dicts_load_in_both_directions(kind, impl):
    torch.manual_seed(0)
    names = kind.split(" to ")
    source, target = (WRAPPERS[name](nn.Conv2d(3, 5, 3)) for name in names)
    source(torch.randn(1, 3, 4, 4))
    target.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(2, 3, 6, 6)
    assert_same(source(x), target(x), impl)
    assert_same(source.eval()(x), target.eval()(x), impl)
    assert list(source.state_dict()) == list(target.state_dict())
    half = {k: v.half() for k, v in source.state_dict().items()}
    target.load_state_dict(half, assign=True)
    assert target.parametrizations.weight[0]._u.dtype == (torch.float32 if names[1] == "fastsn" else torch.float16)
    target.load_state_dict(source.state_dict(), assign=True)
    partial = {k: v for k, v in source.state_dict().items() if not k.endswith("_v")}
    with pytest.warns(UserWarning, match="no u and v") if names[1] == "fastsn" else nullcontext():
        assert target.load_state_dict(partial, strict=False).missing_keys == ["parametrizations.weight.0._v"]


def test_assignment_stores_the_unnormalized_value():
    layer = fastsn.spectral_norm(nn.Linear(3, 4))
    parameter, value = layer.parametrizations.weight.original, torch.randn(4, 3)
    layer.weight = value
    assert layer.parametrizations.weight.original is parameter
    assert torch.equal(parameter, value)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_remove_parametrizations(mode, impl):
    for leave in (True, False):
        results = []
        for wrap in WRAPPERS.values():
            torch.manual_seed(3)
            layer = getattr(wrap(nn.Linear(5, 4)), mode)()
            original = layer.parametrizations.weight.original.detach().clone()
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=leave)
            assert type(layer) is nn.Linear
            assert torch.equal(layer.weight, original) != leave
            results.append(layer.weight)
        assert_same(*results, impl)


def test_cached_serves_one_weight():
    layer = fastsn.spectral_norm(nn.Linear(30, 40))
    with parametrize.cached():
        first = layer.weight
        u = layer.parametrizations.weight[0]._u.clone()
        assert layer.weight is first
        assert torch.equal(layer.parametrizations.weight[0]._u, u)
    assert layer.weight is not first


def test_cached_across_autocast():
    """The first read decides the dtype for all readers: it must be the parameter's."""
    layer, x = fastsn.spectral_norm(nn.Linear(5, 4)), torch.randn(2, 5)
    with parametrize.cached():
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer(x).dtype == torch.float32


def test_deepcopy_works_and_pickle_says_what_torch_says():
    layer = fastsn.spectral_norm(nn.Linear(3, 4))
    layer(torch.randn(1, 3)).sum().backward()
    assert torch.equal(copy.deepcopy(layer).eval().weight, layer.eval().weight)
    errors = []
    for wrap in WRAPPERS.values():
        with pytest.raises(RuntimeError) as error:
            pickle.dumps(wrap(nn.Linear(3, 4)))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_second_tensor_of_a_copy_is_no_matter_of_the_original():
    """torch's registration takes ``bias`` from the original: both have one class."""
    layer = fastsn.spectral_norm(nn.Linear(3, 4))
    clone = fastsn.spectral_norm(copy.deepcopy(layer), "bias")
    assert isinstance(layer.bias, nn.Parameter)
    assert float(clone.bias.detach().norm()) == pytest.approx(1)
    assert layer(torch.randn(2, 3)).shape == clone(torch.randn(2, 3)).shape


def test_functional_call_moves_the_buffers_it_is_given():
    layer = fastsn.spectral_norm(nn.Linear(30, 40))
    state = {k: v.detach().clone() for k, v in layer.state_dict().items()}
    given = {k: v.clone() for k, v in state.items()}
    functional_call(layer, given, torch.randn(1, 30))
    assert all(torch.equal(state[k], v) for k, v in layer.state_dict().items())
    assert not torch.equal(given["parametrizations.weight.0._u"], state["parametrizations.weight.0._u"])


@pytest.mark.usefixtures("impl")
def test_function_transforms_give_torchs_gradients():
    results = []
    x = torch.randn(6, 5)
    for wrap in WRAPPERS.values():
        torch.manual_seed(3)
        layer = wrap(nn.Linear(5, 4))
        parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

        def loss(p, x, layer=layer, buffers=buffers):
            return functional_call(layer, (p, buffers), (x,)).square().sum()

        results.append([grad(loss)(parameters, x), vmap(grad(loss), (None, 0))(parameters, x)])
    for theirs, ours in zip(*results, strict=True):
        for name in theirs:
            torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-6)


def test_inference_mode_then_training():
    layer = fastsn.spectral_norm(nn.Linear(5, 4))
    with torch.inference_mode():
        layer(torch.randn(2, 5))
    layer(torch.randn(2, 5)).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "offset"])
def test_memory_layout_is_kept_and_changes_no_value(layout):
    weight = torch.randn(6, 4, 3, 3)
    results = []
    for w in (weight, laid_out(weight, layout)):
        torch.manual_seed(3)
        module = nn.Module()
        module.weight = nn.Parameter(w)
        fastsn.spectral_norm(module, variant="bssn", scale=1.3)
        results.append(module.weight)
        if layout != "sliced":  # an elementwise result keeps the strides of a dense tensor
            assert module.weight.stride() == w.stride()
        module.weight.square().sum().backward()
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
