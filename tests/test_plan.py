"""What a step needs of a model is found once, and found anew as soon as anything has changed."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import fastsn
import plan_models
from dispatched import Counted, needs_kernels
from networks import moved, state
from plan_models import AlsoBehind, Doubled, Weights, assert_right, train, used, weights_of

Context = AbstractContextManager[object]
DEVICE = torch.get_default_device().type


@pytest.fixture
def found(monkeypatch) -> list[nn.Module]:
    return plan_models.searched(monkeypatch)


def unit(like: Tensor) -> Tensor:
    return nn.functional.normalize(torch.randn_like(like), dim=0)


def _swap(m: Weights) -> None:
    m.list[0], m.list[1][0] = m.list[1][0], m.list[0]


def _add_in_modules(m: Weights) -> None:
    m.list._modules["1"] = nn.Sequential(fastsn.BSNLinear(4, 2), fastsn.SNLinear(2, 2))


def _swap_in_modules(m: Weights) -> None:
    m._modules["learnt"], m._modules["dropin"] = m._modules["dropin"], m._modules["learnt"]


def _replace_the_dict_of_parameters(m: Weights) -> None:
    layer = m.list[0]
    layer.__dict__["_parameters"] = {**layer._parameters, "weight": nn.Parameter(torch.randn(4, 4))}


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
    "_parameters": _replace_the_dict_of_parameters,
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
