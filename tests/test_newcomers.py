"""What people do before they have read the README: the obvious meaning, or an error that says what to do."""

from __future__ import annotations

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
def test_a_tensor_that_another_hook_makes_cannot_be_normalised():
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


@pytest.mark.parametrize(
    "layer", [fastsn.SNLinear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 4)), fastsn.convert(plain(), "sn")[0]]
)
def test_a_norm_on_top_of_another_is_made_with_a_warning(layer):
    with pytest.warns(UserWarning, match=r"Linear.weight has a spectral norm already, .*; fastsn.convert\(module"):
        fastsn.spectral_norm(layer)
    assert layer(torch.randn(2, 4)).isfinite().all()
