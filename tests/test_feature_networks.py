"""The networks that look at images for the scores, Inception, lite0 and the digit classifier: where they come from,
what they are fed, and what is said without them."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gan.data.images import to_float
from gan.data.store import memory_store
from gan.metrics import digits, features, protocols
from gan.metrics.evaluator import Evaluator, Scores
from small_evaluations import CPU, IMAGES, Tiny, evaluator, fakes, small


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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for the classifier of these digits, trained by whoever asks first."""
    return tmp_path_factory.mktemp("cache")


def test_digit_scores_tell_digits_from_worse_digits_from_noise(digit_store, cache):
    order = np.random.RandomState(1).permutation(1797)
    real = torch.from_numpy(digit_store.read(order)).permute(0, 3, 1, 2)
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8)
    blurred = nn.functional.avg_pool2d(real.float(), 3, 1, 1).to(torch.uint8)
    protocol = dataclasses.replace(protocols.find("digits"), fakes=1500, score_fakes=1500)
    judge = Evaluator(digit_store, protocol, CPU, None, cache, 500)
    found = [judge(lambda first, count, x=x: to_float(x[first : first + count])) for x in (real, blurred, noise, real)]
    assert found[0].fid < 1
    assert min(found[1].fid, found[2].fid) > 10
    assert found[0].inception_score_mean > 9
    assert max(found[1].inception_score_mean, found[2].inception_score_mean) < 5
    assert found[3][:7] == found[0][:7]
    assert found[0].protocol == "digits-1797r-1500f"


def test_the_digit_classifier_is_over_97_percent_right_and_always_the_same(digit_store, cache):
    scale, before = protocols.find("digits").scale, torch.get_rng_state()
    net, accuracy = digits.train_digit_classifier(digit_store, scale)
    cached = [digits.digit_classifier(digit_store, scale, cache) for _ in range(2)]
    assert accuracy > 0.97
    assert torch.equal(torch.get_rng_state(), before)
    assert cached[0].checksum == cached[1].checksum == features.with_checksum(net).checksum
