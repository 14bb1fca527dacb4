"""Averaged copies of a model: what becomes of u and v, and what helps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import fastsn

EMA = {"multi": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, "single": {"avg_fn": get_ema_avg_fn(0.9)}}
DIRECTIONS = [torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(i)))[0] for i in (1, 2)]


def network() -> nn.Sequential:
    return nn.Sequential(
        fastsn.BSNConv2d(6, 6, 3, n_power_iterations=5),
        nn.Flatten(),
        fastsn.SNLinear(6, 6, n_power_iterations=5),
        fastsn.spectral_norm(nn.Linear(6, 6), n_power_iterations=5),
    )


def originals(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.ndim > 1]


def drift(model: nn.Module, time: int) -> None:
    """Weights whose first two singular values, 2 and 1, move towards one another, and cross at time 50."""
    values = torch.tensor([2 - time / 100, 1 + time / 100, 0.3, 0.2, 0.1, 0])
    matrix = DIRECTIONS[0] @ values.diag() @ DIRECTIONS[1]
    positions = torch.full((3, 3), 1 / 3)  # of length 1: both reshapes of the kernel have these singular values
    with torch.no_grad():
        for weight in originals(model):
            weight.copy_(matrix if weight.ndim == 2 else matrix[..., None, None] * positions)


def averaged(copied: bool, **options) -> tuple[nn.Module, AveragedModel]:
    model = network()
    ema = AveragedModel(model, **options)
    for time in range(71):
        drift(model, time)
        model(torch.randn(1, 6, 3, 3))
        ema.update_parameters(model)
        if copied:
            assert fastsn.copy_vectors(model, ema) is ema
    return model, ema.eval()


def errors(model: nn.Module) -> list[float]:
    """How far the norm of each W̄ that evaluation uses is from 1."""
    inner = model.module
    weights = [inner[0].normalized()[0], inner[2].normalized()[0], inner[3].weight]
    return [float(torch.linalg.matrix_norm(w.detach().flatten(1), 2)) - 1 for w in weights]


@pytest.mark.parametrize("kind", EMA)
def test_averaged_vectors_are_short_and_evaluation_is_off(kind):
    """The test of the tests below."""
    _, ema = averaged(False, use_buffers=True, **EMA[kind])
    assert all(error > 0.2 for error in errors(ema))
    assert all(vector.norm() < 0.95 for vector in ema.module[2].spectral_norm.buffers())


@pytest.mark.parametrize("kind", EMA)
def test_with_copied_vectors_evaluation_is_right(kind):
    model, ema = averaged(True, use_buffers=True, **EMA[kind])
    assert errors(ema) == pytest.approx([0, 0, 0], abs=2e-3)
    for ours, theirs in zip(ema.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("kind", EMA)
def test_without_use_buffers_the_vectors_are_copied_by_torch(kind):
    model, ema = averaged(False, use_buffers=False, **EMA[kind])
    assert errors(ema) == pytest.approx([0, 0, 0], abs=2e-3)
    before = [x.clone() for x in ema.module.buffers()]
    fastsn.copy_vectors(model, ema)
    assert all(torch.equal(a, b) for a, b in zip(before, ema.module.buffers(), strict=True))


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("options", [{}, EMA["multi"]], ids=["equal", "exponential"])
def test_warm_up_is_right_whatever_the_average(options, copied):
    """The equal average of all times is far from the weights that train, where their vectors are of no use."""
    _, ema = averaged(copied, use_buffers=True, **options)
    if not options:
        assert min(errors(ema)) > 0.1
    fastsn.warm_up(ema, 200)
    assert errors(ema) == pytest.approx([0, 0, 0], abs=1e-5)


def test_copying_is_in_place_by_name_and_leaves_weights_and_scales_alone():
    scale = torch.tensor(1.5)
    source, target = (nn.Sequential(fastsn.BSSNConv2d(2, 3, 3, scale=c), nn.BatchNorm2d(3)) for c in (scale, 2 * scale))
    source[1].running_mean.fill_(7)
    target.double()
    before = {name: (x, x.data_ptr(), x.detach().clone()) for name, x in target.state_dict(keep_vars=True).items()}
    fastsn.copy_vectors(source, target)
    for name, now in target.state_dict(keep_vars=True).items():
        tensor, place, value = before[name]
        assert now is tensor
        assert now.data_ptr() == place
        assert torch.equal(now, source.get_buffer(name).double() if "._" in name else value)
    assert now.dtype == torch.int64  # the last one counts batches: the loop has seen all


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, AveragedModel, lambda m: nn.DataParallel(compiled(m))])
def test_names_are_those_inside_torchs_wrappers(wrap):
    model = network()
    wrapped, target = wrap(model), network()
    fastsn.copy_vectors(wrapped, target)
    assert all(torch.equal(a, b) for a, b in zip(target.buffers(), model.buffers(), strict=True))
    for vector in target.buffers():
        vector.zero_()
    fastsn.copy_vectors(target, wrapped)
    inner = wrapped.module if isinstance(wrapped, AveragedModel) else model
    assert all(not vector.any() for vector in inner.buffers())


def test_names_inside_the_users_own_wrapper_count():
    model = network()
    holder = nn.ModuleDict({"discriminator": model})
    with pytest.raises(ValueError, match=r"target must have the norms of source, got none with 'discriminator\.0\."):
        fastsn.copy_vectors(holder, model)
    fastsn.copy_vectors(holder["discriminator"], model)


def test_what_does_not_match_is_named_and_nothing_is_copied():
    source = nn.Sequential(fastsn.BSNConv2d(3, 4, 3), fastsn.SNLinear(4, 5))
    cases = {
        r"target must have the norms of source, got none with '0\.spectral_norm\._u_in'": fastsn.SNConv2d(3, 4, 3),
        r"source must have the norms of target, got none with '2\.spectral_norm\._u'": fastsn.BSNConv2d(3, 4, 3),
        r"'1\.spectral_norm\._v' of target must have the shape in source, \[4\], got \[6\]": fastsn.BSNConv2d(3, 4, 3),
        r"'1\.spectral_norm\._u' of target must have values, got a meta tensor": fastsn.BSNConv2d(3, 4, 3),
    }
    for message, first in cases.items():
        target = nn.Sequential(first, fastsn.SNLinear(6 if "shape" in message else 4, 5))
        if "source must" in message:
            target.append(fastsn.SNLinear(2, 2))
        if "meta" in message:
            target[1].to("meta")
        before = copy.deepcopy(list(target[0].buffers()))
        with pytest.raises(ValueError, match=message):
            fastsn.copy_vectors(source, target)
        assert all(torch.equal(a, b) for a, b in zip(before, target[0].buffers(), strict=True))
    with pytest.raises(ValueError, match=r"'0\.spectral_norm\._u' of source must have values, got a meta tensor"):
        fastsn.copy_vectors(copy.deepcopy(source).to("meta"), source)
    for arguments, name in ((([], source), "source"), ((source, []), "target")):
        with pytest.raises(TypeError, match=f"{name} must be an nn.Module, got list"):
            fastsn.copy_vectors(*arguments)


@pytest.mark.parametrize("lacks", ["source", "target"])
def test_vectors_are_copied_between_models_that_have_some(lacks):
    models = {"source": network(), "target": network(), lacks: nn.Linear(4, 4)}
    with pytest.raises(ValueError, match=f"{lacks} must have norms of fastsn, got none"):
        fastsn.copy_vectors(**models)


def test_training_goes_on_after_a_copy_between_forward_and_backward():
    """Graphs hold vectors of their own."""
    layer, other, x = fastsn.SNLinear(6, 5), fastsn.SNLinear(6, 5), torch.randn(3, 6)
    twin = copy.deepcopy(layer)
    loss = layer(x).square().sum()
    fastsn.copy_vectors(other, layer)
    loss.backward()
    twin(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, twin.weight.grad)
