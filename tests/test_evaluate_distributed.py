"""Evaluation by several processes gives what one process gives, on every rank."""

from __future__ import annotations

import pytest

import evaluation_jobs as jobs
from gan.metrics import protocols
from ranks import started
from small_evaluations import Tiny, evaluator, small

BSN = small("bsn", fakes=20, kid=True)  # 20 fakes for the score, 20 others for the distances, 30 reals


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with started(2, tmp_path_factory.mktemp("two")) as ranks:
        yield ranks


@pytest.mark.parametrize(
    ("batch_size", "asked", "seen"),
    [
        (9, [[0, 18, 36], [9, 27]], [22 + 18, 18 + 12]),  # 5 batches of fakes, 4 of reals
        (40, [[0], [0]], [40 + 30, 40 + 30]),  # one of each: the second rank looks at it, too, and counts none of it
    ],
)
def test_scores_of_two_ranks_are_those_of_one(two, tmp_path, monkeypatch, batch_size, asked, seen):
    monkeypatch.setattr(protocols, "KID_SUBSET_SIZE", 15)
    expected = evaluator(tmp_path / "one", BSN, network=Tiny(), batch_size=batch_size)(jobs.fakes)
    first, second = two(jobs.scored, tmp_path / "two", BSN, batch_size)
    assert first["found"] == second["found"]
    for found in first["found"]:
        assert found[:4] == expected[:4]
        assert found[4:9] == pytest.approx(expected[4:9], rel=1e-9)
        assert found[9] == ""
    assert [rank["asked"] for rank in (first, second)] == [2 * numbers for numbers in asked]
    assert [rank["seen"][0] for rank in (first, second)] == seen
    assert first["seen"][1] + second["seen"][1] in (40, 80)  # the fakes alone
    assert [len(rank["written"]) for rank in (first, second)] == [1, 0]


def test_a_damaged_file_of_the_reals_is_computed_again_by_all(two, tmp_path):
    first, second = two(jobs.damaged, tmp_path, small())
    assert first[:2] == second[:2]
    assert first[0] == first[1]
    assert first[2] + second[2] == 20 + 30


@pytest.mark.parametrize(("bad", "number"), [((9,), 9), ((0,), 0), ((27, 18), 18), ((0, 9, 18, 27, 36), 0)])
def test_fakes_that_are_not_finite_on_some_ranks_give_all_the_same_row(two, tmp_path, bad, number):
    message = f"the fakes from number {number} on are not all finite"
    assert two(jobs.not_finite, tmp_path, small("bsn"), bad) == [(message, "")] * 2


def test_fakes_that_one_rank_cannot_read_are_an_error_of_all(two, tmp_path):
    assert two(jobs.broken_disk, tmp_path, small("bsn")) == ["rank 1: the disk is gone"] * 2


@pytest.mark.parametrize(
    ("on_one", "message", "warnings"),
    [
        ("missing", "rank 1: no weights here", 1),
        ("broken", "rank 1: inception-weights: expected others", 0),
        ("other", "the network's weights must be the same on all ranks, got ", 0),
    ],
)
def test_a_network_that_one_rank_has_not_is_missing_on_all(two, tmp_path, on_one, message, warnings):
    (first, logged), (second, logged_too) = two(jobs.inception, tmp_path, small("bsn"), on_one)
    assert first == second
    assert first.startswith(message)
    assert (logged, logged_too) == (warnings, 0)


def test_the_digit_classifier_is_trained_by_the_first_rank_for_all(two, tmp_path):
    (first, trained), (second, trained_too) = two(jobs.classifier, tmp_path)
    assert first == second
    assert (trained, trained_too) == (1, 0)
    assert not (tmp_path / "1").exists()
