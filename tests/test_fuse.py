"""A fused model: each of its forwards normalizes all weights in one call, and everything else stays as it was."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastsn
from dispatched import Counted
from networks import batch, moved, network, replica, state


def chain(layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*(fastsn.BSSNConv2d(4, 4, 3, padding=1, scale=1.4) for _ in range(layers)))


def image() -> Tensor:
    return torch.randn(2, 4, 5, 5)


@pytest.mark.parametrize("layers", [8, 20, 64])
def test_a_fused_model_calls_each_op_once_however_many_layers_it_has(layers):
    model = fastsn.fuse(chain(layers))
    with Counted() as forward:
        y = model(image())
    with Counted() as backward:
        y.sum().backward()
    assert forward.names == ["power_iteration_", "rescale"]
    assert backward.names == ["rescale_backward"]
    with Counted() as evaluation:
        model.eval()(image())
    assert evaluation.names == ["power_iteration", "rescale"]


def test_a_fused_model_trains_as_the_model_does():
    """Every layer of it is used once: the same iterations, in one call."""
    model, x = chain(), image()
    model.append(fastsn.spectral_norm(nn.Conv2d(4, 2, 1))).append(fastsn.SNConvTranspose2d(2, 3, 2))
    fused = fastsn.fuse(copy.deepcopy(model))
    for _ in range(5):
        for each in (model, fused):
            each(x).square().sum().backward()
            with torch.no_grad():
                for p in each.parameters():
                    p -= 0.01 * p.grad
                    p.grad = None
    torch.testing.assert_close(fused.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(fused.eval()(x), model.eval()(x))


def test_every_forward_iterates_once_also_for_layers_used_twice_or_not_at_all():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.unused = chain(1)[0], chain(1)[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(x))

    model, x = fastsn.fuse(Branches()), image()
    twin = copy.deepcopy(model)
    before = state(model)
    model(x).sum().backward()
    assert moved(before, model) == set(before)
    with fastsn.step(twin):
        twin(x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert model.twice.weight.grad.abs().sum() > 0
    assert model.unused.weight.grad is None


def test_a_submodule_on_its_own_normalizes_as_before():
    model, x = fastsn.fuse(chain()), image()
    before = state(model)
    model[1](x)
    assert moved(before, model) == {name for name in before if name.startswith("1.")}
    with Counted() as counted:
        model[1](x)
    assert counted.names == ["power_iteration_", "rescale"]


def test_frozen_layers_iterate_and_get_no_gradient():
    model, x = fastsn.fuse(chain()), image()
    model[0].requires_grad_(False)
    with Counted() as counted, fastsn.step(model):
        assert [layer.normalized()[0].requires_grad for layer in model] == [False, True, True]
    assert counted.names == ["power_iteration_", "rescale"]
    before = state(model)
    model(x).sum().backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad.abs().sum() > 0
    assert moved(before, model) == set(before)


def test_a_fused_part_of_a_fused_model_is_served_by_the_whole():
    model = nn.Sequential(fastsn.fuse(chain(2)), chain(1)[0])
    fastsn.fuse(model)
    with Counted() as counted:
        model(image())
    assert counted.names == ["power_iteration_", "rescale"]
    before = state(model)
    model[0](image())
    assert moved(before, model) == {name for name in before if name.startswith("0.")}


def test_inside_a_step_a_fused_model_is_served_by_the_step():
    model, x = fastsn.fuse(chain()), image()
    before = state(model)
    with fastsn.step(model, advance=False), Counted() as counted:
        assert torch.equal(model(x), model(x))
    assert counted.names == []
    assert moved(before, model) == set()
    model(x)
    assert moved(before, model) == set(before)


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.fails, self.kind = chain(), True, KeyError

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        if self.fails:
            raise self.kind("in the middle")
        return self.layers[1:](x)


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt])
def test_an_exception_inside_the_forward_leaves_nothing_behind(kind):
    model, x = fastsn.fuse(Fails()), image()
    model.kind = kind
    with pytest.raises(kind, match="in the middle"):
        model(x)
    with torch.no_grad():
        model.layers[0].weight.mul_(3)
    model.fails = False
    twin = Fails()
    twin.load_state_dict(model.state_dict())
    twin.fails = False
    for _ in range(2):
        assert torch.equal(model(x), twin(x))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_a_forward_inside_a_forward_of_the_same_model_is_served_by_the_outer_one():
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = chain(1)[0]

        def forward(self, x: Tensor, depth: int = 3) -> Tensor:
            y = self.layer(x)
            return self.layer(self(y, depth - 1)) if depth else y

    model = fastsn.fuse(Recursive())
    with Counted() as counted:
        model(image())
    assert counted.names == ["power_iteration_", "rescale"]


def test_a_weight_that_cannot_be_normalized_leaves_nothing_behind():
    model = fastsn.fuse(chain())
    whole, model[2] = model[2], fastsn.BSSNConv2d(4, 4, 3, padding=1, device="meta")
    before = state(model)
    with pytest.raises(ValueError, match="'2' must have values"):
        model(image())
    model[2] = whole
    assert moved({k: v for k, v in before.items() if not k.startswith("2")}, model[:2]) == set()
    with Counted() as counted:
        model(image())
    assert counted.names == ["power_iteration_", "rescale"]


@pytest.mark.parametrize("advance", [True, False])
def test_a_step_counts_in_a_fused_forward_of_a_thread_that_has_opened_nothing(advance):
    model, x = fastsn.fuse(chain(2)), image()
    outputs: list[Tensor] = []
    with fastsn.step(model, advance=advance):
        before, expected = state(model), model(x)
        thread = threading.Thread(target=lambda: outputs.append(model(x)))
        thread.start()
        thread.join()
        torch.testing.assert_close(outputs[0], expected)  # the same vectors, and a graph of its own
        assert moved(before, model) == set()
    thread = threading.Thread(target=lambda: model(x))
    thread.start()
    thread.join()
    assert moved(before, model) == set(before)  # after it forwards advance again, in any thread


def test_a_backward_in_another_thread_leaves_the_graph_of_a_step_alone():
    model, x = fastsn.fuse(network()), batch()
    errors = []

    def train() -> None:
        try:
            model(x).sum().backward()
        except RuntimeError as error:
            errors.append(error)

    with fastsn.step(model):
        loss = model(x).sum()
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        loss.backward()
    assert errors == []


def test_replicas_normalize_in_their_threads_and_are_served_by_a_step_around_them():
    model, x = fastsn.fuse(chain(2)), image()
    twin = copy.deepcopy(model)
    with fastsn.step(model):
        replicas = [replica(model), replica(model)]
        outputs: dict[int, Tensor] = {}
        threads = [
            threading.Thread(target=lambda i=i: outputs.__setitem__(i, replicas[i](x * (i + 1)))) for i in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (outputs[0] + outputs[1]).sum().backward()
    with fastsn.step(twin):
        (twin(x) + twin(2 * x)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_functional_call_normalizes_what_it_is_given():
    model, x = fastsn.fuse(chain()), image()
    other = chain()
    given = {**dict(other.named_parameters()), **state(other)}
    before = state(model)
    assert torch.equal(functional_call(model, given, (x,)), other(x))
    assert moved(before, model) == set()


def test_copies_and_pickles_are_fused_and_the_state_dict_is_the_same():
    model, x = chain(), image()
    keys = list(model.state_dict())
    fastsn.fuse(model)
    assert list(model.state_dict()) == keys
    assert type(model) is nn.Sequential
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with Counted() as counted:
            twin(x)
        assert counted.names == ["power_iteration_", "rescale"]


def test_fusing_again_changes_nothing_and_folding_undoes_it():
    model, x = network().eval(), batch()
    assert fastsn.fuse(fastsn.fuse(model)) is model
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    fastsn.fuse(model[1])
    expected = model(x)
    fastsn.fold(model)
    assert torch.equal(model(x), expected)
    for module in model.modules():
        assert [*module._forward_pre_hooks, *module._forward_hooks, *module._forward_hooks_always_called] == []


def test_a_layer_can_be_fused_and_folded():
    layer, x = fastsn.fuse(fastsn.BSSNConv2d(4, 4, 3)).eval(), image()
    expected = layer(x)
    assert torch.equal(fastsn.fold(layer)(x), expected)
    assert type(layer) is nn.Conv2d
