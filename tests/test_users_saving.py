"""What users of spectral norms suffer from, row by row: averages, copies, checkpoints, removal, export."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastsn

TORCH = parametrizations.spectral_norm


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def top(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2))


def layers() -> nn.Sequential:
    return nn.Sequential(fastsn.BSSNConv2d(2, 4, 3, scale=1.4), nn.Flatten(), fastsn.SNLinear(36, 3))


def parametrized(wrap=fastsn.spectral_norm) -> nn.Sequential:
    return nn.Sequential(wrap(nn.Conv2d(2, 4, 3)), nn.Flatten(), wrap(nn.Linear(36, 3)))


def image() -> Tensor:
    return torch.randn(2, 2, 5, 5)


def averaged(wrap, repair) -> tuple[float, list[float]]:
    """An average over a time in which the first two singular values change places, and with them u and v: the norm of
    W̄ in evaluation, the lengths of u and v."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(6, 6))[0] for _ in range(2))
    layer = wrap(nn.Linear(6, 6, bias=False), n_power_iterations=5)
    ema = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for time in range(71):
        values = torch.tensor([2 - time / 100, 1 + time / 100, 0.3, 0.2, 0.1, 0])
        original(layer).data = left @ values.diag() @ right
        layer(torch.randn(1, 6))
        ema.update_parameters(layer)
        repair(layer, ema)
    lengths = [float(vector.norm()) for vector in ema.module.parametrizations.weight[0].buffers()]
    return top(ema.eval().module.weight), lengths


def test_row_23_averages_of_u_and_v_are_too_short_and_copied_or_warmed_up_ones_are_not():
    norm, lengths = averaged(TORCH, lambda *_: None)
    assert max(lengths) < 0.95
    assert norm > 1.2
    for repair in (fastsn.copy_vectors, lambda _, ema: fastsn.warm_up(ema)):
        norm, lengths = averaged(fastsn.spectral_norm, repair)
        assert lengths == pytest.approx([1, 1], abs=1e-5)
        assert norm == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("build", [layers, parametrized])
@pytest.mark.parametrize("length", [0.94, 0.0, 30.0])
def test_row_23_warm_up_repairs_vectors_of_any_length(build, length):
    model = build()
    for vector in model.buffers():
        vector.mul_(length)
    fastsn.warm_up(model, 200)
    assert all(float(vector.norm()) == pytest.approx(1, abs=1e-5) for vector in model.buffers())
    last = model[2].eval()
    weight = last.normalized()[0] if build is layers else last.weight
    assert top(weight) == pytest.approx(1, abs=1e-4)


def test_row_24_a_model_can_be_copied_and_saved_at_any_time():
    """The hook leaves a graph on the module after a forward, which no copy can have."""
    old = hook(nn.Linear(36, 3))
    old(torch.randn(1, 36))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(old)
    for model in (layers(), fastsn.fuse(layers()), fastsn.convert(nn.Sequential(hook(nn.Conv2d(2, 4, 3))))):
        x = image()

        def check(model: nn.Module = model, x: Tensor = x) -> None:
            copies = [copy.deepcopy(model)]
            if isinstance(model[0], fastsn.BSSNConv2d):  # torch pickles no class that a parametrization has made
                file = io.BytesIO()
                torch.save(model, file)
                file.seek(0)
                copies += [pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
            expected = copy.deepcopy(model).eval()(x)
            assert all(torch.equal(each.eval()(x), expected) for each in copies)

        check()
        loss = model(x).sum()
        check()
        with fastsn.step(model):
            model(x)
            check()
        loss.backward()
        check()


def test_row_24_the_drop_in_says_what_torch_says_when_it_is_pickled():
    for wrap in (TORCH, fastsn.spectral_norm):
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules is only supported through"):
            pickle.dumps(wrap(nn.Linear(3, 3)))


@pytest.mark.parametrize("to", ["torch", "torch_hook", "biggan", "mimicry"])
def test_row_25_checkpoints_go_to_other_implementations_and_back(to):
    source = nn.Sequential(fastsn.SNConv2d(2, 4, 3), nn.Flatten(), fastsn.SNLinear(36, 3))
    for _ in range(30):
        source(image())
    state = source.state_dict()
    back = fastsn.convert_state_dict(fastsn.convert_state_dict(state, to=to), to="fastsn")
    assert set(back) == set(state)
    target, x = copy.deepcopy(source), image()
    for vector in target.buffers():
        vector.normal_()
    target.load_state_dict(back)
    torch.testing.assert_close(target.eval()(x), source.eval()(x), rtol=1e-3, atol=1e-4)


def test_row_25_old_and_new_checkpoints_of_torch_load_into_one_another():
    """torch's own two do not."""
    models = {"torch": parametrized(TORCH), "torch_hook": parametrized(hook)}
    x = image()
    for name, source in models.items():
        other = ({*models} - {name}).pop()
        source(x)
        expected = source.eval()(x)
        with pytest.raises(RuntimeError, match="Missing key"):
            models[other].load_state_dict(source.state_dict())
        target = copy.deepcopy(parametrized({"torch": TORCH, "torch_hook": hook}[other]))
        target.load_state_dict(fastsn.convert_state_dict(source.state_dict(), to=other))
        torch.testing.assert_close(target.eval()(x), expected)
        converted = fastsn.convert(parametrized({"torch": TORCH, "torch_hook": hook}[name]))
        converted.load_state_dict(source.state_dict())
        torch.testing.assert_close(converted.eval()(x), expected)


def test_row_26_initializing_a_layer_works_as_on_any_other():
    """On the drop-in, as on torch's, the weight is a result: its ``original`` is what can be drawn."""
    for wrap in (TORCH, fastsn.spectral_norm):
        layer = wrap(nn.Linear(6, 5))
        before = original(layer).detach().clone()
        nn.init.orthogonal_(layer.weight)
        assert torch.equal(original(layer), before)
    for layer in (fastsn.spectral_norm(nn.Linear(6, 5)), fastsn.SNLinear(6, 5)):
        weight = layer.weight if isinstance(layer, fastsn.SNLinear) else original(layer)
        nn.init.orthogonal_(weight)
        expected = weight.detach().clone()  # all of its singular values are 1
        fastsn.warm_up(layer.eval())
        normalized = layer.normalized()[0] if isinstance(layer, fastsn.SNLinear) else layer.weight
        torch.testing.assert_close(normalized.detach(), expected, rtol=1e-5, atol=1e-6)


def test_row_26_reset_parameters_redraws_the_weight_and_brings_u_and_v_along():
    layer = fastsn.BSNConv2d(3, 8, 3).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.reset_parameters()
    assert all(not torch.equal(before[name], value) for name, value in layer.state_dict().items())
    found = fastsn.sigmas(layer)[""]
    assert found.sigma_out == pytest.approx(top(layer.weight), rel=0.1)
    assert found.sigma_in == pytest.approx(top(layer.weight.transpose(0, 1)), rel=0.1)


def test_row_26_assigning_to_a_drop_in_stores_the_raw_weight():
    layer, value = fastsn.spectral_norm(nn.Linear(6, 5)), 7 * torch.randn(5, 6)
    parameter = original(layer)
    layer.weight = value
    assert original(layer) is parameter
    assert torch.equal(parameter, value)
    fastsn.warm_up(layer, 300)
    assert top(layer.eval().weight) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_row_27_removal_bakes_in_what_evaluation_used(training):
    """torch's removal runs one more iteration in training mode; the drop-in follows it there, fold does not."""
    x, model, other = image(), parametrized(), parametrized()
    for layer in (model[0], other[0]):
        original(layer).data.normal_()  # u and v have some way to go
    expected = [copy.deepcopy(each).eval()(x) for each in (model, other)]
    fastsn.fold(model.train(training))
    assert [type(model[0]), type(model[2])] == [nn.Conv2d, nn.Linear]
    assert torch.equal(model(x), expected[0])
    for layer in (other[0], other[2]):
        parametrize.remove_parametrizations(layer.train(training), "weight")
    assert torch.equal(other(x), expected[1]) == (not training)


@pytest.mark.parametrize("build", [layers, parametrized])
@pytest.mark.parametrize("folded", ["the copy", "the original"])
def test_row_27_a_folded_copy_leaves_the_model_as_it_is(build, folded):
    """torch's removal takes the weight from the copies of a parametrized module too: they share its class."""
    theirs = TORCH(nn.Linear(3, 3))
    parametrize.remove_parametrizations(copy.deepcopy(theirs), "weight")
    assert not hasattr(theirs, "weight")
    model, x = build(), image()
    clone = copy.deepcopy(model)
    gone, left = (clone, model) if folded == "the copy" else (model, clone)
    fastsn.fold(gone)
    left(x).sum().backward()
    again = copy.deepcopy(left)
    assert torch.equal(again.eval()(x), fastsn.fold(left.eval())(x))


def quietly(run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", ".torch.jit.*is deprecated", FutureWarning)  # since torch 2.14
        return run()


def exported_to_onnx(model: nn.Module, x: Tensor) -> bytes:
    file = io.BytesIO()
    quietly(lambda: torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], opset_version=20))
    return file.getvalue()


@pytest.mark.parametrize("build", [layers, parametrized])
def test_row_28_folded_models_go_to_onnx_and_torchscript(build):
    x = image()
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="vdot"):
        exported_to_onnx(parametrized(TORCH).eval(), x)
    model = build().eval()
    expected = model(x).detach()
    fastsn.fold(model)
    proto = onnx.load_from_string(exported_to_onnx(model, x))
    onnx.checker.check_model(proto)
    (found,) = ReferenceEvaluator(proto).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected)
    for scripted in (quietly(lambda: torch.jit.script(model)), quietly(lambda: torch.jit.trace(model, x))):
        torch.testing.assert_close(scripted(x).detach(), expected)


@pytest.mark.parametrize("training", [True, False])
def test_row_28_torch_export_takes_a_model_as_it_is_and_a_folded_one_without_our_ops(training):
    model, x = parametrized().train(training), image()
    twin = copy.deepcopy(model)
    program = torch.export.export(model, (x,)).module()
    for _ in range(2):  # in training u and v advance in it
        torch.testing.assert_close(program(x), twin(x))
    folded = torch.export.export(fastsn.fold(model), (x,))
    assert not any("fastsn" in str(node.target) for node in folded.graph.nodes)


def test_row_29_lazy_layers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"LazyLinear\.weight.*lazy"):
        fastsn.spectral_norm(nn.LazyLinear(5))
    layer = nn.LazyLinear(5)
    layer(torch.randn(2, 6))
    assert fastsn.spectral_norm(layer)(torch.randn(2, 6)).shape == (2, 5)


@pytest.mark.parametrize("build", [layers, parametrized])
def test_row_29_materialized_from_meta_a_model_is_warmed_up(build):
    """``to_empty`` leaves garbage in u and v, here the worst."""
    with torch.device("meta"):
        model = build()
    with pytest.raises(ValueError, match="got a meta tensor: materialize the model first"):
        fastsn.warm_up(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.buffers():
            tensor.fill_(torch.nan)
        for parameter in model.parameters():
            parameter.normal_()
    fastsn.warm_up(model, 300)
    last = model[2].eval()
    assert top(last.normalized()[0] if build is layers else last.weight) == pytest.approx(1, abs=1e-4)
