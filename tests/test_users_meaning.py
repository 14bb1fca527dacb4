"""What users of spectral norms suffer from, row by row: which norm it is, and of what."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastsn
from dispatched import recorded

TORCH = parametrizations.spectral_norm
IMPLS = ["reference", "auto"]


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def norm_of(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach().double().flatten(1), 2))


def operator(weight: Tensor, size: int) -> Tensor:
    """The matrix of the convolution on images of this size, zeros around them: a column for each pixel of the input."""
    inputs = torch.eye(weight.shape[1] * size * size, dtype=weight.dtype).view(-1, weight.shape[1], size, size)
    return F.conv2d(inputs, weight, padding=weight.shape[-1] - 1).flatten(1).t()


@pytest.mark.parametrize("variant", ["sn", "bsn"])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_row_30_the_norm_of_the_reshape_bounds_that_of_the_convolution(variant, kernel):
    """max(σ_out, σ_in) <= the operator's norm <= sqrt(K) · min(σ_out, σ_in) for K kernel positions; so the operator's
    norm is at least 1 after normalization, and not 1 unless K is."""
    layer = fastsn.spectral_norm(nn.Conv2d(2, 3, kernel, dtype=torch.float64), n_power_iterations=500, variant=variant)
    weight = layer.weight.detach()
    out, into = norm_of(weight), norm_of(weight.transpose(0, 1))
    assert (out if variant == "sn" else (out + into) / 2) == pytest.approx(1, rel=1e-6)
    found = norm_of(operator(weight, 5))
    assert max(out, into) <= found * (1 + 1e-9)
    assert found <= kernel * min(out, into) * (1 + 1e-9)
    assert (found > 1.01) == (kernel > 1)
    measured = fastsn.sigmas(layer)[""]
    assert measured.sigma_out == pytest.approx(norm_of(original(layer)), rel=1e-6)
    assert measured.sigma_in == pytest.approx(norm_of(original(layer).transpose(0, 1)), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_row_31_output_channels_of_transposed_convolutions_are_dimension_1(dims, impl):
    """Sizes and numbers of torch; the norm that of the weight with its output channels in front."""
    found = []
    for wrap in (TORCH, lambda m: fastsn.spectral_norm(m, impl=impl)):
        torch.manual_seed(1)
        layer = wrap(getattr(nn, f"ConvTranspose{dims}d")(4, 3, 2))
        norm = layer.parametrizations.weight[0]
        assert (len(norm._u), len(norm._v)) == (3, 4 * 2**dims)
        found.append([layer.weight.detach(), norm._u, norm._v])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    fastsn.warm_up(layer, 500)
    rows = original(layer).transpose(0, 1)
    assert fastsn.sigmas(layer)[""].sigma == pytest.approx(norm_of(rows), rel=1e-5)
    assert norm_of(rows) != pytest.approx(norm_of(original(layer)), rel=1e-3)
    own = getattr(fastsn, f"SNConvTranspose{dims}d")(4, 3, 2, impl=impl)
    assert len(own.spectral_norm._u) == 3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["Conv2d", "ConvTranspose2d"])
def test_row_32_groups_are_normalized_together_as_in_torch(kind, impl):
    """The norm of the weight as it is stored bounds that of each group, whose own is smaller."""
    found = []
    for wrap in (TORCH, lambda m: fastsn.spectral_norm(m, impl=impl)):
        torch.manual_seed(1)
        layer = wrap(getattr(nn, kind)(4, 6, 3, groups=2))
        found.append([layer.weight.detach(), *layer.buffers()])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    weight = fastsn.warm_up(layer, 1000).eval().weight.detach()
    together = weight if kind == "Conv2d" else weight.transpose(0, 1)
    assert norm_of(together) == pytest.approx(1, abs=1e-4)
    groups = [norm_of(group if kind == "Conv2d" else group.transpose(0, 1)) for group in weight.chunk(2)]
    assert max(groups) < 0.999


@pytest.mark.skipif(not fastsn.backends()["cpp"].available, reason="the kernels read weights in place")
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_row_33_strides_are_kept_and_nothing_is_copied(layout):
    """torch copies the whole weight in every forward."""
    layers = {"torch": TORCH(nn.Conv2d(4, 6, 3))}
    for name in ("fastsn", "contiguous"):
        torch.manual_seed(2)
        layers[name] = fastsn.spectral_norm(nn.Conv2d(4, 6, 3))
    laid = original(layers["fastsn"]).data
    if layout == "channels_last":
        laid = laid.to(memory_format=torch.channels_last)
    else:
        laid = torch.stack([laid, laid], 1)[:, 0]
    assert not laid.is_contiguous()
    for name in ("torch", "fastsn"):
        original(layers[name]).data = laid
        with recorded() as names:
            weight = layers[name].weight
            weight.backward(torch.ones_like(weight))
        assert bool({"clone", "copy_"}.intersection(names)) == (name == "torch")
    if layout == "channels_last":
        assert weight.stride() == laid.stride()
    torch.testing.assert_close(weight, layers["contiguous"].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_row_34_a_learnt_gain_is_a_scale(shared):
    """Its derivative is right, and it learns the Lipschitz constant of a map."""
    gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    layer = fastsn.SSNLinear(4, 4, bias=False, scale=gain, dtype=torch.float64)
    weight = layer.weight.detach().requires_grad_()
    norm = layer.spectral_norm.eval()
    assert torch.autograd.gradcheck(
        lambda w, c: torch.func.functional_call(norm, {"scale": c}, (w,)), (weight, gain.detach().requires_grad_())
    )
    model = nn.Sequential(layer.train(), fastsn.SSNLinear(4, 4, bias=False, scale=gain, dtype=torch.float64))
    model = model if shared else layer
    assert sum(p is gain for p in model.parameters()) == 1
    optimizer = torch.optim.SGD([gain], lr=0.03)
    for part in {*model.modules()}:
        if isinstance(part, fastsn.SSNLinear):
            nn.init.eye_(part.weight)
    x = torch.randn(64, 4, dtype=torch.float64)
    for _ in range(200):
        optimizer.zero_grad()
        (model(x) - 4 * x).square().mean().backward()
        optimizer.step()
    assert float(gain.detach()) == pytest.approx(math.sqrt(4) if shared else 4, rel=1e-3)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_row_34_a_fixed_scale_is_the_norm_that_comes_out(scale):
    """Whatever the size of the weight: a scale is no upper bound that leaves smaller weights alone."""
    for size in (0.01, 100.0):
        layer = fastsn.SSNLinear(6, 5, scale=scale).eval()
        layer.weight.data = size * torch.randn(5, 6)
        fastsn.warm_up(layer, 500)
        assert norm_of(layer.normalized()[0]) == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", fastsn.VARIANTS)
def test_row_35_each_variant_is_its_equation(variant, impl):
    """One use in training, against the equation of the README in float64."""
    scale = 1.4 if variant in ("ssn", "bssn") else 1.0
    layer = fastsn.spectral_norm(nn.Conv2d(3, 5, 2, dtype=torch.float64), variant=variant, scale=scale, impl=impl)
    w, norm = original(layer).detach(), layer.parametrizations.weight[0]
    m, n = w.flatten(1), w.flatten(2).transpose(1, 2).flatten(0, 1)
    vectors = {name: value.clone() for name, value in norm.named_buffers()}
    found = layer.weight.detach()
    u = F.normalize(m @ vectors["_v"], dim=0)
    v = F.normalize(m.T @ u, dim=0)
    sigma = u @ m @ v
    if variant in ("bsn", "bssn"):
        u_in = F.normalize(n @ vectors["_v_in"], dim=0)
        v_in = F.normalize(n.T @ u_in, dim=0)
        sigma = (sigma + u_in @ n @ v_in) / 2
        torch.testing.assert_close([norm._u_in, norm._v_in], [u_in, v_in])
    else:
        assert set(vectors) == {"_u", "_v"}
    torch.testing.assert_close([norm._u, norm._v], [u, v])
    torch.testing.assert_close(found, scale * w / sigma)
