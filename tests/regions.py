"""Networks in regions of activation checkpointing, and what they are compared with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastsn
from networks import moved, state

Run = Callable[..., Tensor]
recorded: Run = partial(checkpoint, use_reentrant=False, context_fn=fastsn.recompute)


def plain(f: Callable[..., Tensor], *x: Tensor) -> Tensor:
    """What a region is compared with."""
    return f(*x)


def model(impl: str = "auto") -> nn.Sequential:
    """One layer is used twice; two share a scale that is learnt."""
    scale = nn.Parameter(torch.tensor(1.4))
    shared = fastsn.BSSNConv2d(4, 4, 3, padding=1, scale=scale, impl=impl)
    convolution = fastsn.spectral_norm(nn.Conv2d(4, 4, 3, padding=1), impl=impl)
    last = fastsn.SSNLinear(100, 3, scale=scale, impl=impl)
    return nn.Sequential(shared, nn.Tanh(), convolution, nn.Tanh(), shared, nn.Flatten(), nn.Tanh(), last)


def without_shared() -> nn.Sequential:
    net = model()
    net[4] = fastsn.BSNConv2d(4, 4, 3, padding=1)
    return net


def image() -> Tensor:
    return torch.randn(2, 4, 5, 5, requires_grad=True)


def far_from_converged(net: nn.Module) -> nn.Module:
    """With vectors that every forward moves far, so that those of another forward give another gradient."""
    for name, buffer in net.named_buffers():
        if "scale" not in name:
            buffer.copy_(nn.functional.normalize(torch.randn_like(buffer), dim=0))
    return net


def with_twin(net: nn.Module, points: int = 1) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A copy of the model, and two times the same inputs."""
    own = [image() for _ in range(points)]
    return copy.deepcopy(net), own, [x.detach().clone().requires_grad_() for x in own]


def compare(net: nn.Module, twin: nn.Module) -> None:
    for (name, a), b in zip(net.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert b.grad.abs().sum() > 0
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(b.grad.abs().max()), msg=name)


def compare_points(own: list[Tensor], others: list[Tensor]) -> None:
    for x, y in zip(own, others, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


def backward(loss: Tensor, net: nn.Module, elsewhere: bool = False) -> None:
    """Moves no vector. ``elsewhere``: in another thread, as it always runs on a GPU."""
    before = state(net)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(loss.backward).result() if elsewhere else loss.backward()
    assert moved(before, net) == set()


SCOPES: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    "step": fastsn.step,
    "step without advance": partial(fastsn.step, advance=False),
    "fuse": lambda net: nullcontext(fastsn.fuse(net)),
    "single uses": lambda _: nullcontext(),
}


def whole(run: Run, net: nn.Module, x: Tensor) -> Tensor:
    return run(net, x).square().sum()


def with_more_around(run: Run, net: nn.Module, x: Tensor) -> Tensor:
    return run(lambda x: net(x.sin()).sin() * 2, x).square().sum()


def segments(run: Run, net: nn.Sequential, x: Tensor) -> Tensor:
    for part in (net[:3], net[3:5], net[5:]):
        x = run(part, x)
    return x.square().sum()


class ItsOwnSegments(nn.Module):
    """A network that checkpoints its own parts."""

    def __init__(self, net: nn.Sequential, run: Run) -> None:
        super().__init__()
        self.net, self.run = net, run

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.net[:3], self.net[3:5], self.net[5:]):
            x = self.run(part, x)
        return x


def segments_of_its_own(run: Run, net: nn.Module, x: Tensor) -> Tensor:
    net.run = run
    return net(x).square().sum()


def torchs_segments(run: Run, net: nn.Module, x: Tensor) -> Tensor:
    if run is plain:
        return net(x).square().sum()
    return checkpoint_sequential(list(net), 3, x, **run.keywords).square().sum()


FORWARDS = [whole, with_more_around, segments_of_its_own]
REGIONS = [*FORWARDS, segments, torchs_segments]
by_name = {"ids": lambda f: f.__name__}


def network_for(region: Callable[..., Tensor], shared: bool = True) -> nn.Module:
    net = far_from_converged(model() if shared else without_shared())
    return ItsOwnSegments(net, plain) if region is segments_of_its_own else net


def stacked() -> nn.Sequential:
    """Norms behind other norms and behind what is not one, in parametrizations and in a layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has a spectral norm already")
        first = fastsn.spectral_norm(fastsn.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), variant="bssn", scale=1.2)
        second = fastsn.spectral_norm(parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)))
        third = fastsn.SNLinear(100, 3)
        fastsn.spectral_norm(third)
    fastsn.spectral_norm(third, "bias")
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), third)


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


def regions_in_regions_in_regions(run: Run, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return run(lambda z: run(lambda z: run(net, z).tanh() + net(-z), z).sin(), x).sum() + net(y).square().sum()


def penalty_in_a_region(run: Run, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A backward inside the region, through regions in it: its uses are not those of the region."""

    def region(z: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(run(net, z).tanh().sum(), z, retain_graph=True)
        return net(z).tanh().sum() + (gradient * z).sum()

    return run(region, x) + run(net, y).square().sum()


def many(run: Run, net: nn.Module, x: Tensor, y: Tensor, forwards: int = 14) -> Tensor:
    return sum(run(lambda z: net(z).tanh(), (x + y) * i / 10).sum() for i in range(1, forwards + 1))


LOSSES = [one_after_the_other, regions_that_go_on, two_forwards_in_a_region, forwards_without_a_graph]
LOSSES += [regions_in_regions, regions_in_regions_in_regions, penalty_in_a_region, many]


def exact(net: nn.Module, loss: Callable[..., Tensor], scope: str, elsewhere: bool = False) -> None:
    """Gradients and vectors are those without checkpointing."""
    if scope == "fuse":
        fastsn.fuse(net)
    twin, points, others = with_twin(far_from_converged(net), 2)
    with SCOPES[scope](net):
        found = loss(recorded, net, *points)
    with SCOPES[scope](twin):
        expected = loss(plain, twin, *others)
    backward(found, net, elsewhere)
    expected.backward()
    compare(net, twin)
    compare_points(points, others)
