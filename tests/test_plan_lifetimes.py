"""Copies of models with a plan have their own, and what a model has given up is freed. Exports see no plan."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastsn
import plan_models
from fastsn.norm import changes
from networks import moved, state
from plan_models import AlsoBehind, Weights, assert_right, train, used, weights_of


@pytest.fixture
def found(monkeypatch) -> list[nn.Module]:
    return plan_models.searched(monkeypatch)


def copied_by_saving(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def without_parametrizations() -> nn.Module:
    """Which torch does not pickle."""
    model = Weights()
    del model.dropin, model.doubled
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": copied_by_saving,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("scope", ["step", "fuse"])
def test_copies_of_a_used_model_have_their_own(how, scope, found):
    model = used(scope, Weights if how == "deepcopy" else without_parametrizations)
    twin = COPIES[how](model)
    for _ in range(2):
        for each in (model, twin):
            assert_right(each, scope)
    assert (found.count(model), found.count(twin)) == (1, 1)
    before = state(model)
    twin.learnt.weight.data = torch.randn(4, 3, 3, 3)
    assert_right(twin, scope)
    assert moved(before, model) == set()


def test_a_pickle_of_a_used_model_is_hardly_larger():
    model = used("step", without_parametrizations)
    size = len(pickle.dumps(model))
    del model._fastsn_plan
    assert size - len(pickle.dumps(model)) < 100


@pytest.mark.parametrize("scope", ["step", "fuse"])
def test_a_shallow_copy_that_gets_other_modules(scope):
    model = used(scope)
    twin = copy.copy(model)
    assert_right(twin, scope)
    twin._modules = dict(twin._modules)
    twin.learnt = fastsn.BSSNConv2d(3, 4, 3, scale=1.4)
    for each in (twin, model, twin):
        assert_right(each, scope)


def stacked() -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fastsn.spectral_norm(fastsn.spectral_norm(nn.Linear(4, 3)), variant="bssn", scale=1.2)


def behind_another() -> nn.Module:
    return parametrizations.weight_norm(fastsn.SNLinear(4, 3))


LAYERS = {
    "layer": lambda: fastsn.BSSNConv2d(3, 4, 3, scale=nn.Parameter(torch.tensor(1.4))),
    "drop-in": lambda: fastsn.spectral_norm(nn.Linear(4, 3)),
    "stacked": stacked,
    "behind another": behind_another,
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_model_that_is_a_layer(layer):
    model = LAYERS[layer]()
    for _ in range(2):
        assert_right(model, "step")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand_like(p) + 0.5)
    assert_right(model, "step")
    model.double()
    for p in model.parameters():
        p.data = torch.rand_like(p) + 0.5
    assert_right(model, "step")


@pytest.mark.parametrize(
    "make", [*LAYERS.values(), Weights, AlsoBehind, lambda: nn.Sequential(*(x() for x in LAYERS.values()))]
)
def test_a_used_model_is_freed_as_soon_as_nobody_holds_it(make):
    gc.disable()
    try:
        model = copy.deepcopy(make())  # torch's classes of parametrized layers hold the layers that they were made for
        for _ in range(2):
            with fastsn.step(model):
                weights_of(model)
        held = [weakref.ref(each) for each in (*model.modules(), *model.parameters(), *model.buffers())]
        del model
        assert [each() for each in held] == [None] * len(held)
    finally:
        gc.enable()


@pytest.mark.parametrize("scope", ["step", "fuse"])
def test_what_is_replaced_is_freed_after_the_next_step(scope):
    model = used(scope)
    gc.disable()
    try:
        weight = weakref.ref(model.list[0].weight)
        layer = weakref.ref(model.learnt)
        model.list[0].weight = nn.Parameter(torch.randn(4, 4))
        model.learnt = None
        train(model, scope)
        assert weight() is None
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("scope", ["step", "fuse"])
def test_fold_frees_what_it_replaces(scope):
    model = used(scope, without_parametrizations)
    train(model.list, "step")  # parts have plans of their own
    held = [weakref.ref(x) for x in (model.learnt.weight, model.list[0].weight, model.learnt.spectral_norm._u)]
    gc.disable()
    try:
        fastsn.fold(model)
        assert [x() for x in held] == [None] * len(held)
    finally:
        gc.enable()


def test_a_model_that_has_lost_its_last_norm_holds_none():
    model = used("step", lambda: nn.Sequential(fastsn.SNLinear(3, 3)))
    layer = weakref.ref(model[0])
    model[0] = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="must have norms of fastsn, got none"), fastsn.step(model):
        pass
    gc.collect()
    assert layer() is None


def test_changes_in_threads_are_never_counted_as_none():
    """A thread that has read a number before another has set it may write an old one; never one that a plan has."""
    seen = set()
    norm = fastsn.SNLinear(3, 3).spectral_norm
    for _ in range(3):
        before = changes.count
        for n in range(1, 4):
            norm.n_power_iterations = n
            assert changes.count not in seen
            seen.add(changes.count)
        changes.count = before  # what another thread had read


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("scope", ["step", "fuse"])
def test_a_weight_that_is_kept_stays_as_it_is_and_holds_no_other(scope, frozen):
    model = used(scope).requires_grad_(not frozen)
    gc.disable()
    try:
        with fastsn.step(model) if scope == "step" else nullcontext():
            made = model()
        kept, others = made[0].detach() if not frozen else made[0], [weakref.ref(w) for w in made[1:]]
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
        made, value = None, kept.clone()
        assert [w() for w in others] == [None] * len(others)
    finally:
        gc.enable()
    for _ in range(3):
        train(model, scope)
        with torch.no_grad():
            model.learnt.weight.mul_(2)
    assert torch.equal(kept, value)


@pytest.mark.filterwarnings("ignore")  # the tracer's
@pytest.mark.parametrize("scope", ["step", "fuse"])
def test_torchscript_sees_the_same_ops_at_every_trace(scope):
    net = nn.Sequential(fastsn.SNLinear(4, 4), fastsn.SNLinear(4, 4))
    net = fastsn.fuse(net) if scope == "fuse" else net

    class Scoped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            with fastsn.step(self.net) if scope == "step" else nullcontext():
                return self.net(x)

    for _ in range(3):
        graph = torch.jit.trace(Scoped(), torch.ones(1, 4), check_trace=False).inlined_graph
        assert re.findall(r"fastsn::(\w+)", str(graph)) == ["power_iteration_", "rescale"]
