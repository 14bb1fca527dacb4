"""What spectral normalization is compared with: each does to weights and outputs what its definition says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gan import models, probes
from gan.config import Config
from gan.norms import baselines
from norm_cases import CNN, LAYERS, NORMS, RESNET, SCHEDULES, batches, same_bits, state, training

CONCAT = {"conditional": "concat"}


def test_rows_of_weight_norm_have_length_1_in_every_kind_of_layer():
    made = training(RESNET, 3, norm="wn", **CONCAT)
    made.advance(batches(made))
    weights = made.norm.weights()
    assert "embedding" in weights
    assert "linear" in weights
    for weight in weights.values():
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.ones(len(weight)))


@pytest.mark.parametrize(
    ("layer", "plain", "input"),
    [
        (baselines.WNConv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 7)),
        (baselines.WNLinear(5, 2), nn.Linear(5, 2), (3, 5)),
        (baselines.WNEmbedding(4, 6), nn.Embedding(4, 6), None),
    ],
)
def test_weight_norm_is_the_layer_of_torch_with_unit_rows_and_leaves_zeros_alone(layer, plain, input):
    with torch.no_grad():
        layer.weight[1] = 0
        plain.load_state_dict(layer.state_dict())
        for row in (0, 2, 3)[: len(plain.weight) - 1]:
            plain.weight[row] /= plain.weight[row].norm()
    x = torch.tensor([0, 1, 3]) if input is None else torch.randn(input)
    torch.testing.assert_close(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_layer_norm_gives_every_sample_mean_0_and_variance_1_before_the_bias():
    layer = baselines.LNConv2d(3, 5, 3, padding=1)
    nn.init.normal_(layer.bias)
    x = 10 * torch.randn(4, 3, 6, 7) + 3
    y = layer(x) - layer.bias.view(-1, 1, 1)
    z = nn.functional.conv2d(x, layer.weight, padding=1)
    mean, var = z.mean((1, 2, 3), keepdim=True), z.var((1, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(y, (z - mean) / (var + 1e-5).sqrt(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y.mean((1, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((1, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)


def test_batch_norm_gives_every_channel_its_bias_as_mean_and_variance_1_in_any_mode():
    layer = baselines.BNConv2d(3, 5, 4, stride=2, padding=1)
    nn.init.normal_(layer.bias)
    x = 10 * torch.randn(4, 3, 8, 6) + 3
    z = nn.functional.conv2d(x, layer.weight, stride=2, padding=1)
    mean, var = (f((0, 2, 3), keepdim=True) for f in (z.mean, lambda *d, **k: z.var(*d, correction=0, **k)))
    expected = (z - mean) / (var + 1e-5).sqrt() + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    for y in (layer(x), layer.eval()(x)):
        torch.testing.assert_close(y.mean((0, 2, 3)), layer.bias.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(5), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3, 2, 2))


@pytest.mark.parametrize("kind", [baselines.LNConv2d, baselines.BNConv2d])
@pytest.mark.parametrize("bias", [True, False])
def test_with_autocast_outputs_are_bf16_and_nearly_the_same(kind, bias):
    layer, x = kind(3, 5, 3, bias=bias), torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)


DOUBLE = {"dtype": torch.float64}
DIFFERENTIABLE = {
    "weight norm": (baselines.WNConv2d(2, 3, 3, **DOUBLE), (2, 2, 4, 4)),
    "weight norm, linear": (baselines.WNLinear(4, 3, **DOUBLE), (2, 4)),
    "layer norm": (baselines.LNConv2d(2, 3, 3, **DOUBLE), (2, 2, 4, 4)),
    "batch norm": (baselines.BNConv2d(2, 3, 3, **DOUBLE), (2, 2, 4, 4)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_layers_are_differentiable_twice(name):
    layer, shape = DIFFERENTIABLE[name]

    def output(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = torch.randn(shape, **DOUBLE, requires_grad=True), layer.weight, layer.bias
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


@pytest.mark.parametrize("limit", [0.01, 0.004])
def test_after_every_step_no_parameter_exceeds_the_clip(limit):
    made = training(norm="clip", clip=limit, n_dis=2)
    assert max(float(p.detach().abs().max()) for p in made.discriminator.parameters()) > limit
    for _ in range(2):
        made.advance(batches(made))
        found = [float(p.detach().abs().max()) for p in made.discriminator.parameters()]
        assert max(found) == pytest.approx(limit)
    assert max(float(p.detach().abs().max()) for p in made.generator.parameters()) > 0.02


@pytest.mark.parametrize(("base", "classes", "changes"), [(CNN, 0, {}), (RESNET, 3, CONCAT)])
def test_orthonormal_weights_start_with_a_gram_matrix_of_1(base, classes, changes):
    made = training(base, classes, norm="orthonormal", **changes)
    layers = [m for m in made.discriminator.modules() if isinstance(m, LAYERS)]
    assert {type(m) for m in layers} == {nn.Conv2d, nn.Linear} | ({nn.Embedding} if classes else set())
    for layer in layers:
        m = layer.weight.detach().flatten(1)
        gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
    assert float(made.norm.penalty().detach()) < 1e-8
    again = training(base, classes, norm="orthonormal", **changes)
    assert same_bits(state(made.discriminator), state(again.discriminator))
    other = training(base, classes, norm="orthonormal", seed=1, **changes)
    assert not same_bits(state(made.discriminator), state(other.discriminator))


def test_the_orthonormal_penalty_by_hand():
    """A row (3, 4): (25 - 1)². A convolution of one input channel, column (2, 1, 0): (5 - 1)². A table 2 x 3 with rows
    (1, 1, 0), (0, 1, 0): the matrix (2, 1; 1, 1) less that of ones on the diagonal, 1 + 1 + 1 + 0."""
    model = nn.ModuleList([nn.Linear(2, 1), nn.Conv2d(1, 3, 1), nn.Embedding(2, 3)])
    for layer, values in zip(model, ([3, 4], [2, 1, 0], [1, 1, 0, 0, 1, 0]), strict=True):
        layer.weight.data = torch.tensor(values, dtype=torch.float64).view_as(layer.weight).requires_grad_()
    assert baselines.orthonormal_penalty(model).item() == 24**2 + 4**2 + 3

    def penalty(*weights: Tensor) -> Tensor:
        return sum(baselines._distance_from_orthonormal(w.flatten(1)) for w in weights)

    assert torch.autograd.gradcheck(penalty, [layer.weight for layer in model])


def test_the_orthonormal_penalty_is_part_of_the_discriminators_loss():
    made = {weight: training(norm="orthonormal", orthonormal_penalty=weight) for weight in (0.0, 3.0)}
    for each in made.values():
        with torch.no_grad():
            for parameter in each.discriminator.parameters():
                parameter.mul_(1.5)
    penalty = made[0.0].norm.penalty()
    expected = torch.autograd.grad(penalty, [p for p in made[0.0].discriminator.parameters() if p.ndim > 1])
    scalars = [each.advance(batches(each)) for each in made.values()]
    assert [float(x["loss/orthonormal"]) for x in scalars] == [pytest.approx(float(penalty.detach()))] * 2
    assert float(scalars[0]["loss/d"]) == pytest.approx(float(scalars[1]["loss/d"]))  # without the penalty
    without, with_it = ([p.grad for p in each.discriminator.parameters() if p.ndim > 1] for each in made.values())
    for a, b, gradient in zip(without, with_it, expected, strict=True):
        torch.testing.assert_close(b - a, 3 * gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("base", "classes", "changes"), [(CNN, 0, {}), (RESNET, 3, {"conditional": "projection"})])
def test_every_norm_has_the_parameters_of_none_at_their_first_values(norm, base, classes, changes):
    """Values, but for orthonormal ones; multipliers would be more names."""
    _, plain = models.build(Config(name="x", **base, **changes, norm="none"), 3, classes)
    _, found = models.build(Config(name="x", **base, **changes, norm=norm), 3, classes)
    expected, own = dict(plain.named_parameters()), dict(found.named_parameters())
    assert [(name, x.shape) for name, x in own.items()] == [(name, x.shape) for name, x in expected.items()]
    assert (norm == "orthonormal") != all(torch.equal(own[name], x) for name, x in expected.items())
    assert found.training
    for module in found.modules():
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("norm", NORMS)
def test_what_only_looks_changes_nothing(norm, schedule):
    made = training(norm=norm, u_schedule=schedule)
    made.advance(batches(made))
    before = state(made.discriminator)
    slopes, weights, again = probes.slopes(made), made.norm.weights(), made.norm.weights()
    made.norm.sigmas()
    with made.norm.at_rest():
        made.discriminator(made.last[0])
    assert same_bits(before, state(made.discriminator))
    assert all(math.isfinite(x) for x in slopes.values())
    assert same_bits(weights, again)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("norm", "changes"),
    [(norm, {"scale": 1.3} if norm in ("ssn", "bssn", "sn_conv") else {}) for norm in NORMS if norm not in ("ln", "bn")]
    + [("sn", {"gamma": "same"})],
)
def test_the_weights_of_a_norm_are_those_of_the_next_forward(norm, changes, schedule):
    """A plain network that has them gives the same scores."""
    made = training(RESNET, 3, norm=norm, u_schedule=schedule, conditional="projection", **changes)
    if "gamma" not in changes:  # whose factor multiplies biases, too: they stay zero
        made.advance(batches(made))
    plain = training(RESNET, 3, norm="none", conditional="projection").discriminator
    weights = made.norm.weights()
    held = state(made.discriminator)
    plain.load_state_dict({k: weights.get(k.removesuffix(".weight"), held[k]) for k in plain.state_dict()})
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    with made.norm.during_a_step():
        scores = made.discriminator(images, labels)
    torch.testing.assert_close(scores, plain(images, labels), rtol=1e-4, atol=1e-6)
    names = {name for name, m in plain.named_modules() if isinstance(m, LAYERS)}
    assert set(weights) == names


@pytest.mark.parametrize("norm", ["ln", "bn"])
def test_where_outputs_are_normalized_the_weights_are_the_parameters(norm):
    made = training(norm=norm)
    parameters = dict(made.discriminator.named_parameters())
    weights = made.norm.weights()
    assert len(weights) == 8
    assert all(torch.equal(x, parameters[f"{name}.weight"]) and not x.requires_grad for name, x in weights.items())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("base", [CNN, {**RESNET, "conditional": "concat", "order": "g_first", "z_of_g": "fresh"}])
@pytest.mark.parametrize("more", [{"precision": "bf16"}, {"gradient_penalty": 10.0, "loss": "wasserstein"}])
def test_every_norm_trains(norm, base, more):
    made = training(base, 3, norm=norm, n_dis=2, **more)
    before = state(made.discriminator)
    for _ in range(2):
        scalars = made.advance(batches(made))
        assert all(x.dtype == torch.float32 and math.isfinite(x) for x in scalars.values())
    assert ("loss/orthonormal" in scalars) == (norm == "orthonormal")
    after = state(made.discriminator)
    still = [name for name, x in before.items() if torch.equal(x, after[name])]
    assert not [name for name in still if name.endswith("weight")]


def test_the_last_convolution_of_a_cnn_has_a_width_of_its_own():
    plain, wide = (training(last_width=w).discriminator for w in (1.0, 3.0))
    assert [c.out_channels for c in plain.convs if isinstance(c, nn.Conv2d)] == [3, 3, 6, 6, 13, 13, 26]
    assert [c.out_channels for c in wide.convs if isinstance(c, nn.Conv2d)] == [3, 3, 6, 6, 13, 13, 77]
    generators = [training(last_width=w).generator for w in (1.0, 3.0)]
    assert same_bits(*(state(g) for g in generators))
