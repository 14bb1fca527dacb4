"""Autocast, loss scaling and half-precision modules around a network."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import fastsn
from networks import discriminator, task

HALF = [torch.bfloat16, torch.float16]


def top(weight: Tensor, variant: str) -> float:
    """The norm that the variant divides by, by SVD."""
    w = weight.detach().double()
    out = torch.linalg.matrix_norm(w.flatten(1), 2)
    both = (out + torch.linalg.matrix_norm(w.transpose(0, 1).flatten(1), 2)) / 2
    return float(both if variant.startswith("b") and w.ndim > 2 else out)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scaled", [True, False])
def test_training_under_autocast(dtype, scaled):
    """Loss scaling, clipping and a step around both: it learns, and sigma is that of the float32 weights."""
    model, (x, y) = discriminator(), task()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        twin = copy.deepcopy(model)
        with fastsn.step(twin):
            twin(x)
        with torch.autocast("cpu", dtype=dtype), fastsn.step(model):
            output = model(x)
            assert output.dtype == dtype
            loss = nn.functional.binary_cross_entropy_with_logits(output.float(), y)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
        assert fastsn.sigmas(model) == fastsn.sigmas(twin)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)) > 0
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    fastsn.warm_up(model, 5)
    assert fastsn.sigmas(model)["5"].sigma == pytest.approx(top(model[5].weight, "sn"), rel=1e-3)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_under_autocast_are_those_of_full_precision_within_rounding(dtype):
    model, (x, y) = discriminator(), task()
    twin = copy.deepcopy(model)
    for net, enabled in ((model, True), (twin, False)):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled), fastsn.step(net):
            loss = nn.functional.binary_cross_entropy_with_logits(net(x).float(), y)
        loss.backward()
    for ours, exact in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        error = torch.linalg.vector_norm(ours.grad - exact.grad) / torch.linalg.vector_norm(exact.grad)
        assert 0 < float(error) < 8 * torch.finfo(dtype).eps


def test_a_step_that_loss_scaling_skips_leaves_sound_vectors():
    """Infinite gradients: the optimizer does not move, u and v have and are as good as before."""
    model, (x, _) = discriminator(), task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [p.detach().clone() for p in model.parameters()]
    with fastsn.step(model):
        loss = 100 * model(x).square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(float(b.norm()) == pytest.approx(1, abs=1e-6) for b in model.buffers())


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_modules_train(dtype):
    model, (x, y) = discriminator().to(dtype), task(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with fastsn.step(model):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x).float(), y.float())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    fastsn.warm_up(model, 100)
    assert fastsn.sigmas(model)["0"].sigma == pytest.approx(top(model[0].weight, "bssn"), rel=1e-4)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("how", ["autocast", "autocast in a step", "half module"])
def test_second_derivatives_are_those_of_full_precision_within_rounding(dtype, how):
    """The R1 penalty's gradients, through W̄ in half precision twice."""
    model, (x, _) = discriminator(), task()
    exact = copy.deepcopy(model)
    if how == "half module":
        model.to(dtype)
    for net, half in ((model, True), (exact, False)):
        points = x.to(next(net.parameters()).dtype).requires_grad_()
        cast = torch.autocast("cpu", dtype=dtype, enabled=half and how != "half module")
        with cast, fastsn.step(net) if "step" in how else nullcontext():
            output = net(points)
        (slope,) = torch.autograd.grad(output.float().sum(), points, create_graph=True)
        slope.float().square().sum().backward()
    for ours, theirs in zip(list(model.parameters())[:-1], list(exact.parameters())[:-1], strict=True):
        error = torch.linalg.vector_norm(ours.grad.float() - theirs.grad) / torch.linalg.vector_norm(theirs.grad)
        assert 0 < float(error) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_gradient_of_the_reference_is_rounded_once(dtype):
    weight, gradient = (torch.randn(6, 5) * 3e-6).to(dtype), (torch.randn(6, 5) * 0.05).to(dtype)
    norm = fastsn.SpectralNorm(weight, impl="reference").eval()
    found = []
    for w in (weight.requires_grad_(), weight.detach().float().requires_grad_()):
        found += torch.autograd.grad(norm(w), w, gradient.to(w.dtype))
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1].to(dtype))
