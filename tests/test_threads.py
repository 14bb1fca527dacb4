"""Threads that train at once get, to the bit, what they get one after the other."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastsn
from conftest import ON
from fastsn import weight_cache
from networks import batch, moved, network, replica, state
from regions import Run, far_from_converged, plain, recorded

PATIENCE = 60  # seconds, for a thread that waits for another


@pytest.fixture(autouse=True)
def _threads_change_all_the_time() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """What each gives, in a thread of its own; all begin together."""
    begin, device = Barrier(len(jobs)), torch.get_default_device()  # a thread has a default device of its own

    def work(job: Callable[[], Any]) -> Any:
        begin.wait(PATIENCE)
        with device if ON == "cuda" else nullcontext():
            return job()

    with ThreadPoolExecutor(len(jobs)) as threads:
        return [done.result() for done in [threads.submit(work, job) for job in jobs]]


def one_by_one(*jobs: Callable[[], Any]) -> list[Any]:
    return [job() for job in jobs]


def assert_same(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for own, others in zip(found, expected, strict=True):
        for a, b in zip(own, others, strict=True):
            assert torch.equal(a, b)


def model(impl: str = "auto") -> nn.Sequential:
    """One layer is used twice; two share a scale that is learnt."""
    scale = nn.Parameter(torch.tensor(1.3))
    shared = fastsn.BSSNConv2d(2, 2, 3, padding=1, scale=scale, impl=impl)
    dropin = fastsn.spectral_norm(nn.Conv2d(2, 2, 3, padding=1), variant="bsn", impl=impl)
    last = fastsn.SSNLinear(72, 1, scale=scale, impl=impl)
    return far_from_converged(nn.Sequential(shared, nn.Tanh(), dropin, nn.Tanh(), shared, nn.Flatten(), last))


def train(net: nn.Module, scope: str, run: Run, steps: int = 4) -> list[Tensor]:
    """The losses, the weights and the vectors."""
    draw = torch.Generator(torch.get_default_device()).manual_seed(1)
    losses = []
    for _ in range(steps):
        real, fake = (torch.randn(2, 2, 6, 6, generator=draw, requires_grad=True) for _ in range(2))
        with fastsn.step(net) if scope == "step" else nullcontext():
            loss = run(net, real).square().sum() - run(net, fake).tanh().sum()
            if run not in (plain, recorded):  # such regions get their vectors again inside of the step
                loss.backward()
        if run in (plain, recorded):
            loss.backward()
        with fastsn.step(net, advance=False) if scope == "step" else nullcontext():
            losses += [loss.detach(), run(net, real).mean().detach()]
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.01 * p.grad
                p.grad = None
    return [*losses, *net.state_dict().values()]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("run", [plain, partial(checkpoint, use_reentrant=False), recorded])
@pytest.mark.parametrize("scope", ["step", "fuse", "single uses"])
def test_copies_of_a_model(scope, run, impl):
    first = fastsn.fuse(model(impl)) if scope == "fuse" else model(impl)
    nets = [first, copy.deepcopy(first), fastsn.fuse(model(impl)) if scope == "fuse" else model(impl)]
    twins = [copy.deepcopy(net) for net in nets]
    found = at_once(*(partial(train, net, scope, run) for net in nets))
    assert_same(found, one_by_one(*(partial(train, twin, scope, run) for twin in twins)))


def uses(net: nn.Module, scope: Callable[[], Any], x: Tensor, meet: Callable[[], object]) -> list[Tensor]:
    """Outputs and gradients of some blocks of two forwards."""
    made = []
    for _ in range(3):
        with scope():
            meet()
            first = net(x)
            meet()
            loss = first.square().sum() + net(-x).sum()
            meet()
        made += [first.detach(), *torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])]
    return made


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("scopes", ["step step", "fuse fuse", "fuse step", "step fuse"])
def test_one_model_in_evaluation(scopes, impl):
    """Each has a graph of its own, although they are in the same layers at the same time."""
    net, x = model(impl).eval(), batch()
    if "fuse" in scopes:
        fastsn.fuse(net)
    enter = {"step": partial(fastsn.step, net), "fuse": nullcontext}
    jobs = [partial(uses, net, enter[scope], x) for scope in scopes.split()]
    meet = partial(Barrier(2).wait, PATIENCE)
    assert_same(at_once(*(partial(job, meet) for job in jobs)), one_by_one(*(partial(job, int) for job in jobs)))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_one_model_in_steps_without_advance(impl):
    net, x = model(impl), batch()
    before = state(net)
    job = partial(uses, net, partial(fastsn.step, net, advance=False), x)
    meet = partial(Barrier(2).wait, PATIENCE)
    assert_same(at_once(partial(job, meet), partial(job, meet)), one_by_one(partial(job, int), partial(job, int)))
    assert moved(before, net) == set()


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    loss = net(x).square().sum() + net(-x).sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("fused", [False, True])
def test_one_model_in_steps_that_begin_one_after_the_other_and_last_at_once(fused, impl):
    """Each uses the vectors of its own step until that ends; the one that has begun last ends first."""
    net, x = fastsn.fuse(model(impl)) if fused else model(impl), batch()
    twin = copy.deepcopy(net)
    begun, used, ended = (partial(Barrier(2).wait, PATIENCE) for _ in range(3))
    first_begun = partial(Barrier(2).wait, PATIENCE)

    def begins_first() -> list[Tensor]:
        with fastsn.step(net):
            first_begun()
            begun()
            found = outputs(net, x)
            used()
            ended()
            return [*found, *outputs(net, x)]

    def ends_first() -> list[Tensor]:
        first_begun()
        with fastsn.step(net):
            begun()
            found = outputs(net, x)
            used()
        ended()
        return found

    def alone(times: int) -> list[Tensor]:
        with fastsn.step(twin):
            return [made for _ in range(times) for made in outputs(twin, x)]

    assert_same(at_once(begins_first, ends_first), one_by_one(partial(alone, 2), partial(alone, 1)))
    assert moved(state(net), twin) == set()


def test_uses_without_a_step_while_steps_of_another_thread_begin_and_end():
    net = nn.Sequential(fastsn.SNLinear(4, 4), fastsn.spectral_norm(nn.Linear(4, 2))).eval()
    x = torch.randn(1, 4)
    with torch.no_grad():
        expected = net(x)

    @torch.no_grad()
    def steps() -> list[Tensor]:
        for _ in range(300):
            with fastsn.step(net):
                pass
        return []

    @torch.no_grad()
    def forwards() -> list[Tensor]:
        return [net(x) for _ in range(300)]

    _, found = at_once(steps, forwards)
    assert all(torch.equal(y, expected) for y in found)


def test_a_step_of_another_thread_that_ends_while_a_use_looks_for_it(monkeypatch):
    layer, x = fastsn.SNLinear(4, 4).eval(), torch.randn(1, 4)
    expected, step, active_entry = layer(x), fastsn.step(layer), weight_cache.active_entry
    at_once(step.__enter__)

    def ends_first(*given: Any) -> Any:
        step.__exit__(None, None, None)
        return active_entry(*given)

    monkeypatch.setattr(weight_cache, "active_entry", ends_first)
    assert torch.equal(layer(x), expected)


def test_steps_of_other_threads_that_end_while_a_use_looks_for_its_own(monkeypatch):
    """What is ahead of its own entry goes, so that the rest of the list moves up."""
    net = model()
    norm, in_this_thread = net[0].spectral_norm, weight_cache._in_this_thread
    ends = [threading.Event() for _ in range(3)]
    begun = [threading.Event() for _ in range(3)]

    def step(i: int) -> None:
        with fastsn.step(net, advance=False):
            begun[i].set()
            ends[i].wait(PATIENCE)

    with ThreadPoolExecutor(3) as threads:
        ended, asked_for = [], []

        def begin(i: int) -> None:
            ended.append(threads.submit(step, i))
            begun[i].wait(PATIENCE)

        def asked(entry: Any) -> bool:
            asked_for.append(entry)
            if len(asked_for) == 2:  # the newest was asked for first, and is again as one of all
                for i in (0, 1):
                    ends[i].set()
                    ended[i].result()
            return in_this_thread(entry)

        begin(0)
        begin(1)
        with fastsn.step(net, advance=False):
            own = norm.cached[-1]
            begin(2)
            monkeypatch.setattr(weight_cache, "_in_this_thread", asked)
            try:
                assert weight_cache.active_entry(norm.cached, compiling=False) is own
            finally:
                monkeypatch.undo()
                ends[2].set()


@pytest.mark.parametrize("evaluation", [True, False])
def test_threads_that_are_the_first_to_use_a_model(evaluation):
    """Each finds out for itself what there is to call, or takes what the other has found."""
    for seed in range(5):
        torch.manual_seed(seed)
        net, x = network().train(not evaluation), batch()
        twin = copy.deepcopy(net)
        found = at_once(*[partial(uses, net, partial(fastsn.step, net, advance=False), x, int)] * 3)
        assert_same(found, [uses(twin, partial(fastsn.step, twin, advance=False), x, int)] * 3)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("scope", ["step", "fuse", "single uses"])
@pytest.mark.parametrize("run", [plain, recorded])
def test_replicas(run, scope, impl):
    """Several iterations, as of DataParallel: the model has been used, the replicas are new each time."""
    net = fastsn.fuse(model(impl)) if scope == "fuse" else model(impl)
    twin = copy.deepcopy(net)
    inputs, every_gradient = [batch() for _ in range(3)], []

    def iterations(net: nn.Module, execute: Callable[..., list[Any]]) -> list[Tensor]:
        found = []
        for _ in range(3):
            with fastsn.step(net) if scope == "step" else nullcontext():
                replicas = [replica(net, own_buffers=i > 0) for i in range(3)]
                made = execute(*(partial(run, each, x) for each, x in zip(replicas, inputs, strict=True)))
                loss = sum(y.square().sum() for y in made)
                gradients = torch.autograd.grad(loss, list(net.parameters()))
            every_gradient.append(gradients)
            found += [*(y.detach() for y in made), *(b.clone() for b in net.buffers())]
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(1.1).add_(0.01)
        return found

    assert_same([iterations(net, at_once)], [iterations(twin, one_by_one)])
    # In which order torch adds up the gradients of replicas depends on their threads.
    torch.testing.assert_close(every_gradient[:3], every_gradient[3:])
