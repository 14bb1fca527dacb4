"""``fastsn.recompute`` gives each use in a checkpointed region its vectors again, whatever came between."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fastsn
from fastsn import recomputation
from regions import (
    FORWARDS,
    LOSSES,
    SCOPES,
    Run,
    backward,
    by_name,
    compare,
    compare_points,
    exact,
    far_from_converged,
    image,
    model,
    network_for,
    one_after_the_other,
    plain,
    recorded,
    regions_in_regions_in_regions,
    regions_that_go_on,
    segments,
    stacked,
    two_forwards_in_a_region,
    whole,
    with_twin,
    without_shared,
)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("loss", LOSSES, **by_name)
def test_recompute_gives_every_use_the_vectors_of_its_forward(loss, scope):
    exact(model(), loss, scope)


@pytest.mark.parametrize("scope", ["step without advance", "fuse", "single uses"])
@pytest.mark.parametrize("loss", [regions_that_go_on, regions_in_regions_in_regions], **by_name)
def test_recompute_of_the_reference_and_in_another_thread(loss, scope):
    exact(model("reference"), loss, scope, elsewhere=True)


@pytest.mark.parametrize("scope", ["fuse", "single uses"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_region_that_is_recorded_in_one_that_is_not(reentrant, scope):
    """The one around runs with the stored vectors, and the one inside with the same."""
    net = far_from_converged(without_shared())
    twin, points, others = with_twin(net)
    with SCOPES[scope](net), SCOPES[scope](twin):
        loss = checkpoint(lambda z: whole(recorded, net, z) * z.mean(), *points, use_reentrant=reentrant)
        backward(loss, net)
        (whole(plain, twin, *others) * others[0].mean()).backward()
    compare(net, twin)
    compare_points(points, others)


def penalty_in_a_region_that_is_not_recorded(run: Run, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What it runs again are no uses of the region around, whose thread it is in only the second time, as on a GPU."""
    inner = plain if run is plain else partial(checkpoint, use_reentrant=False)
    backwards = iter(["in another thread", "here"])

    def region(z: Tensor) -> Tensor:
        y, gradient_of = inner(net, z).tanh().sum(), partial(torch.autograd.grad, retain_graph=True)
        with ThreadPoolExecutor(1) as thread:
            elsewhere = next(backwards) != "here"
            (gradient,) = thread.submit(gradient_of, y, z).result() if elsewhere else gradient_of(y, z)
        return net[:4](z).tanh().sum() + (gradient * z).sum()

    return run(region, x) + run(net, y).square().sum()


def test_a_region_that_is_not_recorded_and_its_backward_in_one_that_is():
    exact(without_shared(), penalty_in_a_region_that_is_not_recorded, "step")


def twice(region: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda run, net, x, y: region(run, net, x) + region(run, net, y)


@pytest.mark.parametrize("scope", ["step without advance", "fuse", "single uses"])
@pytest.mark.parametrize("region", [*FORWARDS, segments], **by_name)
def test_recompute_of_segments(region, scope):
    exact(network_for(region), twice(region), scope)


def a_step_in_the_region(run: Run, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def region(z: Tensor) -> Tensor:
        with fastsn.step(net):
            return net(z).tanh() + net(-z)

    return run(region, x).sum() + run(region, y).square().sum()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("loss", "make"),
    [(two_forwards_in_a_region, stacked), (a_step_in_the_region, model), (a_step_in_the_region, stacked)],
)
def test_recompute_of_stacked_norms_and_of_steps_in_the_region(loss, make, scope):
    exact(make(), loss, scope)


@pytest.mark.parametrize("scope", ["step", "fuse", "single uses"])
def test_recompute_inside_a_later_step_and_after_it(scope):
    net = far_from_converged(model())
    twin, points, others = with_twin(net, 2)
    for each, run, (x, y) in ((net, recorded, points), (twin, plain, others)):
        with SCOPES[scope](each):
            first, second = whole(run, each, x), whole(run, each, y)
        with fastsn.step(each):
            first.backward()
            each(y)
        if scope != "step":  # where both went through one graph
            second.backward()
    compare(net, twin)


def test_recompute_in_evaluation_with_vectors_that_are_warmed_up_before_the_backward():
    net = far_from_converged(model()).eval()
    twin, points, others = with_twin(net)
    for each, run, (x,) in ((net, recorded, points), (twin, plain, others)):
        loss = whole(run, each, x)
        fastsn.warm_up(each)
        loss.backward()
    compare(net, twin)


@pytest.mark.parametrize("frozen", [0, 2, 7])
def test_recompute_of_frozen_layers(frozen):
    net = far_from_converged(without_shared())
    net[frozen].weight.requires_grad_(False) if frozen != 2 else net[2].requires_grad_(False)
    twin, points, others = with_twin(net, 2)
    for each, run, (x, y) in ((net, recorded, points), (twin, plain, others)):
        (whole(run, each, x) + whole(run, each, y)).backward()
    compare_points(points, others)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad)
    torch.testing.assert_close(*[[p.grad for p in each.parameters() if p.requires_grad] for each in (net, twin)])


def test_a_graph_that_is_kept_is_run_again_twice():
    net = far_from_converged(model())
    twin, points, others = with_twin(net, 2)
    for each, run, (x, y) in ((net, recorded, points), (twin, plain, others)):
        loss = whole(run, each, x) + whole(run, each, y)
        for _ in range(2):
            loss.backward(retain_graph=True)
    compare(net, twin)


@pytest.mark.parametrize("scope", ["fuse", "single uses"])
def test_recompute_in_two_threads_at_once(scope):
    nets = [far_from_converged(model()) for _ in range(2)]
    pairs = [(net, *with_twin(net, 2)) for net in nets]
    together = Barrier(2)

    def train(net: nn.Module, x: Tensor, y: Tensor) -> None:
        own = threading.get_ident()

        def region(z: Tensor) -> Tensor:
            if threading.get_ident() == own:  # a GPU has one thread for all backwards
                together.wait(20)  # both are in their regions, in both runs
            return net(z)

        with SCOPES[scope](net):
            (recorded(region, x).square().sum() + recorded(region, y).square().sum()).backward()

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(train, net, *points) for net, _, points, _ in pairs]:
            done.result()
    for net, twin, points, others in pairs:
        with SCOPES[scope](twin):
            twice(whole)(plain, twin, *others).backward()
        compare(net, twin)
        compare_points(points, others)


@pytest.mark.parametrize("run", [*(partial(checkpoint, use_reentrant=r) for r in (True, False)), recorded])
def test_hooks_of_others_that_see_saved_tensors(run):
    net = far_from_converged(model())
    twin, points, others = with_twin(net, 2)
    for each, own_run, (x, y) in ((net, run, points), (twin, plain, others)):
        with torch.autograd.graph.save_on_cpu(), fastsn.step(each):
            (segments(own_run, each, x) + segments(own_run, each, y)).backward()
    compare(net, twin)


def test_a_region_that_uses_other_norms_when_it_runs_again():
    net, norms = without_shared(), iter([0, 2])
    loss = recorded(lambda x: net[next(norms)](x), image()).sum()
    with pytest.raises(RuntimeError, match="must use the same norms in the same order when it runs again"):
        loss.backward()
    assert nothing_left()


def test_a_region_that_uses_more_norms_when_it_runs_again():
    net, counts = without_shared(), iter([1, 2])
    with set_checkpoint_early_stop(False):
        loss = recorded(lambda x: net[0](net[0](x) if next(counts) == 2 else x), image()).square().sum()
    with pytest.raises(RuntimeError, match="must use the same norms in the same order when it runs again"):
        loss.backward()


def nothing_left() -> bool:
    state = recomputation.state
    return not state.active and state.recording == () and state.replaying is None


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_exception_in_a_region_leaves_nothing_behind(at, kind):
    """In its forward, in one around it, or when it runs again."""
    net, runs, x = fastsn.fuse(far_from_converged(model())), iter(range(1, 4)), image()

    def region(z: Tensor) -> Tensor:
        y = net(z)
        if next(runs) == at:
            raise kind
        return y.sin()

    with pytest.raises(kind):
        (
            recorded(lambda z: recorded(region, z), x) if at == 1 else recorded(region, recorded(region, x).mean() * x)
        ).sum().backward()
    assert nothing_left()
    exact(net, one_after_the_other, "fuse")


@contextmanager
def no_garbage_collector() -> Iterator[None]:
    """Which cannot see into a graph: what it would free is freed by reference counts alone."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("run", [partial(checkpoint, use_reentrant=False), recorded])
@pytest.mark.parametrize("scope", ["step", "fuse", "single uses"])
@pytest.mark.parametrize("hooks", [nullcontext, torch.autograd.graph.save_on_cpu])
def test_a_region_that_no_backward_follows_is_freed(hooks, scope, run):
    net = nn.Sequential(fastsn.SNLinear(3, 3))
    used: list[weakref.ref[Tensor]] = []
    net[0].register_forward_hook(lambda *of: used.append(weakref.ref(of[2])))
    if scope != "single uses":
        net[0].register_forward_hook(lambda module, *_: used.append(weakref.ref(module.normalized()[0])))

    with no_garbage_collector():
        with SCOPES[scope](net), hooks():
            run(net, torch.ones(1, 3))
            with torch.no_grad():
                net[0].weight.mul_(2)
            run(net, torch.ones(1, 3))
        assert len(used) == (2 if scope == "single uses" else 4)
        assert all(weight() is None for weight in used)


def test_what_is_recorded_is_freed_with_the_graph():
    contexts: list[weakref.ref[object]] = []

    def watched() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        made = fastsn.recompute()
        contexts.extend(weakref.ref(context) for context in made)
        return made

    net = fastsn.fuse(model())
    with no_garbage_collector():
        loss = checkpoint(net, image(), use_reentrant=False, context_fn=watched).sum()
        assert contexts[1]() is not None
        del loss
        assert [context() for context in contexts] == [None, None]
