"""What a step needs of a model is found once, and found anew as soon as anything has changed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import fastsn
from dispatched import Counted, needs_kernels
from fastsn import plan
from fastsn.layers import NormalizedLayer
from fastsn.norm import changes
from networks import moved, state

Context = AbstractContextManager[object]
DEVICE = torch.get_default_device().type


class Doubled(nn.Module):
    """A parametrization of another kind."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Weights(nn.Module):
    """Its forward gives every W̄, so that weights of any dtype and shape stand side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.learnt = fastsn.BSSNConv2d(3, 4, 3, scale=nn.Parameter(torch.tensor(1.4)))
        self.dropin = fastsn.spectral_norm(nn.Conv2d(4, 3, 3))
        self.plain = nn.Linear(4, 4)
        self.plain.other = nn.Parameter(torch.randn(3, 5))
        self.doubled = fastsn.spectral_norm(nn.Linear(5, 4), variant="bsn")
        parametrize.register_parametrization(self.doubled, "weight", Doubled())
        self.list = nn.ModuleList([fastsn.SNLinear(4, 4), nn.Sequential(fastsn.SSNLinear(4, 4, scale=0.7))])

    def forward(self) -> list[Tensor]:
        return weights_of(self)


class AlsoBehind(Weights):
    """A weight has to be asked for, each time."""

    def __init__(self) -> None:
        super().__init__()
        self.behind = nn.Linear(4, 5)
        parametrize.register_parametrization(self.behind, "weight", Doubled())
        fastsn.spectral_norm(self.behind)


def weights_of(model: nn.Module) -> list[Tensor]:
    found = []
    for module in model.modules():
        if isinstance(module, NormalizedLayer):
            found.append(module.normalized()[0])
        elif parametrize.is_parametrized(module):
            found += [getattr(module, name) for name in module.parametrizations]
    return found


def train(model: nn.Module, scope: str) -> list[Tensor]:
    """A step and its backward: what it has served, the gradients and the vectors."""
    model.zero_grad()
    with fastsn.step(model) if scope == "step" else nullcontext():
        made = model() if scope == "fuse" else weights_of(model)
        loss = sum((w.double() * torch.linspace(-1, 1, w.numel()).view_as(w)).sum() for w in made)
    if loss.requires_grad:
        loss.backward()
    return [*made, *(torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()), *model.buffers()]


def assert_right(model: nn.Module, scope: str, context: Callable[[], Context] = nullcontext) -> None:
    """A step is that of a copy, for which nothing was ever found."""
    twin = copy.deepcopy(model)
    assert twin.__dict__.get("_fastsn_plan") is None
    with context():
        found = train(model, scope)
    with context():  # parametrize.cached() has one entry for a layer and its copies
        expected = train(twin, scope)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.stride(), a.requires_grad) == (b.dtype, b.stride(), b.requires_grad)
        assert torch.equal(a, b)


def used(scope: str, make: Callable[[], nn.Module] = Weights) -> nn.Module:
    """A model that has been used twice."""
    model = fastsn.fuse(make()) if scope == "fuse" else make()
    for _ in range(2):
        train(model, scope)
    return model


@pytest.fixture
def found(monkeypatch) -> list[nn.Module]:
    """The models for which the norms were looked for."""
    models: list[nn.Module] = []

    def weights(model: nn.Module, *rest: bool) -> list[object]:
        models.append(model)
        return sites_weights(model, *rest)

    sites_weights = plan.weights
    monkeypatch.setattr(plan, "weights", weights)
    return models


def unit(like: Tensor) -> Tensor:
    return nn.functional.normalize(torch.randn_like(like), dim=0)


def _swap(m: Weights) -> None:
    m.list[0], m.list[1][0] = m.list[1][0], m.list[0]


def _add_in_modules(m: Weights) -> None:
    m.list._modules["1"] = nn.Sequential(fastsn.BSNLinear(4, 2), fastsn.SNLinear(2, 2))


def _swap_in_modules(m: Weights) -> None:
    m._modules["learnt"], m._modules["dropin"] = m._modules["dropin"], m._modules["learnt"]


def _share_a_norm(m: Weights) -> None:
    m.list[0].spectral_norm = m.list[1][0].spectral_norm


def _tie(m: Weights) -> None:
    m.list[0].weight = m.list[1][0].weight


def _hook(m: Weights) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.no_grad()(nn.utils.weight_norm)(m.list[0])


def _stack(m: Weights) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fastsn.spectral_norm(m.dropin, variant="bsn")


def _buffer_in_place_of_parameter(m: Weights) -> None:
    weight = m.list[0].weight.detach().clone()
    del m.list[0].weight
    m.list[0].register_buffer("weight", weight * 3 + torch.eye(4))


CHANGES: dict[str, Callable[[Weights], object]] = {
    "Parameter": lambda m: setattr(m.list[0], "weight", nn.Parameter(torch.randn(4, 4))),
    "Parameter of a drop-in": lambda m: setattr(
        m.dropin.parametrizations.weight, "original", nn.Parameter(torch.randn(3, 4, 3, 3))
    ),
    "Parameter behind another": lambda m: setattr(
        m.behind.parametrizations.weight, "original", nn.Parameter(torch.randn(5, 4))
    ),
    "data": lambda m: setattr(m.learnt.weight, "data", torch.randn(4, 3, 3, 3)),
    "data, bfloat16": lambda m: setattr(m.learnt.weight, "data", torch.randn(4, 3, 3, 3).bfloat16()),
    "data, strides": lambda m: setattr(
        m.learnt.weight, "data", torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    ),
    "data behind another, half": lambda m: setattr(
        m.behind.parametrizations.weight.original, "data", torch.randn(5, 4).half()
    ),
    "in place": lambda m: m.learnt.weight.detach().mul_(torch.randn(4, 3, 3, 3)),
    "half": lambda m: m.half(),
    "bfloat16 of a layer": lambda m: m.dropin.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "load_state_dict": lambda m: m.load_state_dict(Weights().state_dict()),
    "load_state_dict, assign": lambda m: m.load_state_dict(Weights().state_dict(), assign=True),
    "buffer": lambda m: setattr(m.learnt.spectral_norm, "_u", unit(m.learnt.spectral_norm._u)),
    "data of a buffer": lambda m: setattr(m.learnt.spectral_norm._v, "data", unit(m.learnt.spectral_norm._v)),
    "warm_up": lambda m: fastsn.warm_up(m, 3),
    "advance": lambda m: fastsn.advance(m),
    "layer added": lambda m: setattr(m, "more", fastsn.BSNConv2d(3, 3, 3)),
    "layer appended": lambda m: m.list[1].append(fastsn.SNLinear(4, 2)),
    "layer inserted": lambda m: m.list.insert(0, fastsn.SNLinear(4, 2)),
    "layer deleted": lambda m: delattr(m, "learnt"),
    "layer popped": lambda m: m.list[1].pop(0),
    "layer replaced": lambda m: setattr(m, "learnt", fastsn.BSSNConv2d(3, 4, 3, scale=1.4)),
    "layer without a norm replaced": lambda m: setattr(m, "plain", fastsn.SNLinear(4, 4)),
    "layer set to None": lambda m: setattr(m, "learnt", None),
    "layers swapped": _swap,
    "_modules": _add_in_modules,
    "_modules swapped": _swap_in_modules,
    "norm replaced": lambda m: setattr(m.list[0], "spectral_norm", fastsn.SpectralNorm(m.list[0].weight)),
    "norm shared": _share_a_norm,
    "weight shared": _tie,
    "parametrization before": lambda m: parametrize.register_parametrization(m.list[0], "weight", Doubled()),
    "parametrization behind": lambda m: parametrize.register_parametrization(m.dropin, "weight", Doubled()),
    "parametrizations behind another swapped": lambda m: _swap_chain(m.behind.parametrizations.weight),
    "parametrization removed": lambda m: parametrize.remove_parametrizations(m.doubled, "weight"),
    "norm on another": _stack,
    "norm on another tensor": lambda m: fastsn.spectral_norm(m.plain, "other"),
    "norm on a tensor of one dimension": lambda m: fastsn.spectral_norm(m.plain, "bias"),
    "hook": _hook,
    "buffer in place of a Parameter": _buffer_in_place_of_parameter,
    "convert": lambda m: fastsn.convert(m, variant="bsn"),
    "convert to scaled": lambda m: fastsn.convert(m, variant="bssn", scale=1.3),
    "eval": lambda m: m.eval(),
    "eval of a layer": lambda m: m.dropin.eval(),
    "n_power_iterations": lambda m: setattr(m.learnt.spectral_norm, "n_power_iterations", 3),
    "scale": lambda m: setattr(m.list[1][0].spectral_norm, "scale", 1.9),
    "scale learnt": lambda m: setattr(m.list[1][0].spectral_norm, "scale", nn.Parameter(torch.tensor(1.9))),
    "scale replaced": lambda m: setattr(m.learnt.spectral_norm, "scale", nn.Parameter(torch.tensor(1.9))),
    "scale in place": lambda m: m.learnt.spectral_norm.scale.detach().mul_(1.1),
    "impl": lambda m: setattr(m.learnt.spectral_norm, "impl", "reference"),
    "dim": lambda m: setattr(m.list[0].spectral_norm, "dim", 1),
    "v_first": lambda m: setattr(m.list[0].spectral_norm, "v_first", True),
    "frozen": lambda m: m.requires_grad_(False),
    "frozen layer": lambda m: m.dropin.requires_grad_(False),
    "frozen weight": lambda m: m.learnt.weight.requires_grad_(False),
    "frozen scale": lambda m: m.learnt.spectral_norm.scale.requires_grad_(False),
    "fold of a layer": lambda m: fastsn.fold(m.learnt),
}


def _swap_chain(chain: parametrize.ParametrizationList) -> None:
    chain[0], chain[1] = chain[1], chain[0]


@pytest.mark.parametrize("scope", ["step", "fuse"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_step_after_a_change_is_right_and_so_is_the_one_after_it_is_undone(change, scope, found):
    model = used(scope, AlsoBehind if "behind another" in change else Weights)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    CHANGES[change](model)
    for _ in range(2):
        assert_right(model, scope)
    models = found.count(model)
    train(model, scope)
    assert found.count(model) == models  # what was found then is kept again
    if before.keys() == model.state_dict().keys():
        model.float().train().requires_grad_().load_state_dict(before)
        assert_right(model, scope)


@pytest.mark.parametrize("scope", ["step", "fuse"])
def test_what_was_found_is_kept_while_only_values_change(scope, found):
    model = used(scope)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(4):
        train(model, scope)
        optimizer.step()
        with torch.no_grad():
            model.learnt.weight.add_(1)
        model.load_state_dict(Weights().state_dict())
        fastsn.warm_up(model, 1)
        fastsn.sigmas(model)
        model.requires_grad_(False).requires_grad_()
        with torch.no_grad(), fastsn.step(model, advance=False):
            pass
    assert found == [model]


def test_a_model_of_300_layers_is_looked_through_once(found):
    model = nn.Sequential(*(fastsn.SNLinear(3, 3) for _ in range(200)))
    model.append(nn.Sequential(*(fastsn.spectral_norm(nn.Linear(3, 3)) for _ in range(100))))
    for _ in range(3):
        assert_right(model, "step")
    assert found.count(model) == 1
    model[200][99] = fastsn.BSNLinear(3, 3)
    assert_right(model, "step")
    assert found.count(model) == 2


def test_a_scale_that_is_no_parameter_but_another_tensor_of_the_same_value():
    """As replicas have them."""
    layer = fastsn.SSNLinear(4, 3)
    for _ in range(2):
        layer.spectral_norm.scale = torch.tensor(2.0, requires_grad=True)
        with Counted() as counted, fastsn.step(layer):
            y = layer(torch.ones(1, 4))
        y.sum().backward()
        assert layer.spectral_norm.scale.grad is not None
        assert counted.names == ["power_iteration_", "rescale"]


@pytest.mark.parametrize("what", ["weight", "u", "scale"])
def test_a_tensor_that_goes_to_meta_is_named_and_nothing_moves(what):
    model = used("step")
    norm = model.learnt.spectral_norm
    holder, name = {"u": (norm, "_u"), "scale": (norm, "scale")}.get(what, (model.learnt, "weight"))
    old = getattr(holder, name)
    meta = torch.empty_like(old, device="meta")
    setattr(holder, name, nn.Parameter(meta) if isinstance(old, nn.Parameter) else meta)
    before = state(model.list)
    with pytest.raises(ValueError, match=r"of 'learnt' must have values, got (a meta tensor|meta tensors)"):
        train(model, "step")
    assert moved(before, model.list) == set()
    setattr(holder, name, old)
    assert_right(model, "step")


@contextmanager
def cached_in_bfloat16() -> Iterator[None]:
    with torch.autocast(DEVICE, torch.bfloat16), parametrize.cached():
        yield


CONTEXTS: dict[str, Callable[[], Context]] = {
    "off": nullcontext,
    "bfloat16": lambda: torch.autocast(DEVICE, torch.bfloat16),
    "float16": lambda: torch.autocast(DEVICE, torch.float16),
    "disabled": lambda: torch.autocast(DEVICE, enabled=False),
    "cached": parametrize.cached,
    "cached in bfloat16": cached_in_bfloat16,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "forward mode": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("scope", ["step", "fuse"])
@pytest.mark.parametrize("first", CONTEXTS)
@pytest.mark.parametrize("second", ["off", "bfloat16", "cached in bfloat16", "inference"])
def test_the_context_of_each_step_counts(first, second, scope):
    model = fastsn.fuse(Weights()) if scope == "fuse" else Weights()
    for context in (first, second, first, second):
        assert_right(model, scope, CONTEXTS[context])


@pytest.mark.parametrize("first", ["off", "bfloat16", "float16", "cached in bfloat16", "no_grad"])
@pytest.mark.parametrize("second", ["off", "bfloat16", "float16", "cached in bfloat16"])
def test_in_every_context_all_weights_are_normalized_together(first, second):
    """Not once more when they are used."""
    model = Weights()
    del model.doubled  # which torch's cache would take from one step to the next
    for context in (first, second, first):
        with CONTEXTS[context](), Counted() as counted, fastsn.step(model):
            weights_of(model)
        assert counted.names == ["power_iteration_", "rescale"]


def test_kernels_that_are_asked_for_are_refused_in_transforms_of_a_used_model():
    needs_kernels()
    model = used("fuse", lambda: Weights().float())
    for norm in (module for module in model.modules() if isinstance(module, fastsn.SpectralNorm)):
        norm.impl = "cpp" if DEVICE == "cpu" else "triton"
    train(model, "fuse")
    with pytest.raises(RuntimeError, match=r"does not work inside torch\.func transforms"):
        torch.func.grad(lambda x: x * model()[0].sum())(torch.ones(()))


@pytest.mark.parametrize("scope", ["step", "fuse"])
def test_functional_call(scope):
    class Around(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> list[Tensor]:
            with fastsn.step(self.model) if scope == "step" else nullcontext():
                return self.model()

    model = used(scope)
    for requires_grad in (True, False):
        others = {name: torch.randn_like(p) for name, p in Around(model).named_parameters() if p.ndim > 1}
        others = {name: p.requires_grad_(requires_grad) for name, p in others.items()}
        made, expected = (functional_call(Around(each), others, ()) for each in (model, copy.deepcopy(model)))
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
        assert [w.requires_grad for w in made] == [w.requires_grad for w in expected]
        if requires_grad:
            sum(w.square().sum() for w in made).backward()
            assert sum(p.grad is not None for p in others.values()) == len(made)
        assert_right(model, scope)


def test_functional_call_with_weights_of_a_graph(found):
    """They are others each time, and their graph is not held."""
    model = used("fuse")
    gc.disable()
    try:
        others = {name: 2 * p for name, p in model.named_parameters() if p.ndim > 1}
        held = [weakref.ref(p) for p in others.values()]
        made = functional_call(model, others, ())
        assert all(w.requires_grad for w in made)
        del made, others
        assert [p() for p in held] == [None] * len(held)
    finally:
        gc.enable()
    models = found.count(model)
    assert_right(model, "fuse")
    assert found.count(model) == models


def test_function_transforms():
    model = used("fuse").eval()
    train(model, "fuse")
    twin = copy.deepcopy(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}

    def loss(each: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return sum((w * w.detach().cos()).sum() for w in functional_call(each, parameters, ()))

    stacked = {name: torch.stack([p, 2 * p + 0.1]) for name, p in parameters.items()}
    for _ in range(2):
        for transform, given in (
            (lambda f: torch.func.grad(f), parameters),
            (lambda f: torch.func.vmap(f), stacked),
            (lambda f: torch.func.vmap(torch.func.grad(f)), stacked),
        ):
            found, expected = (
                transform(lambda p, each=each: loss(each, p))(given) for each in (model, copy.deepcopy(twin))
            )
            torch.testing.assert_close(found, expected)
        assert_right(model, "fuse")


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


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_an_export_to_onnx_of_a_used_model_is_refused_as_of_a_new_one(impl):
    net = fastsn.fuse(nn.Sequential(fastsn.SNLinear(3, 4, impl=impl), fastsn.SNLinear(4, 2, impl=impl))).eval()
    x = torch.randn(1, 3)
    net(x)
    warnings.simplefilter("ignore")  # the exporter's; pytest takes it back
    with pytest.raises(RuntimeError, match=r"call fastsn\.fold\(model\) before"):
        torch.onnx.export(net, (x,), io.BytesIO(), dynamo=False)
