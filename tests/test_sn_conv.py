"""The norm of a convolution as an operator, at the size of its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from gan.norms import sn_conv
from gan.norms.sn_conv import OperatorConv2d
from norm_cases import CNN, RESNET, batches, same_bits, state, training

CASES = {
    "3x3": ((2, 4, 3, 1, 1), (6, 6)),
    "3x3, odd": ((3, 2, 3, 1, 1), (7, 5)),
    "4x4 by 2": ((2, 4, 4, 2, 1), (8, 8)),
    "4x4 by 2, odd": ((3, 2, 4, 2, 1), (7, 9)),
    "3x3 by 2, even": ((2, 3, 3, 2, 1), (6, 8)),
    "1x1": ((3, 5, 1, 1, 0), (4, 5)),
    "1x1 by 3": ((3, 2, 1, 3, 0), (5, 7)),
}


def dense(weight: Tensor, layer: OperatorConv2d, size: tuple[int, int]) -> Tensor:
    """The matrix (O·H'·W', I·H·W) of a convolution: column j is the convolution of basis image j."""
    inputs = layer.in_channels * size[0] * size[1]
    basis = torch.eye(inputs, dtype=weight.dtype).view(inputs, layer.in_channels, *size)
    return nn.functional.conv2d(basis, weight, None, layer.stride, layer.padding).flatten(1).T


def made(case: str, scale: float = 1.0) -> tuple[OperatorConv2d, tuple[int, int]]:
    (i, o, kernel, stride, padding), size = CASES[case]
    layer = OperatorConv2d(i, o, kernel, stride=stride, padding=padding, scale=scale, dtype=torch.float64)
    layer.see((i, *size))
    return layer, size


@pytest.mark.parametrize("case", CASES)
def test_sigma_is_the_largest_singular_value_of_the_dense_operator(case):
    layer, size = made(case, scale=1.7)
    nn.init.uniform_(layer.weight, -0.4, 1)  # mostly of one sign: one singular value far above the others
    for _ in range(300):
        layer.advance()
    left, values, right = torch.linalg.svd(dense(layer.weight.detach(), layer, size))
    assert sn_conv.sigmas(nn.Sequential(layer))["0"]["sigma"] == pytest.approx(float(values[0]), rel=1e-9)
    if values[1] < 0.95 * values[0]:  # not so for 1x1, which has the same values at every pixel
        assert abs(float(layer._u.flatten() @ left[:, 0])) == pytest.approx(1, abs=1e-9)
        assert abs(float(layer._v.flatten() @ right[0])) == pytest.approx(1, abs=1e-9)
    normalized = dense(layer.eval().normalized()[0].detach(), layer, size)
    assert float(torch.linalg.svdvals(normalized)[0]) == pytest.approx(1.7, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_one_iteration_is_that_of_the_matrix(case):
    layer, size = made(case)
    operator, v = dense(layer.weight.detach(), layer, size), layer._v.flatten()
    u = nn.functional.normalize(operator @ v, dim=0)
    expected = nn.functional.normalize(operator.T @ u, dim=0)
    found = layer.iterated()
    torch.testing.assert_close([x.flatten() for x in found], [u, expected])


def test_at_the_start_vectors_nearly_belong_to_the_weights():
    discriminator = training({**CNN, "image_size": 16}, norm="sn_conv").discriminator
    convolutions = [m for m in discriminator.modules() if isinstance(m, OperatorConv2d)]
    sigmas = sn_conv.sigmas(discriminator)
    assert len(sigmas) == len(convolutions) == 7
    for layer, found in zip(convolutions, sigmas.values(), strict=True):
        exact = float(torch.linalg.svdvals(dense(layer.weight.detach(), layer, layer._v.shape[2:]))[0])
        assert 0.9 * exact < found["sigma"] <= exact * (1 + 1e-5)


@pytest.mark.parametrize(
    ("base", "changes"), [(CNN, {}), (RESNET, {}), (RESNET, {"conditional": "concat"}), (CNN, {"image_size": 40})]
)
def test_every_convolution_has_vectors_of_the_size_that_it_meets(base, changes):
    discriminator = training({**base, **changes}, 3, norm="sn_conv").discriminator
    met: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}
    for layer in discriminator.modules():
        if isinstance(layer, OperatorConv2d):
            layer.register_forward_hook(lambda m, x, y: met.update({m: (x[0].shape[1:], y.shape[1:])}))
    size = {**base, **changes}["image_size"]
    discriminator(torch.randn(2, 3, size, size), torch.tensor([0, 2]))
    assert len(met) >= 7
    for layer, (inputs, outputs) in met.items():
        assert (layer._v.shape[1:], layer._u.shape[1:]) == (inputs, outputs)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_dense_formula_with_fixed_vectors(case):
    layer, size = made(case, scale=1.3)
    u, v = (x.clone() for x in (layer._u, layer._v))

    def ours(weight: Tensor) -> Tensor:
        return layer._divided(weight, u, v)

    def formula(weight: Tensor) -> Tensor:
        return 1.3 * weight / (u.flatten() @ dense(weight, layer, size) @ v.flatten())

    direction = torch.randn_like(layer.weight)
    found, expected = (torch.autograd.grad((f(layer.weight) * direction).sum(), layer.weight) for f in (ours, formula))
    torch.testing.assert_close(found, expected)
    if layer.weight.numel() < 100:
        assert torch.autograd.gradcheck(ours, layer.weight)
        assert torch.autograd.gradgradcheck(ours, layer.weight)


def test_a_zero_weight_stays_zero_with_finite_gradients():
    layer, size = made("4x4 by 2")
    nn.init.zeros_(layer.weight)
    before = state(layer)
    y = layer(torch.randn(2, 2, *size, dtype=torch.float64))
    (y**2 + y).sum().backward()
    assert y.abs().max() == layer.bias.abs().max()
    assert layer.weight.grad.isfinite().all()
    assert float(layer.weight.grad.abs().max()) > 0
    assert same_bits(before, state(layer))


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_weights_of_any_size_are_divided_exactly(factor):
    layer = OperatorConv2d(2, 3, 3, padding=1)
    layer.see((2, 5, 5))
    for _ in range(100):
        layer.advance()
    usual = layer.eval().normalized()[0].detach().clone()
    with torch.no_grad():
        layer.weight.mul_(factor)
    torch.testing.assert_close(layer.train().normalized()[0], usual, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["per_step", "per_d_step"])
def test_all_forwards_of_a_step_have_one_weight_after_one_iteration(schedule):
    of = training(norm="sn_conv", u_schedule=schedule)
    layer = of.discriminator.convs[4]
    u, v = layer.iterated()
    expected = layer._made(u, v).weight
    stored = layer._v.clone()
    with of.norm.during_a_step():
        first, second = layer.normalized()[0], layer.normalized()[0]
    assert first is second
    assert torch.equal(first, expected)
    assert torch.equal(layer._v, v if schedule == "per_step" else stored)


def test_after_a_d_step_vectors_are_one_iteration_by_the_updated_weights():
    of = training(norm="sn_conv", u_schedule="per_d_step")
    layer = of.discriminator.convs[4]
    old = copy.deepcopy(layer)
    of.advance(batches(of))
    assert not torch.equal(old.weight, layer.weight)
    old.weight.data = layer.weight.data
    old.advance()
    assert torch.equal(old._u, layer._u)
    assert torch.equal(old._v, layer._v)


def test_per_forward_every_forward_iterates_and_stores():
    layer, size = made("3x3")
    twin, x = copy.deepcopy(layer), torch.randn(1, 2, *size, dtype=torch.float64)
    for _ in range(3):
        layer(x)
        twin.advance()
        assert torch.equal(layer._v, twin._v)
    layer.eval()(x)
    assert torch.equal(layer._v, twin._v)


def test_steps_nest_and_end_with_an_exception_and_see_changed_weights():
    of = training(norm="sn_conv")
    layer = of.discriminator.convs[0]
    with of.norm.at_rest():
        outer = layer.normalized()[0]
        with of.norm.at_rest(), torch.no_grad():
            assert layer.normalized()[0] is not outer
        assert layer.normalized()[0] is outer
        with torch.no_grad():
            layer.weight[0].mul_(2)
        u, v = layer._held.u, layer._held.v
        expected = layer.weight / (u * nn.functional.conv2d(v, layer.weight, padding=1)).sum()
        torch.testing.assert_close(layer.normalized()[0], expected)
        assert layer.normalized()[0] is not outer
    with pytest.raises(ValueError, match="input must have the size"), of.norm.at_rest():
        layer(torch.randn(1, 3, 9, 9))
    assert layer._held is None


def test_a_step_that_is_opened_without_gradients_has_them_where_they_are_asked_for():
    of = training(norm="sn_conv")
    with torch.no_grad():
        step = of.norm.at_rest()
        step.__enter__()
    of.discriminator(torch.randn(2, 3, 8, 8)).sum().backward()
    step.__exit__(None, None, None)
    assert all(m.weight.grad.abs().max() > 0 for m in of.discriminator.modules() if isinstance(m, OperatorConv2d))


def test_autocast_does_not_reach_the_iteration():
    layer = OperatorConv2d(2, 3, 3, padding=1)
    layer.see((2, 5, 5))
    twin = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.normalized()[0]
        assert layer(torch.randn(1, 2, 5, 5)).dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    assert torch.equal(weight, twin.normalized()[0])


def test_sigmas_are_tagged_by_layer():
    found = training(norm="sn_conv").norm.sigmas()
    linear = {f"{kind}/linear" for kind in ("sigma", "sigma_out", "sigma_in")}
    assert set(found) == {f"sigma/convs.{i}" for i in range(0, 14, 2)} | linear
    assert all(x > 0 for x in found.values())


def test_a_checkpoint_of_another_image_size_is_refused():
    saved = training(norm="sn_conv").state()
    assert "convs.2._u" in saved["discriminator"]
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint of this run's networks.*size mismatch"):
        training(norm="sn_conv", image_size=16).load(saved)


def counting(traced: list[int]) -> Callable[[torch.fx.GraphModule, list[Tensor]], object]:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        traced.append(len(inputs))
        return aot_eager(graph, inputs)

    return backend


# torch's compiler hides this warning, but not from a filter that makes it an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_layer_iterates_at_every_forward():
    layer, x = OperatorConv2d(2, 3, 3, padding=1, dtype=torch.float64), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    layer.see((2, 6, 6))
    twin, traced = copy.deepcopy(layer), []
    torch.compiler.reset()
    compiled = torch.compile(twin, backend=counting(traced))
    for _ in range(3):
        expected, found = layer(x), compiled(x)
        torch.testing.assert_close(found, expected)
        for y in (expected, found):
            y.square().sum().backward()
    torch.testing.assert_close(twin.weight.grad, layer.weight.grad)
    torch.testing.assert_close(state(twin), state(layer))
    assert traced


def test_inputs_of_another_size_and_layers_that_cannot_be():
    layer = OperatorConv2d(2, 3, 3, padding=1)
    with pytest.raises(ValueError, match=r"input must have the size that see\(\) was given, none yet, got \(2, 5, 5\)"):
        layer(torch.randn(1, 2, 5, 5))
    layer.see((2, 5, 5))
    with pytest.raises(ValueError, match=r"\(2, 5, 5\), got \(2, 5, 6\)"):
        layer(torch.randn(1, 2, 5, 6))
    with pytest.raises(ValueError, match=r"padding must be numbers of zeros, got \(1, 1\) of 'circular'"):
        OperatorConv2d(2, 3, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match="padding must be numbers of zeros, got 'same'"):
        OperatorConv2d(2, 3, 3, padding="same")
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be finite and positive, got"):
            OperatorConv2d(2, 3, 3, scale=scale)
