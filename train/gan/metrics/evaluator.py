"""Scores of a generator against the images of a store, by a protocol."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from math import nan
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gan.distributed import ranks
from gan.metrics import cache, protocols, scores
from gan.metrics.judge import Images, Judge, images_of

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


class Evaluator(Judge):
    """Called with ``generate``, gives ``Scores``, on every rank the same; the same fakes give the same numbers.

    ``generate(first, count)`` gives the fakes number first to first + count - 1, float (count, C, S, S) in [-1, 1], or
    uint8 where there are only such. A protocol whose network is not here has rows that say what is missing.
    """

    @torch.no_grad()
    def __call__(self, generate: Images) -> Scores:
        """The scores of ``generate``."""
        protocol, count = self.protocol, self.protocol.reals or self.store.count
        row = Scores(protocol.label(count), self.network.checksum if self.network else "", count, protocol.fakes)
        if self.missing:
            return row._replace(missing=self.missing)
        sums: list[Any] = []  # Moments, Predictions, Pool

        def take(number: Tensor, found: Tensor, logits: Tensor) -> None:
            logits = logits[:, : protocol.classes]
            if not sums:
                sums.append(scores.Moments.empty(found.shape[1], self.device))
                sums.append(scores.Predictions.empty(protocol.splits, logits.shape[1], self.device))
                sums.append(self._pool(protocol.fakes, found.shape[1]))
            moments, predictions, pool = sums
            scored = number < protocol.score_fakes
            split = scores.split_of(number[scored], protocol.score_fakes, protocol.splits)
            predictions.update(logits[scored], split)
            number = number - protocol.first_fake
            compared = (number >= 0) & (number < protocol.fakes)
            moments.update(found[compared])
            pool.update(found[compared], number[compared])

        bad = self.feed(generate, protocol.all_fakes, take)
        if bad is not None:
            return row._replace(missing=f"the fakes from number {bad} on are not all finite")
        scores.add_over_ranks(sums)
        reals = self._reals
        return ranks().of_first(lambda: self._scored(row, *reals, *sums))

    def _scored(
        self,
        row: Scores,
        real_moments: scores.Moments,
        real_pool: scores.Pool,
        moments: scores.Moments,
        predictions: scores.Predictions,
        pool: scores.Pool,
    ) -> Scores:
        mean, std = scores.inception_score(predictions)
        row = row._replace(
            fid=scores.frechet_distance(real_moments, moments), inception_score_mean=mean, inception_score_std=std
        )
        if self.protocol.kid:
            subsets = (protocols.KID_SUBSETS, protocols.KID_SUBSET_SIZE, _SEED)
            kid_mean, kid_std = scores.kernel_distance(real_pool, pool, *subsets)
            row = row._replace(kid_mean=kid_mean, kid_std=kid_std)
        return row

    def _pool(self, count: int, width: int) -> scores.Pool:
        return scores.Pool.empty(min(count, protocols.KID_POOL) if self.protocol.kid else 0, width, self.device)

    @cached_property
    def _reals(self) -> tuple[scores.Moments, scores.Pool] | tuple[()]:
        """On the first rank, which has them in a file; nothing on the others, which help it where there is none."""
        key = json.dumps([self.store.key, self.network.checksum, asdict(self.protocol), _SEED])
        path = self.cache / f"reals-{self.protocol.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        team = ranks()
        arrays = cache.read(path) if team.first else None
        if not team.of_first(lambda: arrays is not None):
            arrays = self._measure_reals()
            if team.first:
                cache.write(path, arrays)
        if not team.first:
            return ()
        found = {name: torch.from_numpy(x).to(self.device) for name, x in arrays.items()}
        pool = scores.Pool(found.pop("pool"))
        return scores.Moments(**found), pool

    def _measure_reals(self) -> dict[str, np.ndarray]:
        picks = np.random.RandomState(_SEED).permutation(self.store.count)[: self.protocol.reals]
        sums: list[Any] = []  # Moments, Pool

        def take(number: Tensor, found: Tensor, _: Tensor) -> None:
            if not sums:
                sums.append(scores.Moments.empty(found.shape[1], self.device))
                sums.append(self._pool(len(picks), found.shape[1]))
            moments, pool = sums
            moments.update(found)
            pool.update(found, number)

        self.feed(images_of(self.store, picks), len(picks), take)
        scores.add_over_ranks(sums)
        moments, pool = sums
        arrays = {"count": moments.count, "first": moments.first, "second": moments.second, "pool": pool.features}
        return {name: value.cpu().numpy() for name, value in arrays.items()}
