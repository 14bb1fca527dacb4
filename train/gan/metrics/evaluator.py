"""Scores of a generator against the images of a store, by a protocol."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from math import nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gan.data.store import Store
from gan.metrics import digits, features, protocols, scores
from gan.metrics.cache import remember
from gan.metrics.protocols import KID_POOL, KID_SUBSET_SIZE, KID_SUBSETS, Protocol

_log = logging.getLogger("gan")
BATCH = 100  # images that are judged at a time
_SEED = 0  # of which reals are compared, and of KID's subsets


class Scores(NamedTuple):
    """A row of metrics.csv: nan where a protocol has no such figure, or where ``missing`` says why there are none."""

    protocol: str
    network: str
    reals: int
    fakes: int
    fid: float = nan
    inception_score_mean: float = nan
    inception_score_std: float = nan
    kid_mean: float = nan
    kid_std: float = nan
    missing: str = ""


class Evaluator:
    """Called with ``generate``, gives ``Scores``; the same fakes give the same numbers.

    ``generate(first, count)`` gives the fakes number first to first + count - 1, float (count, C, S, S) in [-1, 1], or
    uint8 where there are only such. A protocol whose network is not here has rows that say what is missing.

    Args:
        store: the reals.
        protocol: a name of protocols.PROTOCOLS, or a row of one's own.
        device: where the network runs.
        inception_weights: the weights of Inception, see features.inception.
        cache: a folder for the statistics of the reals and for the digit classifier.
        batch_size: how many images at a time.
        network: a module from pixels to (features, logits), in place of the protocol's.

    Raises:
        ValueError: the store does not suit the protocol, or the weights are not the network's.
        FileNotFoundError: weights were named that are not there.
    """

    def __init__(
        self,
        store: Store,
        protocol: str | Protocol,
        device: torch.device,
        inception_weights: Path | None,
        cache: Path,
        batch_size: int,
        network: nn.Module | None = None,
    ) -> None:
        self.store, self.device, self.cache, self.batch_size = store, device, cache, batch_size
        self.protocol = protocols.find(protocol) if isinstance(protocol, str) else protocol
        self._check_store(own_network=network is not None)
        self.missing, self.network = "", None
        try:
            found = features.with_checksum(network) if network else self._load(inception_weights)
            self.network = found._replace(module=found.module.to(device).eval().requires_grad_(False))
        except features.MissingNetwork as error:
            self.missing = str(error)
            _log.warning("no scores by the protocol %s: %s", self.protocol.name, error)

    def _check_store(self, own_network: bool) -> None:
        least = max(self.protocol.reals or 2, KID_SUBSET_SIZE if self.protocol.kid else 2)
        if self.store.count < least:
            raise ValueError(
                f"protocol: expected at least {least} images for {self.protocol.name}, got {self.store.name} with "
                f"{self.store.count}"
            )
        if self.protocol.network != "digits" and not own_network and self.store.channels != 3:
            raise ValueError(
                f"protocol: expected images of 3 channels for {self.protocol.name}, got {self.store.name} with "
                f"{self.store.channels}"
            )

    def _load(self, inception_weights: Path | None) -> features.Network:
        if self.protocol.network == "inception":
            return features.inception(inception_weights, self.protocol.scale)
        if self.protocol.network == "lite0":
            return features.lite0(self.protocol.scale)
        return digits.digit_classifier(self.store, self.protocol.scale, self.cache)

    @torch.no_grad()
    def __call__(self, generate: Callable[[int, int], Tensor]) -> Scores:
        """The scores of ``generate``."""
        protocol, count = self.protocol, self.protocol.reals or self.store.count
        row = Scores(protocol.label(count), self.network.checksum if self.network else "", count, protocol.fakes)
        if self.missing:
            return row._replace(missing=self.missing)
        moments = predictions = pool = None
        for first in range(0, protocol.all_fakes, self.batch_size):
            images = generate(first, min(self.batch_size, protocol.all_fakes - first))
            self._check_fakes(images, min(self.batch_size, protocol.all_fakes - first))
            if not images.isfinite().all():
                return row._replace(missing=f"the fakes from number {first} on are not all finite")
            found, logits = self._forward(protocol.to_pixels(images.to(self.device)))
            logits = logits[:, : protocol.classes]
            number = torch.arange(first, first + len(images), device=self.device)
            if moments is None:
                moments = scores.Moments.empty(found.shape[1], self.device)
                predictions = scores.Predictions.empty(protocol.splits, logits.shape[1], self.device)
                pool = self._pool(protocol.fakes, found.shape[1])
            scored = number < protocol.score_fakes
            split = scores.split_of(number[scored], protocol.score_fakes, protocol.splits)
            predictions.update(logits[scored], split)
            number = number - protocol.first_fake
            compared = (number >= 0) & (number < protocol.fakes)
            moments.update(found[compared])
            pool.update(found[compared], number[compared])
        real_moments, real_pool = self._reals
        mean, std = scores.inception_score(predictions)
        row = row._replace(
            fid=scores.frechet_distance(real_moments, moments), inception_score_mean=mean, inception_score_std=std
        )
        if protocol.kid:
            kid_mean, kid_std = scores.kernel_distance(real_pool, pool, KID_SUBSETS, KID_SUBSET_SIZE, _SEED)
            row = row._replace(kid_mean=kid_mean, kid_std=kid_std)
        return row

    def _check_fakes(self, images: Tensor, count: int) -> None:
        expected = (count, self.store.channels, self.store.image_size, self.store.image_size)
        if images.shape != expected:
            raise ValueError(f"generate: expected images of shape {expected}, got {tuple(images.shape)}")

    def _forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, enabled=False):
            found, logits = self.network.module(pixels)
        return found, logits

    def _pool(self, count: int, width: int) -> scores.Pool:
        return scores.Pool.empty(min(count, KID_POOL) if self.protocol.kid else 0, width, self.device)

    @cached_property
    def _reals(self) -> tuple[scores.Moments, scores.Pool]:
        key = json.dumps([self.store.key, self.network.checksum, asdict(self.protocol), _SEED])
        path = self.cache / f"reals-{self.protocol.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        found = {name: torch.from_numpy(x).to(self.device) for name, x in remember(path, self._measure_reals).items()}
        pool = scores.Pool(found.pop("pool"))
        return scores.Moments(**found), pool

    def _measure_reals(self) -> dict[str, np.ndarray]:
        picks = np.random.RandomState(_SEED).permutation(self.store.count)[: self.protocol.reals]
        moments = pool = None
        for first in range(0, len(picks), self.batch_size):
            images = torch.from_numpy(self.store.read(picks[first : first + self.batch_size]))
            found, _ = self._forward(images.to(self.device).permute(0, 3, 1, 2).float())
            if moments is None:
                moments = scores.Moments.empty(found.shape[1], self.device)
                pool = self._pool(len(picks), found.shape[1])
            moments.update(found)
            pool.update(found, torch.arange(first, first + len(found), device=self.device))
        sums = {"count": moments.count, "first": moments.first, "second": moments.second, "pool": pool.features}
        return {name: value.cpu().numpy() for name, value in sums.items()}
