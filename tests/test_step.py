"""One normalization for all uses in a block."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastsn
from dispatched import Counted, needs_kernels
from networks import batch, moved, network, state


def test_a_step_iterates_once_and_serves_the_same_weight_to_every_use():
    net, x = network(), batch()
    once = copy.deepcopy(net)
    layer = net[1][0]
    with fastsn.step(net):
        first, second = layer.normalized()[0], layer.normalized()[0]
        assert first is second
        outputs = [net(x), net(x)]
        assert torch.equal(*outputs)
    with fastsn.step(once):
        pass
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), once.buffers(), strict=True))
    assert layer.normalized()[0] is not layer.normalized()[0]  # outside, every use is its own


@pytest.mark.parametrize("count", [4, 16])
def test_a_step_asks_torch_for_no_op_however_many_layers_there_are(count):
    needs_kernels()  # the reference is made of torch's
    net = nn.Sequential(*(fastsn.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)) for _ in range(count)))
    net(torch.randn(1, 4, 5, 5))
    with Counted("aten") as rest, fastsn.step(net):
        pass
    assert set(rest.names) <= {"detach"}


class Loop(nn.GRUCell):
    def forward(self, xs: Tensor) -> Tensor:
        h = xs.new_zeros(1, self.hidden_size)
        for x in xs:
            h = super().forward(x, h)
        return h


SEVERAL_ACCESSES = {
    "attention": lambda: (nn.MultiheadAttention(8, 2), "in_proj_weight", (torch.randn(3, 1, 8),) * 3, 3),
    "LSTM": lambda: (nn.LSTM(4, 5), "weight_hh_l0", (torch.randn(6, 1, 4),), 4),
    "loop": lambda: (Loop(4, 5), "weight_hh", (torch.randn(6, 1, 4),), 6),
}


@pytest.mark.parametrize("make", SEVERAL_ACCESSES.values(), ids=SEVERAL_ACCESSES)
@pytest.mark.parametrize("scope", ["none", "step", "fuse", "cached"])
def test_a_scope_iterates_once_for_all_accesses_in_a_forward(make, scope):
    """Without one every access iterates, as in torch."""
    module, name, inputs, accesses = make()
    fastsn.spectral_norm(module, name)
    if scope == "fuse":
        fastsn.fuse(module)
    scopes = {"step": lambda: fastsn.step(module), "cached": parametrize.cached}
    with Counted() as counted, scopes.get(scope, nullcontext)():
        module(*inputs)
        module(*inputs)
    iterations = {"none": 2 * accesses, "fuse": 2, "cached": 1, "step": 1}[scope]
    assert counted.names.count("power_iteration_") == iterations


def test_a_step_is_one_forward_of_each_layer_used_once():
    net = nn.Sequential(fastsn.BSSNConv2d(2, 4, 3, scale=1.3), nn.Flatten(), fastsn.SNLinear(4 * 4 * 4, 2))
    twin, x = copy.deepcopy(net), batch()
    with fastsn.step(net):
        inside = net(x)
    assert torch.equal(inside, twin(x))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), twin.buffers(), strict=True))


def test_without_advance_the_iterated_vectors_are_used_and_not_stored():
    net, x = network(), batch()
    before, twin = state(net), copy.deepcopy(net)
    with fastsn.step(net, advance=False):
        inside = net(x)
    assert moved(before, net) == set()
    with fastsn.step(twin):
        assert torch.equal(inside, twin(x))
    assert moved(before, twin) == set(before)


def test_in_evaluation_a_step_moves_nothing():
    net, x = network().eval(), batch()
    before, expected = state(net), net(x)
    with fastsn.step(net):
        assert torch.equal(net(x), expected)
    assert moved(before, net) == set()


def test_one_backward_through_all_uses_sums_their_gradients():
    net, x, y = network(), batch(), batch()
    twin = copy.deepcopy(net)
    with fastsn.step(net):
        (net(x).sum() - net(y).square().sum()).backward()
    with fastsn.step(twin):
        loss = twin(x).sum()
        loss = loss - twin(y).square().sum()
    loss.backward()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        assert a.grad.abs().sum() > 0


def test_a_first_use_without_gradient_does_not_cut_later_ones():
    net, x = network(), batch()
    with fastsn.step(net):
        with torch.no_grad():
            silent = net(x)
        loud = net(x)
        assert torch.equal(silent, loud)
        loud.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_weight_made_in_inference_mode_is_not_served_to_training():
    layer, x = fastsn.BSSNConv2d(2, 4, 3).requires_grad_(False), batch()
    points = x.clone().requires_grad_()
    with fastsn.step(layer), torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        with torch.inference_mode():
            layer(x)
        layer(points).sum().backward()
    assert points.grad.abs().sum() > 0


def test_freezing_the_network_inside_a_step_serves_a_weight_without_a_graph():
    net, x = network(), batch()
    with fastsn.step(net):
        net(x).sum().backward()
        net.requires_grad_(False)
        points = x.clone().requires_grad_()
        net(points).sum().backward()
    assert points.grad.abs().sum() > 0


def test_steps_that_end_out_of_order_leave_nothing_behind():
    layer, x = fastsn.SNLinear(40, 30), torch.randn(1, 40)
    first, second = fastsn.step(layer), fastsn.step(layer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("inside", [True, False])
def test_steps_and_the_compiler(inside):
    """The step inside the compiled function, and the compiled function inside the step."""
    net = nn.Sequential(fastsn.BSSNConv2d(2, 4, 3, scale=1.2), nn.Flatten(), fastsn.spectral_norm(nn.Linear(64, 2)))
    twin, x = copy.deepcopy(net), batch()

    def run(model: nn.Module, x: Tensor) -> Tensor:
        if not inside:
            return model(x) - model(-x)
        with fastsn.step(model):
            return model(x) - model(-x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        with fastsn.step(net) if not inside else nullcontext():
            ours = compiled(net, x)
        with fastsn.step(twin) if not inside else nullcontext():
            expected = run(twin, x)
        for output, model in ((ours, net), (expected, twin)):
            output.square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(list(net.buffers()), list(twin.buffers()))


def test_a_weight_that_changes_inside_the_block_is_normalized_anew():
    layer = fastsn.SSNLinear(4, 5, scale=nn.Parameter(torch.tensor(1.0)))
    x = torch.randn(3, 4)
    with fastsn.step(layer):
        before, u = layer(x), layer.spectral_norm._u.clone()
        with torch.no_grad():
            layer.weight.add_(torch.randn(5, 4))
        after = layer(x)
        assert not torch.allclose(before, after)
        with torch.no_grad():
            layer.spectral_norm.scale.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (after - layer.bias))
        assert torch.equal(layer.spectral_norm._u, u)


@pytest.mark.parametrize("learnable", [True, False])
def test_a_scale_that_is_replaced_inside_the_block_counts(learnable):
    layer, x = (
        fastsn.SSNLinear(4, 5, scale=nn.Parameter(torch.tensor(1.0)) if learnable else 1.0, bias=False),
        torch.ones(1, 4),
    )
    other = torch.tensor(3.0, requires_grad=True)
    with fastsn.step(layer):
        before = layer(x)
        if learnable:
            after = torch.func.functional_call(layer, {"spectral_norm.scale": other}, (x,))
            (gradient,) = torch.autograd.grad(after.sum(), other)
            torch.testing.assert_close(gradient, before.sum())
        else:
            layer.spectral_norm.scale = 3.0
            after = layer(x)
    torch.testing.assert_close(after, 3 * before)


def test_a_norm_on_a_norm_is_measured_through_the_vectors_of_the_step():
    with pytest.warns(UserWarning, match="has a spectral norm already"):
        layer = fastsn.spectral_norm(fastsn.spectral_norm(nn.Linear(6, 5)))
    nn.init.normal_(layer.parametrizations.weight.original)
    twin = copy.deepcopy(layer)
    with fastsn.step(layer, advance=False):
        unstored = layer.weight
    with fastsn.step(twin):
        torch.testing.assert_close(unstored, twin.weight)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_second_backward_through_one_step_says_what_to_do(impl, inside, fused):
    """The loop of the DCGAN tutorial: a backward for real, a backward for fake."""
    net = nn.Sequential(fastsn.BSSNConv2d(2, 4, 3, impl=impl), nn.Flatten(), fastsn.SNLinear(64, 2, impl=impl))
    net, x = fastsn.fuse(net) if fused else net, batch()
    message = (
        r"weights of fastsn a second time.*in a fastsn\.step.*one backward for the sum of the losses.*retain_graph=True"
    )
    step = fastsn.step(net)
    step.__enter__()
    real, fake = net(x).mean(), net(-x).mean()
    if not inside:
        step.__exit__(None, None, None)
    real.backward()
    with pytest.raises(RuntimeError, match=message):
        fake.backward()
    if inside:
        step.__exit__(None, None, None)
    with fastsn.step(net):  # what the error names works
        (net(x).mean() + net(-x).mean()).backward()
    for _ in range(2):
        with fastsn.step(net):
            net(x).mean().backward()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_backward_calls_that_keep_the_graph_go_through_one_step(impl):
    net = nn.Sequential(fastsn.BSSNConv2d(2, 4, 3, impl=impl), nn.Flatten(), fastsn.SNLinear(64, 2, impl=impl))
    twin, x = copy.deepcopy(net), batch().requires_grad_()
    with fastsn.step(net):
        net(x).mean().backward(retain_graph=True)
        (gradient,) = torch.autograd.grad(net(-x).mean(), x, create_graph=True)
        gradient.square().sum().backward(retain_graph=True)
        net(2 * x).mean().backward()
    with fastsn.step(twin):
        (gradient,) = torch.autograd.grad(twin(-x).mean(), x, create_graph=True)
        (twin(x).mean() + gradient.square().sum() + twin(2 * x).mean()).backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])


def test_autocast_inside_a_step():
    layer = fastsn.BSSNConv2d(2, 4, 3)
    with fastsn.step(layer):
        full = layer.normalized()[0]
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            assert torch.equal(layer.normalized()[0], full.bfloat16())
        assert layer.normalized()[0].dtype == torch.float32


def test_steps_nest_and_an_exception_ends_them():
    layer, x = fastsn.SNLinear(40, 30), torch.randn(1, 40)
    with fastsn.step(layer):
        outer = layer(x)
        with fastsn.step(layer):
            inner = layer(x)
        assert not torch.equal(inner, outer)
        assert torch.equal(layer(x), outer)
    with pytest.raises(KeyError), fastsn.step(layer):
        raise KeyError
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("scope", ["step", "fuse"])
def test_a_step_that_is_interrupted_as_it_begins_leaves_nothing_behind(scope):
    class Interrupted(list):
        def append(self, _: object) -> None:
            raise KeyboardInterrupt

    net = nn.Sequential(fastsn.SNLinear(4, 4).double(), *(fastsn.SNLinear(4, 4) for _ in range(3)))
    norms = [layer.spectral_norm for layer in net]
    norms[2].cached = Interrupted()
    begin = fastsn.step(net).__enter__ if scope == "step" else partial(fastsn.fuse(net), torch.ones(1, 4))
    with pytest.raises(KeyboardInterrupt):
        begin()
    assert [norm.cached for norm in norms] == [[]] * 4


@pytest.mark.parametrize("scope", ["step", "fuse"])
def test_a_step_that_is_interrupted_as_it_ends_has_ended(scope):
    """A fused forward at the latest when the next one begins."""

    class Interrupted(list):
        def remove(self, each: object) -> None:
            super().remove(each)
            norms[1].cached = list(self)
            raise KeyboardInterrupt

    net, x = nn.Sequential(*(fastsn.SNLinear(4, 4) for _ in range(3))), torch.ones(1, 4)
    norms = [layer.spectral_norm for layer in net]
    norms[1].cached = Interrupted()
    if scope == "step":
        with pytest.raises(KeyboardInterrupt), fastsn.step(net):
            pass
    else:
        fastsn.fuse(net)
        with pytest.raises(KeyboardInterrupt):
            net(x)
        net(x)
    assert [norm.cached for norm in norms] == [[]] * 3


def test_a_step_can_be_entered_once():
    layer = fastsn.SNLinear(40, 30)
    step = fastsn.step(layer)
    with step:
        served = layer.normalized()[0]
        with pytest.raises(RuntimeError, match=r"entered once, got a second time: call fastsn\.step\(model\)"), step:
            pass
        assert layer.normalized()[0] is served
    with pytest.raises(RuntimeError, match="entered once"):
        step.__enter__()
    assert layer.normalized()[0] is not served


def test_functional_call_inside_a_step_uses_the_weight_it_is_given():
    layer, x = fastsn.SNLinear(4, 5, bias=False), torch.randn(3, 4)
    with fastsn.step(layer):
        a = layer(x)
        b = torch.func.functional_call(layer, {"weight": torch.randn(5, 4)}, (x,))
    assert not torch.allclose(a, b)


def test_a_step_of_two_norms_on_an_orthogonal_weight():
    layer = nn.Linear(6, 5)
    fastsn.spectral_norm(parametrizations.orthogonal(layer), variant="ssn", scale=2.0)
    with pytest.warns(UserWarning, match="has a spectral norm already"):
        fastsn.spectral_norm(layer)
    fastsn.warm_up(layer, 100)
    assert set(fastsn.sigmas(layer)) == {"1", "2"}
    before = state(layer)
    with fastsn.step(layer, advance=False):
        torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight, 2), torch.tensor(1.0))
    assert moved(before, layer) == set()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_weights_that_share_a_norm_iterate_its_vectors_one_after_the_other(impl):
    net = nn.Sequential(*(fastsn.BSSNConv2d(3, 3, 3, impl=impl) for _ in range(3)))
    net[2].spectral_norm = net[0].spectral_norm
    alone = copy.deepcopy(net)
    with fastsn.step(net):
        pass
    for layer in alone:
        layer.normalized()
    for ours, theirs in zip(net.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
