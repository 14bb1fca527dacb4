"""The residual networks: those of the papers, and how labels enter them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evaluate
import export
import fastsn
import restated_bsn
import restated_resnets as restated
import sample
from gan import losses, models, streams, weights
from gan.config import RESNET_SIZES, Config
from gan.data.images import to_float, to_uint8
from gan.training import Training
from gan.weights import load_generator
from norm_cases import CPU, batches

CLASSES = 3
TINY = {"batch_size": 6, "width": 1 / 32, "image_size": 32, "latent": 5, "steps": 10, "lr_g": 1e-3, "lr_d": 1e-3}
BSN = {
    **{"architecture": "bsn-resnet", "u_schedule": "per_d_step", "order": "d_first", "z_of_g": "fresh"},
    **{"batch_size_g": 4, "batch_norm_in_d_steps": False, "n_dis": 2, "beta1": 0.0, "beta2": 0.9},
}
CHAINER = {
    **{"architecture": "sngan-resnet", "u_schedule": "per_forward", "order": "g_first", "z_of_g": "fresh"},
    **{"batch_size_g": 8, "bn_groups": 2, "n_dis": 2, "beta1": 0.0, "beta2": 0.9, "dequantize": True},
}
NETWORKS = [("bsn-resnet", "none"), ("sngan-resnet", "projection"), ("sngan-resnet", "concat")]
GRAPHS = {
    "BSN authors', SN": BSN,
    "BSN authors', BSSN": {**BSN, "norm": "bssn", "scale": 1.3},
    "SN-GAN authors', projection": {**CHAINER, "conditional": "projection"},
    "SN-GAN authors', projection, STL10": {**CHAINER, "conditional": "projection", "image_size": 48},
}


def tiny(**changes: object) -> Config:
    return Config(name="x", **{**TINY, **changes})


def disturbed(net: nn.Module) -> restated.Parameters:
    """Biases, and the factors of batch norms, that are no longer all the same; a copy of all parameters."""
    draw = torch.Generator().manual_seed(1)
    found = {}
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1 or name.endswith(("gamma", "beta")):
                p += 0.2 * torch.randn(p.shape, generator=draw)
            found[name] = p.detach().clone().requires_grad_()
    return found


def vectors_of(discriminator: nn.Module) -> restated.Vectors:
    return {
        name: [v.clone() for _, v in layer.spectral_norm.vectors().values()]
        for name, layer in discriminator.named_modules()
        if hasattr(layer, "spectral_norm")
    }


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("graph", GRAPHS)
def test_steps_are_those_of_the_authors_graphs(graph):
    config = tiny(**GRAPHS[graph])
    conditional, size, stored = config.conditional != "none", config.image_size, config.u_schedule == "per_forward"
    training = Training(config, 3, CLASSES if conditional else 0, CPU)
    code, eps = (config.architecture, size), 2e-5 if config.architecture == "sngan-resnet" else 1e-5
    d, g = disturbed(training.discriminator), disturbed(training.generator)
    fastsn.warm_up(training.discriminator, 1000)
    vectors, views = vectors_of(training.discriminator), 2 if config.norm == "bssn" else 1
    side = {32: 4, 48: 6}[size]

    def images(of: str, count: int, *moment: int) -> tuple[Tensor, Tensor | None]:
        z = streams.normal(config.seed, f"z of {of}", (count, 5), *moment)
        y = streams.labels(config.seed, f"labels of {of}", count, CLASSES, *moment) if conditional else None
        return restated.generator(g, 3, z, y, side, config.bn_groups, eps), y

    def score(x: Tensor, y: Tensor | None) -> Tensor:
        nonlocal vectors
        weights, after = restated.normalized(d, vectors, views, config.scale)
        vectors = after if stored else vectors
        return restated.discriminator(weights, code, x, y)

    def step_of_g(step: int) -> Tensor:
        nonlocal g
        loss = losses.LOSSES["hinge"].g(score(*images("g", config.batch_size_g, step, 0)))
        g = restated_bsn.adam(g, loss, moments_g, step + 1, 1e-3, 0.0, 0.9)
        return loss.detach()

    moments_d: dict[str, tuple[Tensor, Tensor]] = {}
    moments_g: dict[str, tuple[Tensor, Tensor]] = {}
    ours, theirs = batches(training), batches(training)
    for step in range(2):
        scalars = training.advance(ours)
        if config.order == "g_first":
            loss_g = step_of_g(step)
        for i in range(config.n_dis):
            real, y = next(theirs)
            if config.dequantize:
                moments = [(step, i, number) for number in range(6)]
                noise = [streams.uniform(config.seed, "dequantization", (3, size, size), *m) for m in moments]
                real = real / 128 - 1 + torch.stack(noise) / 128
            else:
                real = to_float(real)
            fake, fake_y = images("d", 6, step, i)
            loss = losses.LOSSES["hinge"].d(score(real, y if conditional else None), score(fake.detach(), fake_y))
            d = restated_bsn.adam(d, loss, moments_d, step * config.n_dis + i + 1, 1e-3, 0.0, 0.9)
            if not stored:
                vectors = restated.normalized(d, vectors, views, config.scale)[1]
        if config.order == "d_first":
            loss_g = step_of_g(step)
        assert float(scalars["loss/g"]) == pytest.approx(float(loss_g), rel=1e-9, abs=1e-12)
    for net, expected in ((training.discriminator, d), (training.generator, g)):
        torch.testing.assert_close(dict(net.named_parameters()), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(vectors_of(training.discriminator), vectors, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("size", [32, 48])
def test_a_concat_discriminator_has_labels_as_channels_in_the_middle(size):
    config = tiny(architecture="sngan-resnet", conditional="concat", image_size=size)
    _, net = models.build(config, 3, CLASSES)
    d = disturbed(net)
    fastsn.warm_up(net, 1000)
    x, y = torch.randn(6, 3, size, size), torch.tensor([0, 1, 2, 2, 1, 0])
    weights, _ = restated.normalized(d, vectors_of(net), 1, 1.0)
    expected = restated.discriminator(weights, ("sngan-resnet", size), x, y, concat={32: 2, 48: 3}[size])
    torch.testing.assert_close(net(x, y), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("architecture", "weights"), [("bsn-resnet", 39_459_712), ("sngan-resnet", 29_010_816)])
def test_the_networks_of_imagenet_have_the_authors_parameters(architecture, weights):
    with torch.device("meta"):
        generator, discriminator = models.build(
            Config(name="x", architecture=architecture, image_size=128, norm="none"), 3
        )
    assert sum(p.numel() for p in discriminator.parameters() if p.ndim > 1) == weights
    assert sum(p.numel() for p in generator.parameters() if p.ndim > 1) == 32_118_464
    assert sum(p.numel() for p in generator.parameters()) == 32_150_787  # and biases and batch norms


HEADS = {("bsn-resnet", size): True for size in RESNET_SIZES} | {
    ("sngan-resnet", size): size != 32 for size in RESNET_SIZES
}


@pytest.mark.parametrize(("architecture", "size"), HEADS)
def test_images_of_every_size(architecture, size):
    generator, discriminator = models.build(tiny(architecture=architecture, image_size=size, width=1 / 64), 1)
    images = generator.eval()(torch.randn(2, 5))
    assert images.shape == (2, 1, size, size)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2, 1)
    assert (discriminator.linear.bias is not None) == HEADS[architecture, size]


def test_weights_are_drawn_as_glorot_with_a_larger_gain_in_residual_convolutions():
    generator, discriminator = models.build(
        tiny(architecture="sngan-resnet", conditional="projection", width=0.5), 3, 50
    )
    for net in (generator, discriminator):
        for name, p in net.named_parameters():
            if name.endswith("bias") or name.endswith("beta"):
                assert not p.any(), name
            elif p.ndim == 1 or name.endswith("gamma"):
                assert (p == 1).all(), name
            else:
                area = p[0, 0].numel() if p.ndim == 4 else 1
                bound = math.sqrt(6 / (area * (p.shape[0] + p.shape[1])))
                bound *= math.sqrt(2) if ".conv" in name else 1
                assert 0.9 * bound < p.abs().max() <= bound, name
    for name, found in fastsn.sigmas(net).items():  # u and v belong to these weights
        exact = torch.linalg.matrix_norm(net.get_submodule(name).weight.detach().flatten(1), 2)
        assert found.sigma_out == pytest.approx(float(exact), rel=0.05), name


@pytest.mark.parametrize(("architecture", "conditional"), NETWORKS)
@pytest.mark.parametrize("gamma", ["same", "different"])
@pytest.mark.parametrize(("norm", "scale"), [("sn", 1.0), ("bssn", 1.25)])
def test_factors_leave_the_first_weights_alone_and_train(norm, scale, gamma, architecture, conditional):
    changes = {"architecture": architecture, "conditional": conditional, "batch_size": 4}
    training = Training(tiny(norm=norm, gamma=gamma, scale=scale, **changes), 3, CLASSES, CPU)
    _, reference = models.build(tiny(**changes), 3, CLASSES)
    weights = dict(training.discriminator.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in reference.named_parameters())
    factors = [p for name, p in weights.items() if name.endswith("scale")]
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding) for m in reference.modules())
    assert len(factors) == {"same": 1, "different": layers}[gamma]
    before = {name: p.detach().clone() for name, p in weights.items()}
    scalars = training.advance(batches(training))
    assert all(math.isfinite(x) for x in scalars.values())
    still = {name for name, p in weights.items() if torch.equal(p, before[name])}
    assert still <= {"linear.bias"}  # which cancels where both sides of the hinge slope


@pytest.mark.parametrize("conditional", ["projection", "concat"])
@pytest.mark.parametrize("architecture", ["bsn-resnet", "sngan-resnet"])
def test_labels_change_images_and_scores_of_conditional_networks_alone(architecture, conditional):
    z, zeros, ones = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    for how in ("none", conditional):
        generator, discriminator = models.build(tiny(architecture=architecture, conditional=how), 3, CLASSES)
        for parameter in (p for name, p in generator.named_parameters() if name.endswith("gamma")):
            nn.init.normal_(parameter)  # at first all classes are alike
        generator.eval(), discriminator.eval()
        images, scores = generator(z, zeros), discriminator(generator(z, zeros), zeros)
        assert torch.equal(images, generator(z, ones)) == (how == "none")
        assert torch.equal(scores, discriminator(images, ones)) == (how == "none")


BAD_LABELS = {
    "None": None,
    r"-1 to 2": torch.tensor([-1, 2]),
    r"0 to 3": torch.tensor([0, 3]),
    r"torch.int64 of shape \(1,\)": torch.tensor([0]),
    r"torch.float32 of shape \(2,\)": torch.tensor([0.0, 1.0]),
}


@pytest.mark.parametrize("found", BAD_LABELS)
def test_labels_that_a_conditional_network_cannot_take(found):
    generator, discriminator = models.build(tiny(architecture="sngan-resnet", conditional="concat"), 3, CLASSES)
    for net, x in ((generator, torch.randn(2, 5)), (discriminator, torch.randn(2, 3, 32, 32))):
        with pytest.raises(ValueError, match=rf"labels must be 2 integers \(int64\) from 0 to 2 .*, got {found}"):
            net.eval()(x, BAD_LABELS[found])


def test_training_does_not_look_at_the_values_of_labels(monkeypatch):
    """It would wait for a GPU."""
    training = Training(tiny(architecture="sngan-resnet", conditional="projection"), 3, CLASSES, CPU)
    monkeypatch.setattr(Tensor, "aminmax", None)
    training.advance(batches(training))
    with pytest.raises(TypeError):
        training.images("sample", 0, 2)


def test_a_conditional_config_takes_labelled_data():
    with pytest.raises(ValueError, match="conditional must be 'none' for data without labels, got 'concat'"):
        models.build(tiny(architecture="bsn-resnet", conditional="concat"), 3, 0)


def test_samples_scores_and_exports_of_a_conditional_generator(tmp_path):
    import onnx

    config = tiny(architecture="sngan-resnet", conditional="projection", width=1 / 64)
    training, file = Training(config, 3, CLASSES, CPU), tmp_path / "weights.safetensors"
    nn.init.normal_(training.generator.blocks[0].bn1.gamma)
    weights.save(file, training, {**config.identity(), "channels": 3, "classes": CLASSES})
    generator, _ = load_generator(file)
    z, y = streams.numbered(0, "sample", 0, 5, 5), torch.tensor([0, 1, 2, 0, 1])
    sample.main(file, tmp_path / "a.npz", count=5)
    with np.load(tmp_path / "a.npz") as found:
        assert np.array_equal(found["images"], to_uint8(generator(z, y)).permute(0, 2, 3, 1).numpy())
    scored = evaluate._from_latents(weights.load(file), 0)(2, 4)
    assert torch.equal(scored, training.images("evaluation", 2, 4))
    export.main(file, tmp_path / "g.onnx")
    graph = onnx.load(tmp_path / "g.onnx").graph  # onnx's own evaluation of Resize takes minutes
    assert [given.name for given in graph.input] == ["z", "labels"]
    assert sum("labels" in node.input for node in graph.node) == 2 * 6  # gamma and beta of six batch norms


@pytest.mark.parametrize("conditional", ["none", "projection", "concat"])
def test_channels_last_changes_nothing_but_rounding(conditional):
    config = tiny(architecture="sngan-resnet", conditional=conditional, bn_groups=2, norm="bssn", scale=1.2)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        generator, discriminator = (net.to(memory_format=memory_format) for net in models.build(config, 3, CLASSES))
        z, y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % CLASSES
        images = generator(z, y)
        scores = discriminator(images, y)
        scores.sum().backward()
        assert images.is_contiguous(memory_format=memory_format)
        found.append((images, scores, [p.grad for net in (generator, discriminator) for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_dequantized_images_are_spread_over_their_bin():
    config = tiny(architecture="sngan-resnet", dequantize=True, n_dis=2, batch_size=4)
    training = Training(config, 3, 0, CPU)
    seen: list[Tensor] = []
    training.discriminator.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    grey = torch.full((4, 3, 32, 32), 200, dtype=torch.uint8)
    for _ in range(2):
        training.advance(iter([(grey, None)] * 2))
    reals = torch.stack([x for x in seen if x.amin() >= 0.5])  # 200 / 128 - 1 = 0.5625
    noise = (reals.flatten(0, 1) + 1) * 128 - 200
    assert noise.shape[0] == 2 * 2 * 4
    assert -1e-4 <= noise.min() < 0.01
    assert 0.99 < noise.max() <= 1 + 1e-4
    assert noise.mean() == pytest.approx(0.5, abs=0.01)
    assert len({float(x.sum()) for x in noise}) == len(noise)  # another at every step, of every image
