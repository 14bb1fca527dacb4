"""First and second derivatives, against finite differences and against the closed form."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastsn
from dispatched import needs_kernels
from fastsn import reference, views
from shapes import TABLE


@pytest.mark.parametrize("prefix", ["SN", "BSSN"])
def test_layers_pass_gradcheck_with_their_state_reset(prefix):
    """The whole layer in training mode, two forwards before the derivative, a learnable scale on weight and bias."""
    scale = (
        {} if prefix == "SN" else {"scale": nn.Parameter(torch.tensor(1.3, dtype=torch.float64)), "scale_bias": True}
    )
    layer = getattr(fastsn, f"{prefix}Conv2d")(2, 3, 2, dtype=torch.float64, **scale)
    fastsn.warm_up(layer, 3000)  # converged: finite differences then see u and v stand still to first order
    x, y = torch.randn(2, 1, 2, 3, 3, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    buffers = {k: v.clone() for k, v in layer.named_buffers()}

    def forward(*values: Tensor) -> Tensor:
        state = dict(zip(parameters, values, strict=True)) | {k: v.clone() for k, v in buffers.items()}
        return torch.func.functional_call(layer, state, (x,)) - torch.func.functional_call(layer, state, (y,)) ** 2

    assert gradcheck(forward, tuple(p.detach().clone().requires_grad_() for p in parameters.values()))


@pytest.mark.parametrize("prefix", ["SN", "SSN", "BSN", "BSSN"])
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_the_gradient_is_the_closed_form(case, prefix):
    """dL/dW = (c / sigma) G - (<G, W̄> / sigma) mean over views of u v^T, dL/dc = <G, W̄> / c."""
    free = prefix in ("SSN", "BSSN")
    scale = nn.Parameter(torch.tensor(1.7, dtype=torch.float64)) if free else 1.0
    layer = case.build(prefix, dtype=torch.float64, scale=scale)
    c = float(scale.detach()) if free else 1.0
    version = layer.weight._version
    normalized, _ = layer.normalized()
    upstream = torch.randn_like(normalized)
    normalized.backward(upstream)
    assert layer.weight._version == version  # it was not written

    norm = layer.spectral_norm
    dim = norm.dim
    oik = views.as_oik(layer.weight.detach(), dim)
    inner, sigma, outer = (upstream * normalized).sum(), 0.0, torch.zeros_like(oik)
    for view, (u, v) in norm.vectors().items():
        o, i, k = oik.shape
        rank_one = torch.outer(u, v).view(o, i, k) if view == "out" else torch.outer(u, v).view(o, k, i).transpose(1, 2)
        sigma = sigma + (rank_one * oik).sum() / len(norm.views)
        outer = outer + rank_one / len(norm.views)
    expected = c / sigma * views.as_oik(upstream, dim) - inner / sigma * outer
    torch.testing.assert_close(views.as_oik(layer.weight.grad, dim), expected.detach(), rtol=1e-9, atol=1e-12)
    if free:
        torch.testing.assert_close(scale.grad, (inner / c).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["sn", "ssn", "bssn"])
@pytest.mark.parametrize("kind", ["complex", "channels_last", "transposed"])
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_finite_differences_confirm_both_orders_of_a_norm_in_evaluation(kind, variant, impl):
    """Where u and v stand still for finite differences too. A learnable scale may pass through 0."""
    if kind == "complex":
        layer = nn.Linear(3, 2, dtype=torch.complex128)
    elif kind == "transposed":
        layer = nn.ConvTranspose1d(2, 3, 2).double()
    else:
        layer = nn.Conv2d(2, 3, (2, 1)).double().to(memory_format=torch.channels_last)
    scale = nn.Parameter(torch.tensor(1.4, dtype=torch.float64))
    fastsn.spectral_norm(layer, variant=variant, scale=1.0 if variant == "sn" else scale, impl=impl)
    norm, weight = layer.eval().parametrizations.weight[0], layer.parametrizations.weight.original.detach()

    def function(weight: Tensor, *scale: Tensor) -> Tensor:
        normalized = torch.func.functional_call(norm, dict(zip(("scale",), scale, strict=False)), (weight,))
        return normalized * normalized.sin()

    for c in (1.4, 0.0):
        scales = [torch.full_like(p, c) for p in norm.parameters()]
        inputs = [x.requires_grad_() for x in (weight, *scales)]
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


def test_through_the_iteration_is_another_gradient_until_it_converges():
    """gradient="through" is what finite differences of the whole step say, from the stored vectors on."""
    a, b, c = (torch.randn(n, dtype=torch.float64) for n in (3, 2, 2))
    weight = 4 * torch.einsum("o,i,k->oik", a, b, c) / (a.norm() * b.norm() * c.norm())
    weight = (weight + 0.3 * torch.randn(3, 2, 2, dtype=torch.float64)).requires_grad_()  # it converges fast
    start = fastsn.SpectralNorm(torch.randn(3, 2, 2, dtype=torch.float64), variant="bsn").vectors()

    def step(w: Tensor, gradient: str = "through", n: int = 1) -> Tensor:
        vectors = reference.power_iteration([w], [start], n, gradient)
        return reference.rescale([w], reference.sigmas([w], vectors), [1.0])[0]

    assert gradcheck(step, (weight,))
    assert gradgradcheck(step, (weight,))
    upstream = torch.randn_like(weight)
    for n, agree in ((1, False), (40, True)):
        through, fixed_uv = (torch.autograd.grad(step(weight, g, n), weight, upstream)[0] for g in ("through", "fixed"))
        assert torch.allclose(through, fixed_uv, rtol=1e-6, atol=1e-8) == agree


@pytest.mark.parametrize("kind", ["layer", "drop-in", "step"])
def test_a_backward_after_the_optimizer_has_stepped_is_that_of_the_forward(kind):
    """torch's spectral_norm raises here."""
    needs_kernels()  # the reference needs the weight itself for the gradient, like torch's
    layer = fastsn.BSSNConv2d(2, 3, 3, scale=1.3) if kind == "layer" else fastsn.spectral_norm(nn.Conv2d(2, 3, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    with fastsn.step(layer) if kind == "step" else nullcontext():
        loss = layer(torch.randn(2, 2, 5, 5)).square().sum()
    loss.backward(retain_graph=True)
    expected = [p.grad.clone() for p in layer.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(layer.parameters(), expected, strict=True))
    assert expected[0].abs().sum() > 0


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_two_forwards_one_backward_with_evaluation_between(impl):
    """Later uses move u and v; the gradient of an earlier one must not notice."""
    layer = fastsn.BSSNConv2d(2, 3, 3, scale=1.2, impl=impl)
    layer.weight.data.normal_()
    twin = copy.deepcopy(layer)
    x, y = torch.randn(2, 1, 2, 4, 4)
    a = layer(x).square().sum()
    b = layer.eval()(x).square().sum()
    c = layer.train()(y).square().sum()
    (a - 3 * b + c).backward()
    twin(x).square().sum().backward()
    (-3 * twin.eval()(x).square().sum()).backward()
    twin.train()(y).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_scale_that_is_written_over_between_two_forwards_spoils_no_gradient(impl):
    """As DistributedDataParallel does with buffers, in torch 2.10 and 2.11."""
    layer = fastsn.BSSNConv1d(4, 4, 3, scale=torch.tensor(1.3), scale_bias=True, impl=impl).eval()
    layers = nn.ModuleList([layer, fastsn.spectral_norm(nn.LayerNorm(4), variant="ssn", scale=torch.tensor(0.7))])
    x, found = torch.randn(2, 4, 6), []
    for written_over in (False, True):
        layers.zero_grad()
        first = layers[1](layer(x))
        if written_over:
            with torch.no_grad():
                for name, buffer in layers.named_buffers():
                    if name.endswith("scale"):
                        buffer.copy_(buffer.clone())
        (first.square().sum() - layers[1](layer(-x)).sum()).backward()
        found.append([p.grad.clone() for p in layers.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_gradient_penalty_differentiates_the_normalized_weight_twice():
    torch.manual_seed(4)
    net = nn.Sequential(
        fastsn.BSSNConv2d(1, 2, 2, dtype=torch.float64),
        nn.Tanh(),
        nn.Flatten(),
        fastsn.BSSNLinear(8, 1, dtype=torch.float64),
    ).eval()
    x = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(net.named_parameters())

    def penalty(*values: Tensor) -> Tensor:
        out = torch.func.functional_call(net, dict(zip(parameters, values, strict=True)), (x,))
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square().mean()

    assert gradcheck(penalty, tuple(p.detach().clone().requires_grad_() for p in parameters.values()))
