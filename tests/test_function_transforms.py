"""torch.func over layers, drop-ins and steps: per-sample gradients, ensembles, higher and forward-mode derivatives."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

import fastsn
from networks import discriminator, state, task


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
    model = discriminator(torch.float64).eval()
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
    model = discriminator(torch.float64)
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
    torch.testing.assert_close(state(model), state(twin))
