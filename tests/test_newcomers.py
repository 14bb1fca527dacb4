"""What people do before they have read the README: the obvious meaning, or an error that says what to do."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils import spectral_norm as hook

import fastsn


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def entered(model: nn.Module, advance: bool = True) -> None:
    with fastsn.step(model, advance):
        pass


@pytest.mark.parametrize("call", [entered, fastsn.fuse, fastsn.warm_up, fastsn.fold])
def test_a_model_without_norms_is_refused_by_whatever_would_change_them(call):
    with pytest.raises(
        ValueError, match=r"model must have norms of fastsn, got none: call fastsn\.convert on it first"
    ):
        call(plain())
    assert fastsn.sigmas(plain()) == {}  # a report of nothing


@pytest.mark.parametrize("lacks", ["source", "target"])
def test_vectors_are_copied_between_models_that_have_some(lacks):
    models = {"source": fastsn.convert(plain(), "sn"), "target": fastsn.convert(plain(), "sn"), lacks: plain()}
    with pytest.raises(ValueError, match=f"{lacks} must have norms of fastsn, got none"):
        fastsn.copy_vectors(**models)


@pytest.mark.parametrize("value", ["no", 0, None])
def test_flags_are_true_or_false(value):
    with pytest.raises(TypeError, match=f"advance must be True or False, got {value!r}"):
        fastsn.step(fastsn.SNLinear(3, 4), advance=value)
    with pytest.raises(TypeError, match=f"scale_bias must be True or False, got {value!r}"):
        fastsn.SSNLinear(3, 4, scale_bias=value)


@pytest.mark.parametrize(
    ("vectors", "error", "message"),
    [
        ({"x": ()}, ValueError, "vectors must have the views 'out' and 'in' as keys, got 'x'"),
        ([torch.ones(3)], TypeError, r"vectors must be a mapping of view to \(u, v\), got list"),
    ],
)
def test_vectors_of_something_that_is_no_view(vectors, error, message):
    with pytest.raises(error, match=message):
        fastsn.SpectralNorm(torch.randn(3, 4), vectors=vectors)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("made", "called"), [((4, 4, 3, 3), (4, 36)), ((4, 4), (4,)), ((4,), (4, 4))])
def test_a_norm_is_called_with_as_many_dimensions_as_it_was_made_for(made, called, impl):
    norm = fastsn.SpectralNorm(torch.randn(made), impl=impl)
    before = [x.clone() for x in norm.buffers()]
    with pytest.raises(ValueError, match=f"weight must have {len(made)} dimensions as at .*, got {len(called)}"):
        norm(torch.randn(called))
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))
    for nothing in (None, 3.0):
        with pytest.raises(TypeError, match=f"weight must be a tensor, got {type(nothing).__name__}"):
            norm(nothing)


def test_a_bias_that_is_not_there_cannot_be_scaled():
    with pytest.raises(ValueError, match="BSSNLinear has no free scale or no bias"):
        fastsn.BSSNLinear(4, 4, bias=False, scale_bias=True)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("x", TypeError, "scale must be a float or a tensor, got 'x'"),
        (None, TypeError, "scale must be a float or a tensor, got None"),
        (True, TypeError, "scale must be a float or a tensor, got True"),
        (-1.0, ValueError, "scale must be finite and positive, got -1"),
        (float("nan"), ValueError, "scale must be finite and positive, got nan"),
    ],
)
def test_a_scale_is_checked_when_it_is_assigned(value, error, message):
    layer = fastsn.BSSNLinear(4, 4, scale=1.4)
    with pytest.raises(error, match=message):
        layer.spectral_norm.scale = value
    assert layer.spectral_norm.scale == 1.4
    with pytest.raises(ValueError, match=r"scale must be 1.0 for variant 'bsn', got 2"):
        fastsn.BSNLinear(4, 4).spectral_norm.scale = 2


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


@pytest.mark.parametrize("dim", ["0", 0.0, True, torch.ones(2)])
def test_a_dim_that_is_no_integer(dim):
    with pytest.raises(TypeError, match="dim must be an integer, got "):
        fastsn.spectral_norm(nn.Linear(3, 4), dim=dim)


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant)")
def test_weights_that_are_not_dense(layout):
    sparse = torch.eye(4).to_sparse(layout=getattr(torch, layout))
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(sparse)
    with pytest.raises(TypeError, match=rf"Linear.weight must be dense, got layout torch.{layout}: .*to_dense\(\)"):
        fastsn.spectral_norm(layer)
    with pytest.raises(TypeError, match="weight must be dense"):
        fastsn.SpectralNorm(torch.eye(4))(sparse)


@pytest.mark.parametrize("name", ["weight", "weight_orig"])
def test_spectral_norm_over_torchs_old_hook_points_to_convert(name):
    layer = hook(nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=f"Linear.{name} has a norm of torch.nn.utils.spectral_norm already: .*convert"
    ):
        fastsn.spectral_norm(layer, name)
    fastsn.spectral_norm(layer, "bias")  # another tensor


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_tensor_that_another_hook_makes_cannot_be_normalized():
    with pytest.raises(ValueError, match="got 'weight', a tensor that a hook makes; it has bias, weight_g, weight_v"):
        fastsn.spectral_norm(weight_norm(nn.Linear(4, 4)))


@pytest.mark.parametrize("model", [plain(), plain()[0], fastsn.convert(plain(), "sn")[1:]])
def test_a_loop_over_all_modules_is_told_of_convert_where_it_comes_to_the_norms(model):
    def loop() -> None:
        for module in model.modules():
            if hasattr(module, "weight") and not hasattr(module, "parametrizations"):
                fastsn.spectral_norm(module)

    with pytest.raises(ValueError, match=r"module must be a layer, got a \w+ that .*: call fastsn\.convert"):
        loop()
    with pytest.raises(ValueError, match=r"got a SpectralNorm that belongs to a norm"):
        fastsn.spectral_norm(fastsn.SNLinear(4, 4).spectral_norm)


def test_repr_says_which_implementation_computes():
    kernels = "cpp" if fastsn.backends()["cpp"].available else "reference"
    for dtype, impl in ((torch.float32, kernels), (torch.bfloat16, kernels), (torch.complex64, "reference")):
        layer = fastsn.SNLinear(3, 4, dtype=dtype)
        assert f"impl={impl!r}" in repr(layer).splitlines()[1]
        assert f"impl={impl!r}" in repr(fastsn.spectral_norm(nn.Linear(3, 4, dtype=dtype)))
    assert "impl='reference'" in repr(fastsn.SNLinear(3, 4, impl="reference"))
    assert "impl='auto'" in repr(fastsn.SNLinear(3, 4, device="meta"))  # nobody computes there


@pytest.mark.parametrize(
    "layer", [fastsn.SNLinear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 4)), fastsn.convert(plain(), "sn")[0]]
)
def test_a_norm_on_top_of_another_is_made_with_a_warning(layer):
    with pytest.warns(UserWarning, match=r"Linear.weight has a spectral norm already, .*; fastsn.convert\(module"):
        fastsn.spectral_norm(layer)
    assert layer(torch.randn(2, 4)).isfinite().all()


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
