"""Evaluations that take no time: forty images of noise, a network with random weights, few fakes; and the sums that
they come to."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from scipy import linalg
from torch import nn

from gan.data.store import memory_store
from gan.metrics import protocols, scores
from gan.metrics.evaluator import Evaluator

CPU = torch.device("cpu")
IMAGES = np.random.RandomState(0).randint(0, 256, (40, 4, 4, 3)).astype(np.uint8)
STORE = memory_store("noise", IMAGES)


class Tiny(nn.Module):
    """A network with random weights; keeps the pixels that it was given."""

    def __init__(self, channels=3, classes=7, size=4):
        super().__init__()
        self.features, self.logits = nn.Linear(channels * size**2, 5), nn.Linear(5, classes)
        self.seen = []

    def forward(self, pixels):
        self.seen.append(pixels)
        found = self.features(pixels.flatten(1) / 255)
        return found, self.logits(found)


def small(name="modern", **changes):
    """A protocol with small numbers of images."""
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


def predictions(logits, splits):
    sums = scores.Predictions.empty(splits, logits.shape[1], CPU)
    sums.update(logits, scores.split_of(torch.arange(len(logits)), len(logits), splits))
    return sums


def fid_of_scipy(a, b):
    """The oracle, of features (N, D)."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    cross = np.trace(linalg.sqrtm(cov_a @ cov_b)).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b) - 2 * cross
