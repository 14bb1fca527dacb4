"""Protocols and the evaluator: which images are scored and how, what is kept of the reals, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gan.data.images import to_float
from gan.data.store import memory_store
from gan.metrics import protocols, scores
from small_evaluations import IMAGES, STORE, Tiny, evaluator, fakes, moments, predictions, small


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
    monkeypatch.setattr("gan.metrics.protocols.KID_SUBSET_SIZE", 15)
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
