"""Scores: the sums against torchmetrics and scipy, the protocols' choices, the networks, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from torch import nn

from gan.data.images import to_float
from gan.data.store import memory_store
from gan.metrics import digits, features, protocols, scores
from gan.metrics.evaluator import Evaluator, Scores
from metric_oracles import (
    FrechetInceptionDistance,
    InceptionScore,
    isc_features_to_metric,
    kid_features_to_metric,
)

CPU = torch.device("cpu")
IMAGES = np.random.RandomState(0).randint(0, 256, (40, 4, 4, 3)).astype(np.uint8)
STORE = memory_store("noise", IMAGES)


class Tiny(nn.Module):
    """A network with random weights; keeps the pixels that it was given."""

    def __init__(self, channels=3, classes=7):
        super().__init__()
        self.features, self.logits = nn.Linear(channels * 16, 5), nn.Linear(5, classes)
        self.seen = []

    def forward(self, pixels):
        self.seen.append(pixels)
        found = self.features(pixels.flatten(1) / 255)
        return found, self.logits(found)


class Given(nn.Module):
    """Lets torchmetrics take features as they are."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, found):
        return found


def small(name="modern", **changes):
    small_counts = {"reals": 30, "fakes": 20, "score_fakes": 20, "splits": 4, "kid": False}
    return dataclasses.replace(protocols.find(name), **(small_counts | changes))


def evaluator(tmp_path, protocol, store=STORE, network=None, batch_size=7, weights=None):
    return Evaluator(store, protocol, CPU, weights, tmp_path, batch_size, network)


def fakes(first, count):
    """A function of the number, in [-1, 1]."""
    numbers = torch.arange(first, first + count, dtype=torch.float64)[:, None, None, None]
    return torch.sin(numbers + 1.7 * torch.arange(48).view(3, 4, 4)).float()


def moments(found):
    sums = scores.Moments.empty(found.shape[1], CPU)
    for part in found.split(16):
        sums.update(part)
    return sums


def test_frechet_distance_is_that_of_scipy_and_torchmetrics():
    a, b = torch.randn(90, 6), torch.randn(70, 6) @ torch.randn(6, 6) + 0.5
    found = scores.frechet_distance(moments(a), moments(b))
    cov_a, cov_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    mean = a.double().mean(0) - b.double().mean(0)
    cross = np.trace(linalg.sqrtm(cov_a @ cov_b)).real
    assert found == pytest.approx(mean.square().sum().item() + np.trace(cov_a + cov_b) - 2 * cross, rel=1e-10)
    metric = FrechetInceptionDistance(feature=Given(6)).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert found == pytest.approx(metric.compute().item(), rel=1e-6)
    assert abs(scores.frechet_distance(moments(a), moments(a))) < 1e-10


def test_frechet_distance_of_fewer_images_than_features():
    a, b = torch.randn(5, 12), torch.randn(6, 12)
    values, vectors = np.linalg.eigh(np.cov(a.double().numpy().T))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # sqrtm of the singular product is no oracle
    cross = np.linalg.svd(root @ _root(np.cov(b.double().numpy().T)), compute_uv=False).sum()
    mean = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    traces = a.double().var(0).sum().item() + b.double().var(0).sum().item()
    assert scores.frechet_distance(moments(a), moments(b)) == pytest.approx(mean + traces - 2 * cross, rel=1e-6)


def _root(cov):
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def test_inception_score_is_that_of_torchmetrics_but_for_the_divisor_of_its_deviation():
    logits = 3 * torch.randn(60, 9)
    found = scores.inception_score(predictions(logits, 5))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `InceptionScore` will save all")
        metric = InceptionScore(feature=Given(9), splits=5).set_dtype(torch.float64)
    metric.update(logits.double())
    state = torch.get_rng_state()
    order = torch.randperm(60)  # torchmetrics shuffles, so feed it what its shuffle brings into our order
    metric.reset()
    metric.update(torch.empty_like(logits).double().index_copy_(0, order, logits.double()))
    torch.set_rng_state(state)
    mean, std = metric.compute()
    assert found[0] == pytest.approx(mean.item(), rel=1e-12)
    assert found[1] == pytest.approx(std.item() * (4 / 5) ** 0.5, rel=1e-10)


def predictions(logits, splits):
    sums = scores.Predictions.empty(splits, logits.shape[1], CPU)
    sums.update(logits, scores.split_of(torch.arange(len(logits)), len(logits), splits))
    return sums


def test_scores_and_kid_are_those_of_torch_fidelity():
    logits = 2 * torch.randn(43, 9)  # not a multiple of the splits
    expected = isc_features_to_metric(logits, splits=4, shuffle=False)
    assert scores.inception_score(predictions(logits, 4)) == pytest.approx(tuple(expected.values()), rel=1e-12)
    a, b = torch.randn(40, 6), torch.randn(30, 6) + 0.3
    options = {"kid_subsets": 5, "kid_subset_size": 20, "rng_seed": 3, "verbose": False}
    expected = kid_features_to_metric(a.double(), b.double(), **options)
    pools = [scores.Pool.empty(len(x), 6, CPU) for x in (a, b)]
    for pool, x in zip(pools, (a, b), strict=True):
        pool.update(torch.cat([x, x]), torch.arange(2 * len(x)))  # what is past the pool is not kept
    assert scores.kernel_distance(*pools, 5, 20, 3) == pytest.approx(tuple(expected.values()), rel=1e-10)


def test_sums_over_two_processes_add_up_to_those_over_one():
    found, logits, number = torch.randn(24, 6), torch.randn(24, 5), torch.arange(24)
    wholes, parts = [], []
    for into, mine in ((wholes, [slice(None)]), (parts, [slice(0, None, 2), slice(1, None, 2)])):
        for part in mine:
            sums = (scores.Moments.empty(6, CPU), scores.Predictions.empty(4, 5, CPU), scores.Pool.empty(10, 6, CPU))
            sums[0].update(found[part])
            sums[1].update(logits[part], scores.split_of(number[part], 24, 4))
            sums[2].update(found[part], number[part])
            into.append(sums)
    for whole, one, other in zip(wholes[0], *parts, strict=True):
        for name, value in vars(one + other).items():
            torch.testing.assert_close(value, getattr(whole, name))


def test_an_unknown_protocol_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"protocol: expected one of bsn, sngan, modern, digits, lite0, got fid"):
        evaluator(tmp_path, "fid")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bsn", (5_000, 10_000, 50_000, 50_000, 60_000, 10, "float", False)),
        ("sngan", (10_000, 5_000, 50_000, 50_000, 55_000, 10, "truncate", False)),
        ("modern", (None, 50_000, 50_000, 0, 50_000, 10, "round", True)),
    ],
)
def test_published_protocols_have_their_numbers_of_images(name, expected):
    row = protocols.find(name)
    numbers = (row.reals, row.fakes, row.score_fakes, row.first_fake, row.all_fakes, row.splits, row.pixels, row.kid)
    assert numbers == expected
    assert row.label(777) == name


def test_names_of_protocols_of_no_paper_have_the_numbers_of_images():
    assert protocols.find("lite0").label(3767) == "lite0-3767r-2000f"
    assert protocols.find("digits").label(1797) == "digits-1797r-2000f"
    assert protocols.find("lite0").distance == "lite0-FD"


def test_pixels_stay_floats_or_become_integers_as_the_protocol_says():
    images = torch.tensor([[[[-1.0, 0.1, 0.99, 1.0]]]])  # 0, 140.25, 253.725, 255
    found = {name: protocols.find(name).to_pixels(images).flatten().tolist() for name in ("bsn", "sngan", "modern")}
    assert found["bsn"] == pytest.approx([0, 140.25, 253.725, 255])
    assert found["sngan"] == [0, 140, 253, 255]
    assert found["modern"] == [0, 140, 254, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(protocols.find("modern").to_pixels(to_float(every)), every.float())
    assert torch.equal(protocols.find("sngan").to_pixels(every), every.float())  # no way round through floats


@pytest.mark.parametrize(("name", "columns"), [("bsn", 1000), ("sngan", 1008)])
def test_the_softmax_sees_the_columns_of_the_protocol(name, columns, tmp_path):
    network = Tiny(classes=1008)
    with torch.no_grad():
        network.logits.bias.copy_(torch.linspace(0, 8, 1008))  # so that the last columns matter
    found = evaluator(tmp_path, small(name, separate=False), network=network)(fakes)
    logits = network(protocols.find(name).to_pixels(fakes(0, 20)))[1].detach()
    expected = scores.inception_score(predictions(logits[:, :columns], 4))
    assert found[5:7] == pytest.approx(expected, rel=1e-6)
    other = scores.inception_score(predictions(logits[:, : 2008 - columns], 4))
    assert abs(found.inception_score_mean - other[0]) > 1e-5


def test_bsn_draws_the_fakes_of_the_score_first_and_those_of_fid_after_them(tmp_path):
    network, asked = Tiny(), []

    def generate(first, count):
        asked.extend(range(first, first + count))
        return fakes(first, count)

    found = evaluator(tmp_path, small("bsn", fakes=10), network=network)(generate)
    assert asked == list(range(30))
    with torch.no_grad():
        every, logits = network(fakes(0, 30) * 127.5 + 127.5)
        picks = np.random.RandomState(0).permutation(40)[:30]
        real = network(torch.from_numpy(IMAGES[picks]).permute(0, 3, 1, 2).float())[0]
    assert found.fid == pytest.approx(scores.frechet_distance(moments(real), moments(every[20:])), rel=1e-6)
    assert found[5:7] == pytest.approx(scores.inception_score(predictions(logits[:20], 4)), rel=1e-6)
    assert (found.reals, found.fakes, found.missing) == (30, 10, "")


def test_fid_and_score_of_modern_share_their_fakes(tmp_path):
    asked = []

    def generate(first, count):
        asked.extend(range(first, first + count))
        return fakes(first, count)

    found = evaluator(tmp_path, small(), network=Tiny())(generate)
    assert asked == list(range(20))
    assert np.isnan(found.kid_mean)


def test_kid_is_measured_where_the_protocol_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr("gan.metrics.evaluator.KID_SUBSET_SIZE", 15)
    network = Tiny()
    found = evaluator(tmp_path, small(kid=True), network=network)(fakes)
    assert found.kid_std > 0
    again = evaluator(tmp_path, small(kid=True), network=network, batch_size=40)(fakes)
    assert again[:4] == found[:4]
    assert again[4:9] == pytest.approx(found[4:9], rel=1e-4)


def test_scores_do_not_depend_on_the_cache_and_leave_the_random_state_alone(tmp_path, caplog):
    network, before = Tiny(), torch.get_rng_state()
    first = evaluator(tmp_path, small(), network=network)(fakes)
    (cached,) = tmp_path.glob("reals-modern-*.npz")
    network.seen.clear()
    assert evaluator(tmp_path, small(), network=network)(fakes)[:7] == first[:7]
    assert sum(map(len, network.seen)) == 20  # the fakes alone
    cached.write_bytes(cached.read_bytes()[:1000])
    assert evaluator(tmp_path, small(), network=network)(fakes)[:7] == first[:7]
    assert "is damaged and computed again" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("changed", ["data", "network", "protocol"])
def test_statistics_of_reals_are_kept_apart_by_data_network_and_protocol(changed, tmp_path):
    torch.manual_seed(1)
    network = Tiny()
    evaluator(tmp_path, small(), network=network)(fakes)
    store = memory_store("noise", 255 - IMAGES) if changed == "data" else STORE
    protocol = small(reals=29) if changed == "protocol" else small()
    evaluator(tmp_path, protocol, store, Tiny() if changed == "network" else network)(fakes)
    assert len(list(tmp_path.glob("reals-*.npz"))) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert evaluator(tmp_path / "file", small(), network=Tiny())(fakes).fid > 0
    assert "it will be computed again" in caplog.text


def test_fakes_that_are_not_finite_give_a_row_that_says_so(tmp_path):
    found = evaluator(tmp_path, small(), network=Tiny())(lambda first, count: fakes(first, count) / (first < 7))
    assert np.isnan(found.fid)
    assert found.missing == "the fakes from number 7 on are not all finite"


def test_fakes_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"generate: expected images of shape \(7, 3, 4, 4\), got \(7, 1, 4, 4\)"):
        evaluator(tmp_path, small(), network=Tiny())(lambda first, count: fakes(first, count)[:, :1])


def test_fewer_images_than_a_protocol_needs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"protocol: expected at least 5000 images for bsn, got noise with 40"):
        evaluator(tmp_path, "bsn")
    with pytest.raises(ValueError, match=r"expected at least 1000 images for modern, got noise with 40"):
        evaluator(tmp_path, "modern")


@pytest.mark.parametrize("name", ["bsn", "sngan", "modern", "lite0"])
def test_grey_images_are_refused_by_networks_of_colours(name, tmp_path):
    with pytest.raises(ValueError, match=rf"expected images of 3 channels for {name}, got noise with 1"):
        evaluator(tmp_path, small(name), memory_store("noise", IMAGES[..., :1]))


def test_digits_need_grey_images_with_labels(tmp_path):
    with pytest.raises(ValueError, match=r"grey images with labels for digits, got noise with 3 channels and no"):
        evaluator(tmp_path, "digits")


@pytest.fixture
def no_inception(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTSN_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.usefixtures("no_inception")
def test_without_inception_a_row_says_what_is_missing(tmp_path):
    found = evaluator(tmp_path, small("bsn"))(fakes)
    assert found[:4] == ("bsn", "", 30, 20)
    assert np.isnan(found[4:9]).all()
    assert "weights-inception-2015-12-05-6726825d.pth (SHA-256 6726825d...) is not in" in found.missing
    assert "--inception-weights or FASTSN_INCEPTION" in found.missing
    assert len(found) == len(Scores._fields)


@pytest.mark.parametrize(
    ("module", "protocol"),
    [("torch_fidelity.feature_extractor_inceptionv3", "modern"), ("efficientnet_lite_pytorch", "lite0")],
)
def test_without_the_package_of_a_network_a_row_says_how_to_get_it(module, protocol, tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"")
    monkeypatch.setenv("FASTSN_INCEPTION", str(tmp_path / "weights.pth"))
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'fastsn[" in evaluator(tmp_path, small(protocol))(fakes).missing


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """torch-fidelity's network with random weights, and the file that it is loaded from."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "load_state_dict", lambda *_: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        net = Extractor("random", ["2048", "logits_unbiased"], verbose=False)
    path = tmp_path_factory.mktemp("inception") / "any-name.pth"
    torch.save(net.state_dict(), path)
    return net, path


def test_inception_is_torch_fidelitys_to_the_bit(inception_weights):
    net, path = inception_weights
    images = torch.from_numpy(IMAGES[:2]).permute(0, 3, 1, 2)
    before = torch.get_rng_state()
    network = features.inception(path, (128.0, 128.0))
    assert torch.equal(torch.get_rng_state(), before)
    found = network.module(images.float())
    for mine, theirs in zip(found, net(images), strict=True):
        assert torch.equal(mine, theirs)
    assert network.checksum == hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert found[1].shape == (2, 1008)


def test_bsn_feeds_inception_from_minus_1_to_1(inception_weights):
    module = features.inception(inception_weights[1], protocols.find("bsn").scale).module
    pixels, seen = torch.tensor([0.0, 127.5, 255.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3), []
    module.trunk[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(pixels)
    # TensorFlow 1 puts output pixel i at i * 3 / 299 of the input, without the half-pixel shift of torch.
    where = np.arange(299) * 3 / 299
    np.testing.assert_allclose(seen[0][0, 0, 0], np.interp(where, [0, 1, 2], [-1, 0, 1]), atol=2e-6)


@pytest.mark.usefixtures("no_inception")
def test_inception_is_found_by_argument_then_variable_then_cache(tmp_path, monkeypatch):
    cached = tmp_path / "torch/hub/checkpoints" / features.INCEPTION_FILE
    cached.parent.mkdir(parents=True)
    for name in ("cache", "variable", "argument"):
        (cached if name == "cache" else tmp_path / name).write_bytes(name.encode())
    for name, argument in (("cache", None), ("variable", None), ("argument", tmp_path / "argument")):
        if name == "variable":
            monkeypatch.setenv("FASTSN_INCEPTION", str(tmp_path / "variable"))
        with pytest.raises(ValueError, match=f"got .*{cached.name if name == 'cache' else name}: "):
            features.inception(argument, (128.0, 128.0))


def test_weights_of_another_network_are_named(tmp_path):
    torch.save(Tiny().state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"inception-weights: expected torch-fidelity's .*tiny.pth: .*Missing"):
        evaluator(tmp_path, small("bsn"), weights=tmp_path / "tiny.pth")
    torch.save({"x": Path}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"inception-weights: .*code.pth: .*Unsupported global"):
        evaluator(tmp_path, small("bsn"), weights=tmp_path / "code.pth")
    with pytest.raises(FileNotFoundError, match=r"inception-weights: expected the file .*got nothing at .*none.pth"):
        evaluator(tmp_path, small("bsn"), weights=tmp_path / "none.pth")


def test_lite0_recognises_photographs_in_the_scale_of_its_protocol():
    import sklearn.datasets

    network = features.lite0(protocols.find("lite0").scale)
    assert network.checksum == "57934424"
    folder = Path(sklearn.datasets.__file__).parent / "images"
    for name, label in (("flower.jpg", 985), ("china.jpg", 698)):  # a daisy, a palace
        with Image.open(folder / name) as photograph:
            left = (photograph.width - photograph.height) // 2
            square = photograph.crop((left, 0, left + photograph.height, photograph.height))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float()
        found, logits = network.module.eval()(pixels)
        assert logits[0].argmax() == label, name
        assert found.shape == (1, 1280)


def test_lite0_scores_a_generator_offline(tmp_path):
    protocol = small("lite0", reals=None, fakes=12, score_fakes=12)
    images = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    real = evaluator(tmp_path, protocol)(lambda first, count: images[first : first + count])
    noise = evaluator(tmp_path, protocol)(fakes)
    assert real.protocol == "lite0-40r-12f"
    assert (real.network, real.missing) == ("57934424", "")
    assert real.fid < noise.fid


@pytest.fixture(scope="module")
def digit_store():
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images[..., None] * (255 / 16)).round().astype(np.uint8)
    return memory_store("digits", images, found.target)


def test_digit_scores_tell_digits_from_worse_digits_from_noise(digit_store, tmp_path):
    order = np.random.RandomState(1).permutation(1797)
    real = torch.from_numpy(digit_store.read(order)).permute(0, 3, 1, 2)
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8)
    blurred = nn.functional.avg_pool2d(real.float(), 3, 1, 1).to(torch.uint8)
    protocol = dataclasses.replace(protocols.find("digits"), fakes=1500, score_fakes=1500)
    judge = Evaluator(digit_store, protocol, CPU, None, tmp_path, 500)
    found = [judge(lambda first, count, x=x: to_float(x[first : first + count])) for x in (real, blurred, noise, real)]
    assert found[0].fid < 1
    assert min(found[1].fid, found[2].fid) > 10
    assert found[0].inception_score_mean > 9
    assert max(found[1].inception_score_mean, found[2].inception_score_mean) < 5
    assert found[3][:7] == found[0][:7]
    assert found[0].protocol == "digits-1797r-1500f"


def test_the_digit_classifier_is_over_97_percent_right_and_always_the_same(digit_store, tmp_path):
    scale, before = protocols.find("digits").scale, torch.get_rng_state()
    net, accuracy = digits.train_digit_classifier(digit_store, scale)
    cached = [digits.digit_classifier(digit_store, scale, tmp_path) for _ in range(2)]
    assert accuracy > 0.97
    assert torch.equal(torch.get_rng_state(), before)
    assert cached[0].checksum == cached[1].checksum == features.with_checksum(net).checksum
