"""A folded model is plain torch: it goes wherever plain models go."""

from __future__ import annotations

import copy
import io
import warnings

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import fastsn
from dispatched import needs_kernels
from networks import batch, network


def folded() -> tuple[nn.Module, Tensor, Tensor]:
    """The model, an input, and what it computed in evaluation before it was folded."""
    net, x = fastsn.fuse(network()), batch()
    for _ in range(3):
        net(x)
    net.eval()
    with torch.no_grad():
        expected = net(x)
    return fastsn.fold(net).eval(), x, expected


def test_no_trace_of_fastsn_is_left():
    net, x, expected = folded()
    assert torch.equal(net(x), expected)
    assert not any(type(module).__module__.startswith("fastsn") for module in net.modules())
    assert not any("spectral_norm" in key or key.endswith(("_u", "_v")) for key in net.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_torch_export():
    net, x, expected = folded()
    program = torch.export.export(net, (x,))
    assert not any("fastsn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript(how):
    net, x, expected = folded()
    nn.utils.parametrize.remove_parametrizations(net[0], "weight")  # weight_norm's, which cannot be scripted
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit.*is deprecated")
        made = torch.jit.trace(net, x) if how == "trace" else torch.jit.script(net)
        file = io.BytesIO()
        torch.jit.save(made, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    assert torch.equal(loaded(x), expected)


def test_onnx():
    net, x, expected = folded()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(net, (x,), file, dynamo=False, input_names=["x"])
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}
    (found,) = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("fused", [False, True])
def test_onnx_of_a_model_that_is_not_folded_is_told_to_fold(impl, fused):
    layers = fastsn.SNLinear(3, 4, impl=impl), fastsn.spectral_norm(nn.Linear(4, 2), impl=impl)
    net = fastsn.fuse(nn.Sequential(*layers)) if fused else nn.Sequential(*layers)
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", kind)
        for _ in range(2):  # new, and with a plan
            with pytest.raises(RuntimeError, match=r"call fastsn\.fold\(model\) before torch\.onnx\.export"):
                torch.onnx.export(net.eval(), (torch.randn(2, 3),), io.BytesIO(), dynamo=False)
            net(torch.randn(2, 3))
        torch.onnx.export(fastsn.fold(net), (torch.randn(2, 3),), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_newer_exporter_is_told_to_fold_in_both_of_its_attempts(training, strict, monkeypatch):
    """It calls torch.export, and once more with strict=True if that has failed."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for impl in ("reference", "auto" if fastsn.backends()["cpp"].available else "reference"):
        net, x = nn.Sequential(fastsn.SNLinear(3, 4, impl=impl)).train(training), torch.randn(2, 3)
        if impl == "reference" and not training:
            torch.testing.assert_close(torch.export.export(net, (x,), strict=strict).module()(x), net(x))
        else:
            with pytest.raises(RuntimeError, match=r"call fastsn\.fold\(model\) before"):
                torch.export.export(net, (x,), strict=strict)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_can_also_be_exported_as_it_is(training, fused):
    """For training on another machine that has fastsn: two ops, whatever the number of layers; each has two of its own
    where they are not fused."""
    needs_kernels()
    net, x = (fastsn.fuse(network()) if fused else network()).train(training), batch()
    twin = copy.deepcopy(net)
    program = torch.export.export(net, (x,))
    names = [str(node.target) for node in program.graph.nodes if "fastsn" in str(node.target)]
    assert len(names) == (2 if fused else 10)  # a layer of five uses is used twice
    for _ in range(2):  # the exported program moves u and v too
        torch.testing.assert_close(program.module()(x), twin(x))
