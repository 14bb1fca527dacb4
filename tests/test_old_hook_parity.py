"""After convert, a model with torch's old hook trains on with the numbers that it would have had."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook

import fastsn
from families import MultiScaleDiscriminator, ProjectionDiscriminator, UNetDiscriminator
from family_tasks import gan_loss, images, waves

STEPS, BOUND = 50, 1e-9


def upscaler(model: nn.Module) -> tuple[list[Tensor], Tensor]:
    """Real-ESRGAN's step."""
    outputs = [model(images(0.5)), model(images())]
    return outputs, gan_loss(outputs[0], True) + gan_loss(outputs[1], False)


def vocoder(model: nn.Module) -> tuple[list[Tensor], Tensor]:
    """HiFi-GAN's step."""
    real, generated, *maps = model(waves(0.05)[..., :128], waves(0.2)[..., :128])
    loss = sum((1 - r).square().mean() + g.square().mean() for r, g in zip(real, generated, strict=True))
    return [*real, *generated, *(x for group in maps for each in group for x in each)], loss


def projection(model: nn.Module) -> tuple[list[Tensor], Tensor]:
    """SN-GAN's step: the hinge loss."""
    outputs = [model(torch.randn(2, 3, 16, 16), torch.randint(4, (2,))) for _ in range(2)]
    return outputs, F.relu(1 - outputs[0]).mean() + F.relu(1 + outputs[1]).mean()


class Case(NamedTuple):
    """A model, a step of its training (outputs and loss), and the part that uses each of its layers once a forward."""

    build: Callable[[], nn.Module]
    step: Callable[[nn.Module], tuple[list[Tensor], Tensor]]
    once: Callable[[nn.Module], nn.Module] = lambda model: model


CASES = {
    "upscaler": Case(partial(UNetDiscriminator, width=4), upscaler),
    "vocoder": Case(partial(MultiScaleDiscriminator, 16), vocoder, lambda model: model.discriminators[0]),
    "projection": Case(partial(ProjectionDiscriminator, 4, 8), projection),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


pytestmark = pytest.mark.usefixtures("in_float64")


def norms(model: nn.Module) -> list[fastsn.SpectralNorm]:
    return [m for m in model.modules() if isinstance(m, fastsn.SpectralNorm)]


def alike(case: Case, count: int = 2) -> list[nn.Module]:
    """Models with the old hook and the same state, of which the first has been used."""
    models = [case.build() for _ in range(count)]
    case.step(models[0])
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return models


def gaps(case: Case, theirs: nn.Module, *ours: nn.Module, steps: int = STEPS) -> list[float]:
    """All train: the largest difference of each of ours from theirs in outputs, parameters, u and v of any step."""
    models = theirs, *ours
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4) for model in models]
    found = [0.0] * len(ours)
    for step in range(steps):
        tensors = []
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            outputs, loss = case.step(model)
            loss.backward()
            optimizer.step()
            state = fastsn.convert_state_dict(model.state_dict(), to="torch_hook")
            tensors.append({**state, **{f"output {i}": x.detach() for i, x in enumerate(outputs)}})
        for i, mine in enumerate(tensors[1:]):
            assert mine.keys() == tensors[0].keys()
            found[i] = max(found[i], *(float((x - mine[name]).abs().max()) for name, x in tensors[0].items()))
    return found


@cases
def test_training_goes_on_with_the_numbers_of_the_old_hook(case):
    theirs, *ours = alike(case, 4)
    for model, impl in zip(ours, ("auto", "auto", "reference"), strict=True):
        for norm in norms(fastsn.convert(model)):
            norm.impl = impl
    for model in ours[1:]:
        fastsn.fuse(case.once(model))
    assert max(gaps(case, theirs, *ours)) < BOUND


def test_several_iterations_and_another_dim_at_once():
    def build() -> nn.Module:
        up = hook(nn.ConvTranspose2d(3, 4, 3), n_power_iterations=3)
        return nn.Sequential(up, nn.Tanh(), hook(nn.Conv2d(4, 2, 2), dim=2), nn.Flatten(), hook(nn.Linear(50, 1)))

    def step(model: nn.Module) -> tuple[list[Tensor], Tensor]:
        output = model(torch.randn(2, 3, 4, 4))
        return [output], output.square().mean()

    case = Case(build, step)
    theirs, ours = alike(case)
    assert max(gaps(case, theirs, fastsn.convert(ours))) < BOUND


@cases
def test_in_the_order_of_the_parametrization_training_differs_at_first(case):
    theirs, ours = alike(case)
    assert not any(norm.v_first for norm in norms(fastsn.convert(ours, order="torch")))
    assert min(gaps(case, theirs, ours, steps=1)) > 1e4 * BOUND


def test_the_order_of_the_parametrization_gives_the_numbers_of_the_parametrization():
    layers = [wrap(nn.Conv2d(3, 5, 3)) for wrap in (parametrizations.spectral_norm, hook, hook)]
    state = layers[0].state_dict()
    for layer in layers[1:]:
        layer.load_state_dict(fastsn.convert_state_dict(state, to="torch_hook"))
    fastsn.convert(layers[1], order="torch")
    fastsn.convert(fastsn.convert(layers[2]), order="torch")  # a norm of fastsn too
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4)
        outputs = [layer(x) for layer in layers]
        for output, layer in zip(outputs[1:], layers[1:], strict=True):
            torch.testing.assert_close(output, outputs[0], rtol=BOUND, atol=BOUND)
            for name, value in layer.state_dict().items():
                torch.testing.assert_close(value, layers[0].state_dict()[name], rtol=BOUND, atol=BOUND)


def mixed() -> nn.Sequential:
    """One of each, and a layer of fastsn, with one that goes v first."""
    layers = nn.Sequential(hook(nn.Linear(3, 4)), parametrizations.spectral_norm(nn.Linear(4, 4)))
    layers.append(fastsn.convert(hook(nn.Conv2d(2, 3, 2)), "bssn", scale=1.3))
    layers.append(fastsn.BSNConv2d(2, 3, 2))
    layers.append(nn.Linear(4, 4))
    return layers


@pytest.mark.parametrize("variant", [None, "bsn"])
def test_each_norm_keeps_its_order_unless_asked(variant):
    model = fastsn.convert(mixed(), variant)
    assert [norm.v_first for norm in norms(model)] == [True, False, True, False]
    before = [
        (norm.variant, norm.scale, {name: x.clone() for name, x in norm.named_buffers()}) for norm in norms(model)
    ]
    assert fastsn.convert(model, variant, order="torch") is model
    assert [norm.v_first for norm in norms(model)] == [False] * 4
    for norm, (name, scale, vectors) in zip(norms(model), before, strict=True):
        assert (norm.variant, norm.scale) == (name, scale)
        assert all(torch.equal(x, vectors[name]) for name, x in norm.named_buffers())
    kept = norms(model)
    fastsn.convert(model, variant, order="torch")
    assert all(a is b for a, b in zip(kept, norms(model), strict=True))


def test_a_scale_that_is_learnt_is_kept_with_another_order():
    scale = nn.Parameter(torch.tensor(1.5))
    model = fastsn.convert(nn.Sequential(hook(nn.Linear(3, 4)), hook(nn.Linear(4, 2))), "bssn", scale=scale)
    fastsn.convert(model, order="torch")
    assert all(norm.scale is scale and not norm.v_first for norm in norms(model))


def test_what_is_skipped_keeps_its_order():
    model = fastsn.convert(mixed(), order="torch", skip="2")
    assert [norm.v_first for norm in norms(model)] == [False, False, True, False]


@pytest.mark.parametrize("order", ["hook", "u", "Torch", 1, True, torch.zeros(2)], ids=str)
def test_unknown_orders(order):
    model = mixed()
    with pytest.raises(ValueError, match=r"order must be None .* or 'torch' .*, got ") as error:
        fastsn.convert(model, order=order)
    assert repr(order) in str(error.value)
    assert not isinstance(model[0].weight, nn.Parameter)
    assert "weight_orig" in model[0]._parameters


def test_a_norm_may_go_v_first():
    weight = torch.randn(4, 3, 2)
    norm = fastsn.SpectralNorm(weight, variant="bsn", v_first=True)
    assert "v_first=True" in repr(norm)
    assert "v_first" not in repr(fastsn.SpectralNorm(weight))
    before = {name: x.clone() for name, x in norm.named_buffers()}
    matrices = {"": weight.flatten(1), "_in": weight.transpose(1, 2).reshape(8, 3)}
    norm(weight)
    copies = copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))
    for suffix, m in matrices.items():
        v = F.normalize(m.T @ before[f"_u{suffix}"], dim=0)
        torch.testing.assert_close(getattr(norm, f"_v{suffix}"), v)
        torch.testing.assert_close(getattr(norm, f"_u{suffix}"), F.normalize(m @ v, dim=0))
    expected = norm(weight)
    for each in copies:
        assert each.v_first
        assert torch.equal(each(weight), expected)


@pytest.mark.parametrize("v_first", [None, 1, "yes"])
def test_v_first_is_a_flag(v_first):
    with pytest.raises(TypeError, match=f"v_first must be True or False, got {v_first!r}"):
        fastsn.SpectralNorm(torch.randn(3, 4), v_first=v_first)


def test_whole_models_advance_and_warm_up_in_the_order_of_each_norm():
    for tool, rounds in ((fastsn.advance, 1), (fastsn.warm_up, 3)):
        theirs, ours = hook(nn.Linear(5, 4), n_power_iterations=rounds), hook(nn.Linear(5, 4))
        ours.load_state_dict(theirs.state_dict())
        fastsn.convert(ours)
        tool(ours, rounds)
        theirs(torch.randn(2, 5))
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, getattr(theirs, "weight" + name[-2:]), rtol=BOUND, atol=BOUND)


def test_a_compiled_step_goes_v_first_too():
    torch.compiler.reset()
    theirs, ours = hook(nn.Linear(5, 4)), hook(nn.Linear(5, 4))
    ours.load_state_dict(theirs.state_dict())
    fastsn.fuse(fastsn.convert(ours))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, 5)
        torch.testing.assert_close(compiled(x), theirs(x), rtol=BOUND, atol=BOUND)
