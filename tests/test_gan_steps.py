"""What one step of a GAN does to weights, vectors and statistics."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import fastsn
import restated_bsn as restated
from gan import losses, models, streams
from gan.config import Config
from gan.data.images import to_float
from gan.training import Training
from norm_cases import CNN, CPU, SCHEDULES, batches


def tiny(**changes: object) -> Config:
    return Config(name="x", **{**CNN, **changes})


GRAPHS = {
    "SN, hinge": {"norm": "sn", "n_dis": 2},
    "SSN, hinge": {"norm": "ssn", "scale": 1.3},
    "BSSN, hinge": {"norm": "bssn", "scale": 0.8, "n_dis": 2},
    "the same gamma, WGAN-GP": {"gamma": "same", "loss": "wasserstein", "gradient_penalty": 10.0},
    "different gammas, WGAN-GP": {"gamma": "different", "loss": "wasserstein", "gradient_penalty": 10.0, "n_dis": 2},
}


def own_names(net: nn.Module, gamma: str) -> restated.Parameters:
    """Parameters as the restatement calls them."""
    found = {}
    for name, x in net.named_parameters():
        layer = name.removesuffix(".spectral_norm.scale")
        own = name if layer == name else "gamma" if gamma == "same" else f"{layer}.gamma"
        found[own] = x.detach().clone().requires_grad_()
    return found


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("graph", GRAPHS)
def test_steps_are_those_of_the_bsn_authors_graph(graph):
    config = tiny(**GRAPHS[graph])
    training = Training(config, 3, 0, CPU)
    views, b1, b2 = (2 if config.norm in ("bsn", "bssn") else 1), config.beta1, config.beta2
    for module in (training.generator, training.discriminator):
        for parameter in module.parameters():
            if parameter.ndim != 1 and parameter.numel() > 1:  # weights so large that scores are not all the same
                nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    fastsn.warm_up(training.discriminator, 1000)
    d, g = own_names(training.discriminator, config.gamma), own_names(training.generator, "none")
    vectors = {
        name: [v.clone() for _, v in layer.spectral_norm.vectors().values()]
        for name, layer in training.discriminator.named_modules()
        if hasattr(layer, "spectral_norm")
    }
    moments_d: dict[str, tuple[Tensor, Tensor]] = {}
    moments_g: dict[str, tuple[Tensor, Tensor]] = {}
    loss, start = losses.LOSSES[config.loss], training.generator.start
    ours, theirs = batches(training), batches(training)
    for step in range(2):
        scalars = training.advance(ours)
        for i in range(config.n_dis):
            real = to_float(next(theirs)[0])
            z = streams.normal(config.seed, "z of d", (6, 5), step, i)
            fake = restated.generator(g, z, start).detach()

            def score(x: Tensor, d: restated.Parameters = d, vectors: dict = vectors) -> Tensor:
                return restated.discriminator(d, vectors, x, views, config.scale)

            total = loss.d(score(real), score(fake))
            if config.gradient_penalty:
                alpha = streams.uniform(config.seed, "penalty", (6, 1, 1, 1), step, i)
                total = total + config.gradient_penalty * restated.penalty(score, real, fake, alpha)
            d = restated.adam(d, total, moments_d, step * config.n_dis + i + 1, config.lr_d, b1, b2)
            vectors = restated.advanced(d, vectors, views)
        of_g = loss.g(restated.discriminator(d, vectors, restated.generator(g, z, start), views, config.scale))
        g = restated.adam(g, of_g, moments_g, step + 1, config.lr_g, b1, b2)
        assert float(scalars["loss/g"]) == pytest.approx(float(of_g.detach()), rel=1e-9, abs=1e-12)
    for net, expected, gamma in ((training.discriminator, d, config.gamma), (training.generator, g, "none")):
        found = own_names(net, gamma)
        assert found.keys() == expected.keys()
        for name, x in found.items():
            torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("norm", ["sn", "sn_conv"])
@pytest.mark.parametrize("n_dis", [1, 2])
@pytest.mark.parametrize(
    ("schedule", "stored"),
    [("per_forward", lambda n: 2 * n + 1), ("per_step", lambda n: n + 1), ("per_d_step", lambda n: n)],
)
def test_u_schedules_store_as_often_as_their_sources(schedule, stored, n_dis, norm):
    """Every time that vectors are stored, autograd's version of the buffer goes up by one."""
    training = Training(tiny(norm=norm, u_schedule=schedule, n_dis=n_dis), 3, 0, CPU)
    vectors = [x for name, x in training.discriminator.named_buffers() if name.endswith(("_u", "_v"))]
    before = [x._version for x in vectors]
    training.advance(batches(training))
    assert len(vectors) == 16
    assert [x._version - old for x, old in zip(vectors, before, strict=True)] == [stored(n_dis)] * 16


@pytest.mark.parametrize("moves", [True, False])
def test_batch_norm_moves_in_discriminator_steps_or_only_in_the_generators(moves):
    training = Training(tiny(n_dis=2, batch_norm_in_d_steps=moves), 3, 0, CPU)
    norm = training.generator.dense[1]
    training.advance(batches(training))
    assert int(norm.num_batches_tracked) == (3 if moves else 1)
    assert all(m.track_running_stats for m in training.generator.modules() if isinstance(m, nn.BatchNorm2d))


def recorded(training: Training) -> list[tuple[str, Tensor]]:
    """(who asks, z) of every forward of the generator."""
    seen: list[tuple[str, Tensor]] = []

    def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(("g" if torch.is_grad_enabled() else "d", given[0]))

    training.generator.register_forward_pre_hook(see)
    return seen


@pytest.mark.parametrize(("order", "z"), [("d_first", "reused"), ("d_first", "fresh"), ("g_first", "fresh")])
def test_the_order_of_steps_and_which_z_the_generator_takes(order, z):
    training = Training(tiny(order=order, z_of_g=z, n_dis=2), 3, 0, CPU)
    seen = recorded(training)
    training.advance(batches(training))
    assert [who for who, _ in seen] == (["d", "d", "g"] if order == "d_first" else ["g", "d", "d"])
    if order == "d_first":
        assert torch.equal(seen[2][1], seen[1][1]) == (z == "reused")
    assert not torch.equal(seen[0][1], seen[1][1])


def test_a_generator_batch_of_its_own_size():
    training = Training(tiny(batch_size_g=9, z_of_g="fresh"), 3, 0, CPU)
    seen = recorded(training)
    training.advance(batches(training))
    assert [len(z) for _, z in seen] == [6, 9]


def test_learning_rates_fall_linearly_to_nothing_after_the_last_step():
    training = Training(tiny(steps=4, decay_from=2), 3, 0, CPU)
    rates = []
    for _ in range(4):
        training.advance(batches(training))
        rates.append((training.optimizer_g.param_groups[0]["lr"], training.optimizer_d.param_groups[0]["lr"]))
    assert rates == [(1e-3, 1e-3), (1e-3, 1e-3), (1e-3, 1e-3), (0.5e-3, 0.5e-3)]


def test_the_average_follows_the_weights_and_takes_the_statistics():
    training = Training(tiny(ema=0.75), 3, 0, CPU)
    expected = None
    for _ in range(3):
        training.advance(batches(training))
        now = [p.detach().clone() for p in training.generator.parameters()]
        expected = now if expected is None else [0.75 * a + 0.25 * b for a, b in zip(expected, now, strict=True)]
    found = training.evaluated
    assert found is not training.generator
    torch.testing.assert_close(list(found.parameters()), expected)
    assert torch.equal(found.dense[1].running_mean, training.generator.dense[1].running_mean)


@pytest.mark.parametrize("norm", ["none", "sn", "ssn", "bsn", "bssn"])
@pytest.mark.parametrize("gamma", ["none", "same", "different"])
def test_every_norm_starts_from_the_same_weights_and_trains(norm, gamma):
    if norm == "none" and gamma != "none":
        with pytest.raises(ValueError, match=f"gamma must be 'none' with norm 'none' .*, got '{gamma}'"):
            tiny(norm=norm, gamma=gamma)
        return
    scale = 1.25 if norm in ("ssn", "bssn") else 1.0
    training = Training(tiny(norm=norm, gamma=gamma, scale=scale, precision="bf16"), 3, 0, CPU)
    _, reference = models.build(tiny(), 3)
    weights = dict(training.discriminator.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in reference.named_parameters())
    factors = [p for name, p in weights.items() if name.endswith("scale")]
    assert len(factors) == {"none": 0, "same": 1, "different": 8}[gamma]
    assert all(p.item() == scale for p in factors)
    scalars = training.advance(batches(training))
    assert all(x.dtype == torch.float32 and math.isfinite(x) for x in scalars.values())
    assert all(p.item() != scale for p in factors)  # trained


@pytest.mark.parametrize("norm", ["ssn", "sn_conv"])
def test_scale_multiplies_the_weights_of_every_layer(norm):
    plain, scaled = (Training(tiny(norm=norm, scale=c), 3, 0, CPU).discriminator for c in (1.0, 2.0))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(scaled.eval()(x), 2**8 * plain.eval()(x))  # biases are 0, leaky ReLU is homogeneous


@pytest.mark.parametrize(("norm", "schedule"), [("bssn", "per_step"), *(("sn_conv", each) for each in SCHEDULES)])
def test_resumed_training_has_the_same_bits(norm, schedule):
    changes = {"norm": norm, "scale": 1.2, "u_schedule": schedule}
    whole = Training(tiny(n_dis=2, ema=0.9, decay_from=1, **changes), 3, 0, CPU)
    stream = batches(whole)
    for _ in range(2):
        whole.advance(stream)
    state = copy.deepcopy(whole.state())
    resumed = Training(whole.config, 3, 0, CPU)
    resumed.load(state)
    rest = [next(stream) for _ in range(4)]
    for training in (whole, resumed):
        given = iter(rest)
        for _ in range(2):
            training.advance(given)
    a, b = whole.state(), resumed.state()
    for part in ("generator", "discriminator", "average"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])


# torch's compiler hides this warning, but not from a filter that makes it an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("norm", "scale", "schedule"), [("bssn", 1.3, "per_step"), ("sn_conv", 1.0, "per_d_step"), ("bn", 1.0, "per_step")]
)
def test_compiled_networks_train_to_the_same_weights(monkeypatch, norm, scale, schedule):
    """Traced, and run by torch's own kernels, which takes no C++ compiler."""
    compiler, traced = torch.compile, []

    def without_a_compiler(net: nn.Module) -> nn.Module:
        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
            traced.append(type(net).__name__)
            return aot_eager(graph, inputs)

        return compiler(net, backend=backend)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    plain, compiled = (
        Training(tiny(norm=norm, scale=scale, u_schedule=schedule, compile=c), 3, 0, CPU) for c in (False, True)
    )
    for training in (plain, compiled):
        given = batches(training)
        for _ in range(2):
            training.advance(given)
    assert set(traced) == {"Generator", "Discriminator"}
    a, b = plain.state(), compiled.state()
    for part in ("generator", "discriminator"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=1e-9)


def test_labels_come_with_images_and_fakes():
    training = Training(tiny(), 3, 4, CPU)
    seen: list[Tensor] = []
    for net in (training.generator, training.discriminator):
        net.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    training.advance(batches(training))
    assert [tuple(labels.shape) for labels in seen] == [(6,)] * 5
    assert all(int(labels.min()) >= 0 and int(labels.max()) < 4 for labels in seen)


LOSSES = {
    "hinge": ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3, 1 / 3),
    "wasserstein": (-1 / 3 - 0.5, 1 / 3),
    "standard": (
        sum(math.log1p(math.exp(-x)) for x in (2, 0.5, -1)) / 3 + sum(math.log1p(math.exp(x)) for x in (-2, 0, 1)) / 3,
        sum(math.log1p(math.exp(-x)) for x in (-2, 0, 1)) / 3,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert float(losses.LOSSES[name].d(real, fake)) == pytest.approx(LOSSES[name][0])
    assert float(losses.LOSSES[name].g(fake)) == pytest.approx(LOSSES[name][1])


def test_the_penalty_is_zero_where_every_slope_is_one():
    direction = nn.functional.normalize(torch.randn(3 * 8 * 8), dim=0)
    real, fake, alpha = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.rand(4, 1, 1, 1)
    assert float(losses.gradient_penalty(lambda x: x.flatten(1) @ direction, real, fake, alpha)) < 1e-6
    three = losses.gradient_penalty(lambda x: 3 * x.flatten(1) @ direction, real, fake, alpha)
    assert float(three) == pytest.approx(4, rel=1e-4)


def test_streams_are_functions_of_their_moment():
    def draw(*moment: int) -> Tensor:
        return streams.normal(3, "z", (4,), *moment)

    assert torch.equal(draw(1, 2), draw(1, 2))
    assert len({float(draw(*moment)[0]) for moment in ((1, 2), (2, 1), (12,), (1, 20))}) == 4
    assert not torch.equal(draw(0), streams.normal(3, "other", (4,), 0))
    whole = streams.numbered(0, "evaluation", 0, 700, 3)
    for first, count in ((0, 1), (250, 20), (255, 1), (256, 256), (300, 400)):
        assert torch.equal(streams.numbered(0, "evaluation", first, count, 3), whole[first : first + count])


@pytest.mark.parametrize(("size", "expected"), [(32, 2_935_873), (48, 2_946_113), (64, 2_960_449)])
@pytest.mark.parametrize("architecture", ["bsn", "sngan"])
def test_the_discriminators_have_the_papers_parameters(size, expected, architecture):
    generator, discriminator = models.build(Config(name="x", image_size=size, architecture=architecture), 3)
    assert sum(p.numel() for p in discriminator.parameters()) == expected
    assert any(isinstance(m, nn.BatchNorm1d) for m in generator.modules()) == (architecture == "bsn")
    side = size // 8
    dense = 128 * 512 * side**2 + 512 * side**2
    ups = sum(i * o * 16 + o + 2 * o for i, o in ((512, 256), (256, 128), (128, 64)))
    batch_norm = 2 * 512 * side**2 if architecture == "bsn" else 0
    assert sum(p.numel() for p in generator.parameters()) == dense + batch_norm + ups + 64 * 3 * 9 + 3
