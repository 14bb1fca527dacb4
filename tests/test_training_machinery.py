"""What training loops put around a network: mixed precision, penalties, optimizers, function transforms."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.utils import parametrizations

import fastsn

HALF = [torch.bfloat16, torch.float16]


def network(dtype: torch.dtype = torch.float32, variant: str = "bssn") -> nn.Sequential:
    torch.manual_seed(3)
    scale = {"scale": 1.4} if variant == "bssn" else {}
    return nn.Sequential(
        getattr(fastsn, f"{variant.upper()}Conv2d")(1, 8, 3, dtype=dtype, **scale),
        nn.Tanh(),
        fastsn.spectral_norm(nn.Conv2d(8, 8, 3, stride=2, dtype=dtype), variant=variant, **scale),
        nn.Tanh(),
        nn.Flatten(),
        getattr(fastsn, f"{variant.upper()}Linear")(32, 1, dtype=dtype, **scale),
    )


def task(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images with and without a bright corner."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(32, 1, 7, 7, generator=draw)
    x[::2, :, :3, :3] += 1.5
    return x.to(dtype), (torch.arange(32) % 2 == 0).to(dtype)[:, None]


def state_of(model: nn.Module) -> list[Tensor]:
    return [x.clone() for x in model.buffers()]


def top(weight: Tensor, variant: str) -> float:
    """The norm that the variant divides by, by SVD."""
    w = weight.detach().double()
    out = torch.linalg.matrix_norm(w.flatten(1), 2)
    both = (out + torch.linalg.matrix_norm(w.transpose(0, 1).flatten(1), 2)) / 2
    return float(both if variant.startswith("b") and w.ndim > 2 else out)


# Mixed precision


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scaled", [True, False])
def test_training_under_autocast(dtype, scaled):
    """Loss scaling, clipping and a step around both: it learns, and sigma is that of the float32 weights."""
    model, (x, y) = network(), task()
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
    model, (x, y) = network(), task()
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
    model, (x, _) = network(), task()
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
    model, (x, y) = network().to(dtype), task(dtype)
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
    """``network(variant="sn")`` with torch's spectral_norm and the same weights and vectors."""
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
    ours = network(torch.float64, "sn")
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
    """Lazy regularisation: two backwards with an optimizer step between them."""
    model, (x, _) = network(torch.float64), task(torch.float64)
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
    ours = network(torch.float64, "sn").to(device)
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
    model, (x, _) = network(torch.float64), task(torch.float64)
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
    model, (x, y) = network(torch.float64), task(torch.float64)
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
    model, (x, _) = network(), task()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train() -> list[weakref.ref]:
        optimizer.zero_grad()
        with fastsn.step(model):
            served = model[0].normalised()[0]
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
    model, (x, _) = network(), task()

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
    assert not any(m._holds for m in model.modules() if isinstance(m, fastsn.SpectralNorm))


# Function transforms


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_of_each_sample_by_vmap_are_those_of_a_loop(mode, impl):
    """Per-sample gradients of layers (drop-ins: test_parity_with_torch). In training mode all samples share the one
    iteration of the call."""
    torch.manual_seed(0)
    layer = getattr(fastsn.BSSNConv2d(1, 4, 3, scale=1.3, dtype=torch.float64, impl=impl), mode)()
    x = task(torch.float64)[0][:5]
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    buffers = {k: b.clone() for k, b in layer.named_buffers()}

    def loss(p: dict[str, Tensor], sample: Tensor, state: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, (p, state), (sample[None],)).square().sum()

    state = {k: b.clone() for k, b in buffers.items()}
    found, values = vmap(grad_and_value(loss), (None, 0, None))(parameters, x, state)
    moved = any(not torch.equal(state[k], b) for k, b in buffers.items())
    assert moved == (mode == "train")
    for i in range(5):
        again = {k: b.clone() for k, b in buffers.items()}
        single, value = grad_and_value(loss)(parameters, x[i], again)
        torch.testing.assert_close(value, values[i])
        for name, gradient in single.items():
            torch.testing.assert_close(gradient, found[name][i], rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(again, state)


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("scope", [fastsn.step, lambda _: nullcontext()], ids=["step", "no step"])
def test_batches_of_upstream_gradients_are_a_loop(scope, create_graph):
    """By autograd.grad(is_grads_batched=True), as functional.jacobian(vectorize=True) does, and by vmap."""
    scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
    model = nn.Sequential(
        fastsn.BSSNConv2d(1, 2, 3, scale=scale, dtype=torch.float64),
        nn.Flatten(),
        fastsn.spectral_norm(nn.Linear(50, 3, dtype=torch.float64)),
    )
    parameters, x = list(model.parameters()), task(torch.float64)[0][:2]
    upstream = torch.randn(4, 2, 3, dtype=torch.float64)
    with scope(model):
        output = model(x)
    found = torch.autograd.grad(
        output, parameters, upstream, is_grads_batched=True, retain_graph=True, create_graph=create_graph
    )
    mapped = vmap(lambda g: torch.autograd.grad(output, parameters, g, retain_graph=True, create_graph=create_graph))
    for batches in (found, mapped(upstream)):
        for i in range(4):
            single = torch.autograd.grad(output, parameters, upstream[i], retain_graph=True)
            for gradient, batch in zip(single, batches, strict=True):
                torch.testing.assert_close(batch[i], gradient)
    if create_graph:
        several = torch.autograd.grad(found[0].square().sum(), parameters[0], retain_graph=True)[0]
        loop = [torch.autograd.grad(output, parameters[0], g, create_graph=True)[0].square().sum() for g in upstream]
        torch.testing.assert_close(several, torch.autograd.grad(sum(loop), parameters[0])[0])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_ensemble_by_vmap(mode):
    """Weights, u and v of several networks stacked: each has its own, and in training mode moves them."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers = (fastsn.BSSNConv2d(1, 4, 3, scale=1.3), nn.Flatten(), fastsn.SNLinear(100, 2))
        models.append(getattr(nn.Sequential(*layers), mode)())
    parameters, buffers = torch.func.stack_module_state(models)
    before = {k: b.clone() for k, b in buffers.items()}
    base, x = copy.deepcopy(models[0]), task()[0][:2]
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    assert any(not torch.equal(b, before[k]) for k, b in buffers.items()) == (mode == "train")
    for i, model in enumerate(models):
        torch.testing.assert_close(outputs[i], model(x), rtol=1e-5, atol=1e-6)
        for name, vector in model.named_buffers():
            torch.testing.assert_close(buffers[name][i], vector)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own rules of forward mode
@pytest.mark.parametrize("kind", ["layer", "drop-in"])
def test_forward_mode_in_training_holds_u_and_v_constant(kind):
    """Like reverse mode; torch's spectral_norm raises here. Hessians are forward over reverse."""
    torch.manual_seed(0)
    layer = fastsn.BSSNConv1d(2, 3, 2, scale=1.2) if kind == "layer" else fastsn.spectral_norm(nn.Conv1d(2, 3, 2))
    layer.double()
    parameters, x = {k: p.detach() for k, p in layer.named_parameters()}, torch.randn(4, 2, 5, dtype=torch.float64)

    def loss(p: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, (p, state), (x,)).square().sum()

    found, states = [], []
    for first, second in ((torch.func.jacfwd, torch.func.jacrev), (torch.func.jacrev, torch.func.jacrev)):
        states.append({k: b.clone() for k, b in layer.named_buffers()})
        found.append(first(lambda p: loss(p, states[-1]))(parameters))
        found.append(first(second(lambda p: loss(p, {k: b.clone() for k, b in layer.named_buffers()})))(parameters))
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[3])
    torch.testing.assert_close(*states)
    assert all(not torch.equal(b, states[0][k]) for k, b in layer.named_buffers())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own rules of forward mode
def test_grad_of_grad_and_hessian_vector_products():
    """A step of descent is differentiated through (MAML); forward over reverse gives the same curvature."""
    model = network(torch.float64).eval()
    parameters, (x, y) = {k: p.detach() for k, p in model.named_parameters()}, task(torch.float64)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(functional_call(model, p, (x,)), y)

    def after(p: dict[str, Tensor]) -> Tensor:
        inner = grad(loss)(p)
        return loss({k: p[k] - 0.1 * inner[k] for k in p})

    leaves = {k: p.clone().requires_grad_() for k, p in parameters.items()}
    first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    stepped = {k: p - 0.1 * g for (k, p), g in zip(leaves.items(), first, strict=True)}
    expected = torch.autograd.grad(loss(stepped), list(leaves.values()), retain_graph=True)
    for ours, theirs in zip(grad(after)(parameters).values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    direction = {k: torch.randn_like(p) for k, p in parameters.items()}
    _, forward = torch.func.jvp(grad(loss), (parameters,), (direction,))
    inner = sum((g * direction[k]).sum() for k, g in zip(leaves, first, strict=True))
    for ours, theirs in zip(forward.values(), torch.autograd.grad(inner, list(leaves.values())), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("where", ["step outside", "step inside"])
def test_function_transforms_and_steps(where):
    model = network(torch.float64)
    twin = copy.deepcopy(model)
    parameters, (x, y) = {k: p.detach() for k, p in model.named_parameters()}, task(torch.float64)

    def loss(p: dict[str, Tensor]) -> Tensor:
        with fastsn.step(model) if where == "step inside" else nullcontext():
            return nn.functional.binary_cross_entropy_with_logits(functional_call(model, p, (x,)), y)

    with fastsn.step(model) if where == "step outside" else nullcontext():
        found = grad(loss)(parameters)
    with fastsn.step(twin):
        nn.functional.binary_cross_entropy_with_logits(twin(x), y).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    torch.testing.assert_close(state_of(model), state_of(twin))
