"""What training loops put around a network: penalties, optimizers, accumulation; and what they must not hold."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastsn
from networks import discriminator, task


def state_of(model: nn.Module) -> list[Tensor]:
    return [x.clone() for x in model.buffers()]


# Penalties


def wgan_gp(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()


def r1(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return 5 * slope.square().flatten(1).sum(1).mean()


def torchs(model: nn.Module) -> nn.Sequential:
    """``discriminator(variant="sn")`` with torch's spectral_norm and the same weights and vectors."""
    wrap = parametrizations.spectral_norm
    dtype = next(model.parameters()).dtype
    theirs = nn.Sequential(
        wrap(nn.Conv2d(1, 8, 3, dtype=dtype)),
        nn.Tanh(),
        wrap(nn.Conv2d(8, 8, 3, stride=2, dtype=dtype)),
        nn.Tanh(),
        nn.Flatten(),
        wrap(nn.Linear(32, 1, dtype=dtype)),
    )
    state = {}
    for name, value in model.state_dict().items():
        if ".parametrizations." not in name:
            name = name.replace(".weight", ".parametrizations.weight.original")
            name = name.replace(".spectral_norm.", ".parametrizations.weight.0.")
        state[name] = value
    theirs.load_state_dict(state)
    return theirs


def by_torchs_name(model: nn.Module, theirs: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    pairs = {}
    for name, parameter in theirs.named_parameters():
        ours = name if name.startswith("2.") else name.replace("parametrizations.weight.original", "weight")
        pairs[name] = (dict(model.named_parameters())[ours], parameter)
    assert len(pairs) == len(list(model.parameters()))
    return pairs


@pytest.mark.parametrize("inside", ["step", "evaluation", "training"])
@pytest.mark.parametrize("penalty", [wgan_gp, r1])
def test_penalties_are_those_of_torchs_spectral_norm(penalty, inside):
    """Value and gradients of the parameters, together with a hinge loss. In a step the penalty sees the W̄ of the
    loss; torch's way to that is parametrize.cached()."""
    ours = discriminator(torch.float64, "sn")
    theirs = torchs(ours)
    x, y = task(torch.float64)[0].split(16)
    if inside == "evaluation":
        ours.eval(), theirs.eval()
    results = []
    for model in (ours, theirs):
        with {ours: fastsn.step, theirs: once}[model](model) if inside == "step" else nullcontext():
            value = penalty(model, x)
            loss = torch.relu(1 - model(x)).mean() + torch.relu(1 + model(y)).mean() + value
            loss.backward()
        results.append((value.detach(), loss.detach()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=0)
    assert float(results[0][0]) > 0.1
    for name, (mine, parameter) in by_torchs_name(ours, theirs).items():
        torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(state_of(ours), state_of(theirs))


def once(_: nn.Module):
    return torch.nn.utils.parametrize.cached()


@pytest.mark.parametrize("penalty", [wgan_gp, r1])
def test_a_penalty_after_the_step_that_made_the_loss_uses_vectors_of_its_own(penalty):
    """Lazy regularization: two backwards with an optimizer step between them."""
    model, (x, _) = discriminator(torch.float64), task(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with fastsn.step(model):
            model(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        twin = copy.deepcopy(model)
        with fastsn.step(model):
            penalty(model, x).backward()
        with fastsn.step(twin):
            pass
        penalty(twin.eval(), x).backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)  # a last bias does not change slopes
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad)
        optimizer.step()


# Optimizers


OPTIMIZERS = {
    "SGD with weight decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "Adam fused, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
    "AdamW capturable": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, capturable=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_do_to_fastsn_what_they_do_to_torch(kind):
    if "capturable" in kind and not torch.cuda.is_available():
        pytest.skip("capturable optimizers want weights on a GPU")
    device = "cuda" if "capturable" in kind else None
    ours = discriminator(torch.float64, "sn").to(device)
    theirs = torchs(ours).to(device)
    x, y = (t.to(device) for t in task(torch.float64))
    optimizers = [OPTIMIZERS[kind](m.parameters()) for m in (ours, theirs)]
    start = [p.detach().clone() for p in ours.parameters()]
    for _ in range(20):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
            optimizer.step()
    for name, (mine, parameter) in by_torchs_name(ours, theirs).items():
        torch.testing.assert_close(mine, parameter, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(state_of(ours), state_of(theirs), rtol=1e-6, atol=1e-9)
    assert all(float((a - b.detach()).abs().max()) > 1e-3 for a, b in zip(start, ours.parameters(), strict=True))


# torch does not count what its fused optimizers change, so that nobody can see it inside a step: step's docstring.
SEEN = [
    (kind, where) for kind in OPTIMIZERS for where in ("inside", "between") if "fused" not in kind or where != "inside"
]


@pytest.mark.parametrize(("kind", "where"), [pair for pair in SEEN if "capturable" not in pair[0]])
def test_an_optimizers_step_is_seen_by_later_uses(kind, where):
    model, (x, _) = discriminator(torch.float64), task(torch.float64)
    optimizer = OPTIMIZERS[kind](model.parameters())
    with fastsn.step(model):
        before = model(x)
        before.mean().backward()
        if where == "inside":
            optimizer.step()
            after, fresh = model(x), copy.deepcopy(model)
    if where == "between":
        optimizer.step()
        with fastsn.step(model):
            after, fresh = model(x), copy.deepcopy(model)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh.eval()(x))


def test_accumulated_gradients_in_one_step_and_over_several():
    """Inside one step parts of a batch add up to the batch. Over several steps each has its own vectors."""
    model, (x, y) = discriminator(torch.float64), task(torch.float64)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    criterion = nn.functional.binary_cross_entropy_with_logits
    with fastsn.step(model):
        for part, wanted in zip(x.split(8), y.split(8), strict=True):
            (criterion(model(part), wanted) / 4).backward(retain_graph=True)
    with fastsn.step(twin):
        criterion(twin(x), y).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)

    sums = [torch.zeros_like(p) for p in third.parameters()]
    apart = copy.deepcopy(third)
    for part, wanted in zip(x.split(8), y.split(8), strict=True):
        with fastsn.step(third):
            (criterion(third(part), wanted) / 4).backward()
        with fastsn.step(apart):
            found = torch.autograd.grad(criterion(apart(part), wanted) / 4, list(apart.parameters()))
        sums = [a + b for a, b in zip(sums, found, strict=True)]
    for ours, total in zip(third.parameters(), sums, strict=True):
        torch.testing.assert_close(ours.grad, total)


# Memory


def test_steps_of_a_network_hold_no_graph():
    """After a step its outputs, its W̄ and every tensor of its graph are gone, without the garbage collector for the
    outputs; 200 steps with two uses, a penalty and an optimizer hold no more than one."""
    model, (x, _) = discriminator(), task()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train() -> list[weakref.ref]:
        optimizer.zero_grad()
        with fastsn.step(model):
            served = model[0].normalized()[0]
            output = model(x[:4])
            loss = output.mean() - model(x[4:8]).mean() + r1(model, x[:4])
            held = [weakref.ref(t) for t in (served, output, loss)]
            loss.backward()
        optimizer.step()
        with fastsn.step(model, advance=False):
            held.append(weakref.ref(model(x[:4])))
        return held

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for _ in range(20):  # vectors of the last 16 are kept for checkpointed regions
        train()
    before = tensors()
    gc.disable()
    try:
        assert all(ref() is None for ref in train())
    finally:
        gc.enable()
    for _ in range(200):
        train()
    assert tensors() <= before


def test_a_step_that_fails_half_way_holds_nothing():
    model, (x, _) = discriminator(), task()

    def attempt() -> weakref.ref:
        output = None
        try:
            with fastsn.step(model):
                output = model(x)
                raise KeyError("a batch that was not there")
        except KeyError:
            return weakref.ref(output)

    held = attempt()
    gc.collect()
    assert held() is None
    assert not any(m.cached for m in model.modules() if isinstance(m, fastsn.SpectralNorm))
