"""Weights are read where they lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastsn
from dispatched import recorded
from fastsn import views
from shapes import TABLE, laid_out


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_dense_weights_are_seen_without_a_copy(case, layout):
    layer = case.build()
    weight = laid_out(layer.weight.detach(), layout)
    oik = views.as_oik(weight, views.output_dim(layer))
    assert oik.data_ptr() == weight.data_ptr()
    assert oik.numel() == weight.numel()
    o, i = weight.movedim(views.output_dim(layer), 0).shape[:2]
    assert oik.shape == (o, i, weight.numel() // (o * i))


def test_slices_of_channels_are_seen_without_a_copy_and_slices_of_kernels_with_one():
    weight = torch.randn(6, 8, 3, 3)
    assert views.as_oik(weight[::2, 1::3], 0).data_ptr() == weight[::2, 1::3].data_ptr()
    sliced = weight[..., ::2]
    assert views.as_oik(sliced, 0).data_ptr() != sliced.data_ptr()
    assert torch.equal(views.as_oik(sliced, 0), sliced.flatten(2))


@pytest.mark.skipif(not fastsn.backends()["cpp"].available, reason="the kernels read weights in place")
@pytest.mark.parametrize("layout", ["channels_last", "slices of channels"])
def test_forward_and_backward_copy_no_weight(layout):
    """torch's spectral_norm copies the whole weight in every forward."""
    for wrap in (parametrizations.spectral_norm, fastsn.spectral_norm):
        layer = wrap(nn.Conv2d(4, 6, 3))
        original = layer.parametrizations.weight.original
        if layout == "channels_last":
            original.data = laid_out(original.data, layout)
        else:
            original.data = torch.stack([original.data, original.data], 1)[:, 0]
        assert not original.is_contiguous()
        with recorded() as names:
            weight = layer.weight
            weight.backward(torch.ones_like(weight))
        assert bool({"clone", "copy_"}.intersection(names)) == (wrap is parametrizations.spectral_norm)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_vector_sizes_are_the_shapes_of_the_two_reshapes(case):
    layer = case.build()
    weight = layer.weight.movedim(views.output_dim(layer), 0)
    oik = views.as_oik(layer.weight, views.output_dim(layer))
    o, i = weight.shape[:2]
    assert views.vector_sizes(oik, "out") == (o, weight.numel() // o)
    assert views.vector_sizes(oik, "in") == (weight.numel() // i, i)
    assert views.distinct(views.VIEWS, oik) == (("out",) if weight.numel() == o * i else ("out", "in"))
