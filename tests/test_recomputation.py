"""Activation checkpointing: what backward runs again is what forward was, and u and v advance once."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastsn

Run = Callable[[nn.Module, Tensor, bool], Tensor]
Scope = Callable[[nn.Module], AbstractContextManager[object]]


def model() -> nn.Sequential:
    """One layer is used twice."""
    shared = fastsn.BSSNConv2d(4, 4, 3, padding=1, scale=1.4)
    convolution = fastsn.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
    return nn.Sequential(
        shared, nn.Tanh(), convolution, nn.Tanh(), shared, nn.Flatten(), nn.Tanh(), fastsn.SSNLinear(100, 3, scale=0.7)
    )


def without_shared() -> nn.Sequential:
    net = model()
    net[4] = fastsn.BSNConv2d(4, 4, 3, padding=1)
    return net


def image() -> Tensor:
    return torch.randn(2, 4, 5, 5, requires_grad=True)


def whole(net: nn.Module, x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(net, x, use_reentrant=reentrant)


def with_more_around(net: nn.Module, x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(lambda x: net(x.sin()).sin() * 2, x, use_reentrant=reentrant)


class Segments(nn.Module):
    """A network that checkpoints its own parts."""

    def __init__(self, net: nn.Sequential, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.net(x)
        return checkpoint_sequential(list(self.net), 3, x, use_reentrant=self.reentrant)


def segments(net: nn.Module, x: Tensor, reentrant: bool) -> Tensor:
    net.reentrant = reentrant
    return net(x)


def no_scope(_: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def compare(net: nn.Module, twin: nn.Module) -> None:
    for (name, a), b in zip(net.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert b.grad.abs().sum() > 0
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(b.grad.abs().max()), msg=name)


@pytest.mark.parametrize("scope", ["step", "fuse", "single uses"])
@pytest.mark.parametrize("run", [whole, with_more_around, segments])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_and_vectors_are_those_without_checkpointing(scope, run, reentrant):
    """Two forwards, then one backward, after the step."""
    net = model()
    if run is segments:
        net = Segments(net, None)
    if scope == "fuse":
        fastsn.fuse(net)
    step = fastsn.step if scope == "step" else no_scope
    twin, x, y = copy.deepcopy(net), image(), image()
    for each in (net, twin):
        each.requires_grad_()
        total = 0.0
        for z in (x, y):
            with step(each):
                if each is net:
                    total = total + run(net, z, reentrant).square().sum()
                elif run is with_more_around:
                    total = total + (twin(z.sin()).sin() * 2).square().sum()
                else:
                    total = total + twin(z).square().sum()
        total.backward()
    compare(net, twin)


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_inside_the_step_with_several_regions(reentrant):
    net = Segments(model(), reentrant)
    twin, x = copy.deepcopy(net), image()
    twin.reentrant = None
    for each in (net, twin):
        with fastsn.step(each):
            (each(x).square().sum() + each(-x).sum()).backward()
    compare(net, twin)


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_of_an_earlier_step_inside_a_later_one(reentrant):
    net = Segments(model(), reentrant)
    twin, x = copy.deepcopy(net), image()
    twin.reentrant = None
    for each in (net, twin):
        with fastsn.step(each):
            loss = each(x).square().sum()
        with fastsn.step(each):
            loss.backward()
    compare(net, twin)


def gradients_under_autocast_agree(net: nn.Sequential, reentrant: bool, scopes: list[Scope]) -> bool:
    """Of a network that checkpoints its parts, and of one that does not, within the rounding of bfloat16."""
    checkpointed = Segments(net, reentrant)
    twin, x = copy.deepcopy(checkpointed), image()
    twin.reentrant = None
    for each in (checkpointed, twin):
        with ExitStack() as stack:
            for scope in scopes:
                stack.enter_context(scope(each))
            loss = each(x).float().square().sum()
        loss.backward()
    pairs = [(a.grad, b.grad) for a, b in zip(checkpointed.parameters(), twin.parameters(), strict=True)]
    return all(torch.allclose(a, b, rtol=0.05, atol=0.02 * float(b.abs().max())) for a, b in pairs)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scope", ["inside", "around"])
def test_autocast_and_a_step(reentrant, scope):
    def autocast(_: nn.Module) -> AbstractContextManager[object]:
        return torch.autocast(image().device.type, torch.bfloat16)

    shared = nn.Conv2d(4, 4, 3, padding=1)
    plain = nn.Sequential(shared, nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), shared)
    if not gradients_under_autocast_agree(plain, reentrant, [autocast]):
        pytest.skip("torch's own layers get wrong gradients here (2.10, reentrant)")
    scopes = [fastsn.step, autocast] if scope == "inside" else [autocast, fastsn.step]
    assert gradients_under_autocast_agree(model(), reentrant, scopes)


def test_evaluation_with_vectors_that_have_been_warmed_up_since():
    net, x = without_shared(), image()
    net(x).sum().backward()
    fastsn.warm_up(net)
    net.zero_grad()
    twin = copy.deepcopy(net).eval()
    twin(x).square().sum().backward()
    checkpoint(net.eval(), x, use_reentrant=False).square().sum().backward()
    compare(net, twin)


def test_a_checkpointed_use_in_frozen_layers():
    net = fastsn.fuse(model())
    net.requires_grad_(False)
    twin, x, y = copy.deepcopy(net), image(), image()
    y.data.copy_(x.data)
    whole(net, x, False).square().sum().backward()
    twin(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), twin.buffers(), strict=True))


def one_after_the_other(run: Run, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """No node of the graph lies between the two."""
    first, second = run(net, x), net(y)
    return first.square().sum() + second.square().sum()


def regions_that_go_on(run: Run, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    first, second = (run(lambda z: net(z).tanh(), z) for z in (x, y))
    return first.square().sum() + second.sum()


def two_forwards_in_a_region(run: Run, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return run(lambda x, y: net(x).square().sum() + net(y).tanh().sum(), x, y)


def forwards_without_a_graph(run: Run, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    first = run(net, x)
    with torch.no_grad():
        net(y)
    return first.square().sum() + run(net, y).sum()


def regions_in_regions(run: Run, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return run(lambda z: run(net, z).tanh(), x).sum() + run(lambda z: run(net, z).sin(), y).sum()


def many(run: Run, net: nn.Module, x: Tensor, y: Tensor, forwards: int = 14) -> Tensor:
    return sum(run(lambda z: net(z).tanh(), (x + y) * i / 10).sum() for i in range(1, forwards + 1))


LOSSES = [one_after_the_other, regions_that_go_on, two_forwards_in_a_region]
LOSSES += [forwards_without_a_graph, regions_in_regions, many]


def far_from_converged(net: nn.Module) -> nn.Module:
    """With vectors that every forward moves far, so that those of another forward give another gradient."""
    for buffer in net.buffers():
        buffer.copy_(nn.functional.normalize(torch.randn_like(buffer), dim=0))
    return net


@pytest.mark.parametrize("scope", ["step", "fuse", "single uses"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("reentrant", [True, False])
def test_every_region_gets_the_vectors_of_its_own_forward(scope, loss, reentrant):
    net = far_from_converged(without_shared() if loss is many else model())
    if scope == "fuse":
        fastsn.fuse(net)
    twin, points = copy.deepcopy(net), [image() for _ in range(4)]
    points[2].data.copy_(points[0].data)
    points[3].data.copy_(points[1].data)
    step = fastsn.step if scope == "step" else no_scope
    with step(net):
        found = loss(lambda f, *z: checkpoint(f, *z, use_reentrant=reentrant), net, *points[:2])
    with step(twin):
        expected = loss(lambda f, *z: f(*z), twin, *points[2:])
    found.backward()
    expected.backward()
    compare(net, twin)
    for a, b in zip(points[:2], points[2:], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_is_too_long_ago_is_reported_and_moves_no_vector(fused, reentrant, elsewhere):
    """``elsewhere``: backward runs in another thread, as it always does on a GPU."""
    net, x, y = far_from_converged(without_shared()), image(), image()
    if fused:
        fastsn.fuse(net)
    loss = many(lambda f, z: checkpoint(f, z, use_reentrant=reentrant), net, x, y, 18)
    before = [buffer.clone() for buffer in net.buffers()]
    with pytest.warns(UserWarning, match="more than 16 uses of a norm ago"), ThreadPoolExecutor(1) as thread:
        thread.submit(loss.backward).result() if elsewhere else loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_hooks_of_others_that_see_saved_tensors(reentrant):
    net = far_from_converged(Segments(model(), reentrant))
    twin, x = copy.deepcopy(net), image()
    twin.reentrant = None
    for each in (net, twin):
        with torch.autograd.graph.save_on_cpu(), fastsn.step(each):
            (each(x).square().sum() + each(-x).sum()).backward()
    compare(net, twin)


@pytest.mark.parametrize("scope", ["step", "fuse"])
def test_a_region_that_no_backward_follows_is_freed(scope):
    """By reference counts alone: the garbage collector cannot see into a graph."""
    layer = fastsn.SNLinear(3, 3)
    net = fastsn.fuse(nn.Sequential(layer)) if scope == "fuse" else nn.Sequential(layer)
    used: list[weakref.ref] = []
    layer.register_forward_hook(lambda module, *_: used.append(weakref.ref(module.normalized()[0])))
    gc.disable()
    try:
        with fastsn.step(net) if scope == "step" else nullcontext(), torch.autograd.graph.save_on_cpu():
            checkpoint(net, torch.ones(1, 3), use_reentrant=False)
            with torch.no_grad():
                layer.weight.mul_(2)
            checkpoint(net, torch.ones(1, 3), use_reentrant=False)
        assert len(used) == 2
        assert all(weight() is None for weight in used)
    finally:
        gc.enable()
