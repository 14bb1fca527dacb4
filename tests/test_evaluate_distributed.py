"""Evaluation by several processes gives what one process gives, on every rank."""

from __future__ import annotations

import pytest
from PIL import Image

import evaluation_jobs as jobs
from gan.metrics import protocols
from small_evaluations import IMAGES, Tiny, evaluator, small
from tiny_runs import threads

BSN = small("bsn", fakes=20, kid=True)  # 20 fakes for the score, 20 others for the distances, 30 reals


@pytest.mark.parametrize(
    ("batch_size", "asked", "seen"),
    [
        (9, [[0, 18, 36], [9, 27]], [22 + 18, 18 + 12]),  # 5 batches of fakes, 4 of reals
        (40, [[0], [0]], [40 + 30, 40 + 30]),  # one of each: the second rank looks at it, too, and counts none of it
    ],
)
def test_scores_of_two_ranks_are_those_of_one(two, tmp_path, monkeypatch, batch_size, asked, seen):
    monkeypatch.setattr(protocols, "KID_SUBSET_SIZE", 15)
    with threads(1):  # as the ranks have
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


@pytest.mark.parametrize(("batch_size", "seen"), [(5, (24 + 21, 16 + 15)), (40, (40 + 36, 40 + 36))])
def test_intra_fid_of_two_ranks_is_that_of_one(two, tmp_path, batch_size, seen):
    with threads(1):  # as the ranks have
        expected, _ = jobs.intra(0, tmp_path, batch_size, None)
    (first, saw), (second, saw_too) = two(jobs.intra, tmp_path, batch_size, None)
    assert first == second
    assert [row[:3] for row in first] == [(0, 10, 12), (1, 14, 12), (2, 16, 12)]
    assert [row[3] for row in first] == pytest.approx([row[3] for row in expected], rel=1e-9)
    assert (saw, saw_too) == seen


def test_fakes_of_a_class_that_are_not_finite_on_one_rank_are_an_error_of_both(two, tmp_path):
    message = "path: expected finite images, got fakes of class 1 that are not, from number 5 on"
    assert two(jobs.intra, tmp_path, 5, 1) == [message] * 2


def test_evaluate_says_on_the_first_rank_alone_what_it_gives_on_all(two, tmp_path):
    for i, image in enumerate(IMAGES):
        (tmp_path / f"data/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"data/{i % 2}/{i}.png")
    first, second = two(jobs.evaluated, tmp_path / "data", tmp_path / "cache", tmp_path / "x.csv")
    (said, scores, rows), (quiet, *others) = first, second
    assert [scores, rows] == others
    assert quiet == ""
    assert said.startswith("lite0-40r-40f: 40 reals, 40 fakes, network ")
    assert "intra-lite0-FD: " in said
    assert abs(scores[4]) < 1e-6
    assert [row[:3] for row in rows] == [(0, 20, 20), (1, 20, 20)]
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 3
