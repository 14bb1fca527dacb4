"""Norms where something makes the tensor already: another norm, or a hook."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils import spectral_norm as hook

import fastsn


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


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


@pytest.mark.parametrize(
    "layer", [fastsn.SNLinear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 4)), fastsn.convert(plain(), "sn")[0]]
)
def test_a_norm_on_top_of_another_is_made_with_a_warning(layer):
    with pytest.warns(UserWarning, match=r"Linear.weight has a spectral norm already, .*; fastsn.convert\(module"):
        fastsn.spectral_norm(layer)
    assert layer(torch.randn(2, 4)).isfinite().all()
