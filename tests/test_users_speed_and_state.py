"""What users of spectral norms suffer from, row by row: speed, autograd, state. Each test is the remedy."""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook
from torch.utils.checkpoint import checkpoint

import fastsn
from dispatched import Counted, needs_kernels
from op_calls import call
from shapes import drawn

TORCH = parametrizations.spectral_norm
IMPLS = ["reference", "auto"]
WRAPPERS = {"torch": TORCH, "fastsn": fastsn.spectral_norm}


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def convolutions(count: int, wrap=fastsn.spectral_norm) -> nn.Sequential:
    return nn.Sequential(*(wrap(nn.Conv2d(4, 4, 3, padding=1)) for _ in range(count)))


# Speed


def test_row_01_a_step_is_one_call_of_each_op_however_many_layers_there_are():
    """torch: 13 ops and more for each layer, forward alone."""
    theirs = convolutions(1, TORCH)
    with Counted("aten") as counted:
        theirs[0].weight.detach()
    assert len(counted.names) > 13
    for count in (4, 16):
        model, x = convolutions(count), torch.randn(1, 4, 5, 5)
        with Counted() as ours:
            with fastsn.step(model):
                loss = model(x).sum() + model(-x).sum()
            loss.backward()
        assert ours.names == ["power_iteration_", "rescale", "rescale_backward"]
        with Counted("aten") as rest, fastsn.step(model):
            pass
        assert set(rest.names) <= {"detach"}


def lstm() -> tuple[nn.Module, str, tuple[Tensor, ...]]:
    return nn.LSTM(4, 5), "weight_hh_l0", (torch.randn(6, 1, 4),)


def attention() -> tuple[nn.Module, str, tuple[Tensor, ...]]:
    return nn.MultiheadAttention(8, 2), "in_proj_weight", (torch.randn(3, 1, 8),) * 3


class Loop(nn.GRUCell):
    def forward(self, xs: Tensor) -> Tensor:
        h = xs.new_zeros(1, self.hidden_size)
        for x in xs:
            h = super().forward(x, h)
        return h


def loop() -> tuple[nn.Module, str, tuple[Tensor, ...]]:
    return Loop(4, 5), "weight_hh", (torch.randn(6, 1, 4),)


@pytest.mark.parametrize(("make", "accesses"), [(attention, 3), (lstm, 4), (loop, 6)])
@pytest.mark.parametrize("scope", ["none", "step", "fuse", "cached"])
def test_row_02_a_scope_iterates_once_for_all_accesses_in_a_forward(make, accesses, scope):
    module, name, inputs = make()
    fastsn.spectral_norm(module, name)
    if scope == "fuse":
        fastsn.fuse(module)
    scopes = {"step": lambda: fastsn.step(module), "cached": parametrize.cached}
    with Counted() as counted, scopes.get(scope, nullcontext)():
        module(*inputs)
        module(*inputs)
    iterations = {"none": 2 * accesses, "fuse": 2, "cached": 1, "step": 1}[scope]
    assert counted.names.count("power_iteration_") == iterations


@pytest.mark.parametrize(("make", "accesses"), [(attention, 3), (lstm, 4), (loop, 6)])
def test_row_02_without_a_scope_every_access_iterates_as_in_torch(make, accesses):
    module, name, inputs = make()
    found = []
    TORCH(module, name).parametrizations[name][0].register_forward_hook(lambda *_: found.append(1))
    module(*inputs)
    assert len(found) == accesses


def test_row_03_all_shapes_at_once_equal_each_alone():
    """Random sizes, 1x1 kernels, single channels and memory layouts among them."""
    cases = [case for case, _, _ in drawn(80, seed=3)]
    assert {case.args[2] for case in cases if len(case.args) > 2} >= {1, 2}
    assert any(1 in case.args[:2] for case in cases)
    model = nn.ModuleList(case.build("BSN") for case in cases)
    alone = copy.deepcopy(model)
    with fastsn.step(model):
        together = [layer.normalized()[0] for layer in model]
    for layer, w, case in zip(alone, together, cases, strict=True):
        assert torch.equal(layer.normalized()[0], w), case
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), alone.buffers(), strict=True))


def graph_size(wrap, n: int) -> int:
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = wrap(nn.Linear(6, 5), n_power_iterations=n)
    torch.compile(layer, fullgraph=True, backend=counter)(torch.randn(2, 6))
    assert counter.frame_count == 1
    return counter.op_count


def test_row_04_the_graph_of_the_compiler_does_not_grow_with_the_iterations():
    needs_kernels()
    assert graph_size(TORCH, 20) > graph_size(TORCH, 1) + 50
    assert graph_size(fastsn.spectral_norm, 20) == graph_size(fastsn.spectral_norm, 1)


def test_row_04_no_graph_breaks_in_training_and_evaluation():
    layer, x = fastsn.BSSNConv2d(2, 3, 3, scale=1.3), torch.randn(1, 2, 5, 5)
    for training in (True, False):
        torch._dynamo.reset()
        found = torch._dynamo.explain(layer.train(training))(x)
        assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_row_04_the_ops_keep_torch_librarys_contract():
    c = call([torch.randn(3, 2, 2), torch.randn(4, 3)], [0, 0], v_first=[0, 1])
    torch.library.opcheck(torch.ops.fastsn.power_iteration_.default, (*c.iteration(), 2))


def test_row_05_folded_nothing_is_left_to_compute_and_the_output_has_the_same_bits():
    model, x = fastsn.fuse(convolutions(3).append(fastsn.BSSNConv2d(4, 2, 3, scale=1.4))), torch.randn(1, 4, 7, 7)
    model(x)
    expected = model.eval()(x)
    fastsn.fold(model)
    with Counted() as ours, Counted("aten") as rest:
        assert torch.equal(model(x), expected)
    assert ours.names == []
    assert not model._forward_pre_hooks
    assert set(rest.names) <= {"convolution", "equal", "_local_scalar_dense", "detach"}


def copied(layer: nn.Module) -> None:
    with torch.no_grad():
        original(layer).copy_(torch.randn(5, 6))


def loaded(layer: nn.Module) -> None:
    layer.load_state_dict(fastsn.spectral_norm(nn.Linear(6, 5)).state_dict())


CHANGES = {"copy_": copied, "load": loaded, "data": lambda layer: setattr(original(layer), "data", torch.randn(5, 6))}
CHANGES |= {"double": lambda layer: layer.double(), "half": lambda layer: layer.to(torch.bfloat16)}
CHANGES |= {"warm_up": lambda layer: fastsn.warm_up(layer, 3)}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_row_05_evaluation_never_serves_a_weight_from_before_a_change(change, fused):
    layer = fastsn.spectral_norm(nn.Linear(6, 5)).eval()
    if fused:
        fastsn.fuse(layer)
    for _ in range(2):
        before = layer(torch.ones(1, 6)).detach()
    CHANGES[change](layer)
    norm, weight = layer.parametrizations.weight[0], original(layer).detach()
    sigma = norm._u.double() @ weight.double() @ norm._v.double()
    output = layer(torch.ones(1, 6, dtype=weight.dtype)).detach()
    expected = (weight.double() / sigma).sum(1) + layer.bias.detach()
    torch.testing.assert_close(output.double(), expected[None], rtol=0, atol=2e-2 if change == "half" else 1e-5)
    assert not torch.equal(output.double(), before.double()) or change == "data"


# Autograd and state


def matched(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())


def hinge(model: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(1 - model(x)).sum() + torch.relu(1 + model(-x)).sum()


def around_evaluation(model: nn.Module, x: Tensor) -> Tensor:
    loss = model.train()(x).square().sum()
    loss = loss + model.eval()(x).square().sum()
    return loss + model.train()(x).square().sum()


def three_and_a_penalty(model: nn.Module, x: Tensor) -> Tensor:
    points = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    return model(x).sum() + model(-x).square().sum() + slope.square().sum()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", [hinge, around_evaluation, three_and_a_penalty])
def test_row_06_several_forwards_then_backward(loss, impl):
    """The numbers of torch's parametrization; torch's hook cannot do all of it."""
    x = torch.randn(4, 6, dtype=torch.float64)
    ours, theirs = (
        nn.Sequential(wrap(nn.Linear(6, 5, dtype=x.dtype)), nn.Tanh(), wrap(nn.Linear(5, 2, dtype=x.dtype)))
        for wrap in (partial(fastsn.spectral_norm, impl=impl), TORCH)
    )
    matched(ours, theirs)
    for model in (ours, theirs):
        loss(model, x).backward()
    for a, b in zip([*ours.parameters()], theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()))


def test_row_06_torchs_hook_fails_with_evaluation_between():
    """The test of the test above."""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        around_evaluation(hook(nn.Linear(6, 5)), torch.randn(4, 6)).backward()


@pytest.mark.parametrize("kind", ["torch", "fastsn", "layer", "step"])
def test_row_07_backward_twice_around_an_optimizer_step(kind):
    layer = fastsn.BSSNConv2d(2, 3, 3, scale=1.3) if kind == "layer" else nn.Conv2d(2, 3, 3)
    if kind != "layer":
        layer = WRAPPERS["torch" if kind == "torch" else "fastsn"](layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    with fastsn.step(layer) if kind == "step" else nullcontext():
        loss = layer(torch.randn(2, 2, 5, 5)).square().sum()
    loss.backward(retain_graph=True)
    expected = [p.grad.clone() for p in layer.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    if kind == "torch":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        return
    needs_kernels()  # the reference needs the weight itself for the gradient, like torch's
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(layer.parameters(), expected, strict=True))
    assert expected[0].abs().sum() > 0


def error_and_advances(wrap, reentrant: bool, scope=nullcontext) -> tuple[float, int]:
    """The checkpointed gradient's relative error; how often u moved."""
    layer, x = wrap(nn.Linear(40, 30)), torch.randn(8, 40, requires_grad=True)
    twin = copy.deepcopy(layer)
    u, found = layer.parametrizations.weight[0]._u, []
    with scope(layer):
        output = checkpoint(layer, x, use_reentrant=reentrant)
    found.append(u.clone())
    output.square().sum().backward()
    found.append(u.clone())
    with scope(twin):
        twin(x).square().sum().backward()
    exact = original(twin).grad
    return float((original(layer).grad - exact).norm() / exact.norm()), 1 + (not torch.equal(*found))


@pytest.mark.parametrize("reentrant", [True, False])
def test_row_08_checkpointed_gradients_are_right_and_u_advances_once(reentrant):
    wrong, twice = error_and_advances(TORCH, reentrant)
    assert wrong > 1e-3
    assert twice == 2
    for scope in (lambda _: nullcontext(), fastsn.step):
        error, advances = error_and_advances(fastsn.spectral_norm, reentrant, scope)
        assert error < 1e-6
        assert advances == 1


LAYERS = {
    "Conv2d channels_last": lambda: nn.Conv2d(2, 3, (2, 1)).double().to(memory_format=torch.channels_last),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(2, 3, 2).double(),
    "Linear, complex": lambda: nn.Linear(3, 2, dtype=torch.complex128),
}


@pytest.mark.parametrize("variant", ["sn", "bssn"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("impl", IMPLS)
def test_row_09_first_and_second_derivatives(kind, variant, impl):
    """In evaluation, where u and v stand still for finite differences too."""
    layer = fastsn.spectral_norm(LAYERS[kind](), variant=variant, scale=1.0 if variant == "sn" else 1.4, impl=impl)
    norm, weight = layer.parametrizations.weight[0].eval(), original(layer).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: norm(w) * norm(w).sin(), weight)
    assert torch.autograd.gradgradcheck(lambda w: norm(w) * norm(w).sin(), weight)


@pytest.mark.parametrize("variant", ["sn", "bsn"])
def test_row_09_a_gradient_penalty_equals_that_through_plain_torch(variant):
    """End to end, in training: the penalty's gradient in the weights, against the equation in plain operations."""
    layer = getattr(fastsn, f"{variant.upper()}Conv2d")(2, 3, 3, dtype=torch.float64)
    head, x = torch.randn(3, 3, 3, dtype=torch.float64), torch.randn(4, 2, 5, 5, dtype=torch.float64)

    def penalty(convolve) -> Tensor:
        points = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad((convolve(points) * head).tanh().sum(), points, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square().mean()

    penalty(layer).backward()
    w, norm = layer.weight.detach().clone().requires_grad_(), layer.spectral_norm
    sigma = norm._u @ w.flatten(1) @ norm._v
    if variant == "bsn":
        sigma = (sigma + norm._u_in @ w.flatten(2).transpose(1, 2).flatten(0, 1) @ norm._v_in) / 2
    penalty(lambda points: torch.nn.functional.conv2d(points, w / sigma, layer.bias)).backward()
    torch.testing.assert_close(layer.weight.grad, w.grad, rtol=1e-9, atol=1e-12)
    assert w.grad.abs().max() > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_row_10_the_gradient_is_the_closed_form_and_the_weight_is_never_written(impl):
    """u and v are constants, sigma is not."""
    layer = fastsn.spectral_norm(nn.Linear(6, 5, dtype=torch.float64), impl=impl)
    w, norm, upstream = original(layer), layer.parametrizations.weight[0], torch.randn(5, 6, dtype=torch.float64)
    before, version = w.detach().clone(), w._version
    layer.weight.backward(upstream)
    assert torch.equal(w, before)
    assert w._version == version
    u, v = norm._u, norm._v
    assert not any(x.requires_grad for x in (u, v))
    sigma = u @ before @ v
    closed = (upstream - (upstream * before / sigma).sum() * torch.outer(u, v)) / sigma
    torch.testing.assert_close(w.grad, closed, rtol=1e-12, atol=1e-14)
    without_sigma = upstream / sigma
    assert float((w.grad - without_sigma).norm()) > 0.01 * float(without_sigma.norm())


def transformed(wrap, transform: str) -> tuple[Tensor, nn.Module, dict[str, Tensor]]:
    torch.manual_seed(4)
    layer, x = wrap(nn.Linear(4, 3, dtype=torch.float64)), torch.randn(5, 4, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    passed = {k: v.clone() for k, v in layer.named_buffers()}
    name = "parametrizations.weight.original"

    def outputs(weight: Tensor, x: Tensor = x) -> Tensor:
        return functional_call(layer, {**parameters, **passed, name: weight}, (x,)).square().sum(-1)

    if transform == "grad":
        result = grad(lambda w: outputs(w).sum())(parameters[name])
    elif transform == "vmap of grad":
        layer.eval()
        result = vmap(grad(outputs), in_dims=(None, 0))(parameters[name], x)
    else:
        result = {"jacfwd": jacfwd, "jacrev": jacrev}[transform](outputs)(parameters[name])
    return result, layer, passed


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own rules of forward mode
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jacrev", "jacfwd"])
def test_row_11_function_transforms(transform):
    """torch's numbers, and of forward mode, which torch refuses, those of reverse mode."""
    result, layer, passed = transformed(fastsn.spectral_norm, transform)
    if transform == "jacfwd":
        with pytest.raises(RuntimeError, match="out="):
            transformed(TORCH, transform)
    expected = transformed(TORCH, "jacrev" if transform == "jacfwd" else transform)
    torch.testing.assert_close(result, expected[0])
    if transform != "vmap of grad":  # it was in evaluation
        own = dict(layer.named_buffers())
        assert all(not torch.equal(passed[k], own[k]) for k in own)  # what was passed has moved, and nothing else
        torch.testing.assert_close(passed, expected[2])


@pytest.mark.parametrize("scope", ["none", "step", "fuse"])
def test_row_12_training_holds_no_graphs(scope):
    model, x = convolutions(2), torch.randn(1, 4, 5, 5)
    if scope == "fuse":
        fastsn.fuse(model)

    def tensors_after(steps: int) -> int:
        for _ in range(steps):
            with fastsn.step(model) if scope == "step" else nullcontext():
                loss = model(x).sum() - model(-x).sum()
            loss.backward()
        del loss
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    before = tensors_after(20)  # the vectors of the last 16 are kept
    assert tensors_after(100) <= before
