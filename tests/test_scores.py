"""Fréchet distance, Inception Score and KID: those of scipy, torchmetrics and torch-fidelity."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gan.metrics import scores
from metric_oracles import (
    FrechetInceptionDistance,
    InceptionScore,
    isc_features_to_metric,
    kid_features_to_metric,
)
from small_evaluations import CPU, fid_of_scipy, moments, predictions


class Given(nn.Module):
    """Lets torchmetrics take features as they are."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, found):
        return found


def test_frechet_distance_is_that_of_scipy_and_torchmetrics():
    a, b = torch.randn(90, 6), torch.randn(70, 6) @ torch.randn(6, 6) + 0.5
    found = scores.frechet_distance(moments(a), moments(b))
    assert found == pytest.approx(fid_of_scipy(a, b), rel=1e-10)
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
