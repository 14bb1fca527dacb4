"""intra-FID (Miyato and Koyama, ICLR 2018, section 4): how far the fakes of a class are from the reals of that class.

FID is computed between the reals and the fakes of each class alone, and averaged over the classes. Unlike FID it sees a
generator that makes good images of the wrong class, or few different ones of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gan.data.store import Store
from gan.distributed import ranks
from gan.metrics import scores
from gan.metrics.judge import Images, Judge, images_of

ByClass = Callable[[int], tuple[int, Images]]  # a label to how many images of it there are, and these


class OfClass(NamedTuple):
    """The distance of a class, and from how many images it is."""

    label: int
    reals: int
    fakes: int
    fid: float


def by_class(store: Store) -> ByClass:
    """The images of a store with labels."""

    def of_label(label: int) -> tuple[int, Images]:
        index = np.flatnonzero(store.labels == label)
        return len(index), images_of(store, index)

    return of_label


@torch.no_grad()
def intra_fid(judge: Judge, fakes: ByClass, labels: Sequence[int]) -> list[OfClass]:
    """The distances of the classes ``labels``; their mean is the intra-FID. Reals are those of the judge's store.

    All ranks look at the batches of each class, and each computes the distances of its part of the classes, so that
    no rank holds the moments of more than two classes at a time.

    Raises:
        ValueError: a class has fewer than two images, or fakes are not finite.
    """
    team, reals = ranks(), by_class(judge.store)
    counts = [(reals(label)[0], fakes(label)[0]) for label in labels]
    for label, (of_reals, of_fakes) in zip(labels, counts, strict=True):
        if min(of_reals, of_fakes) < 2:
            raise ValueError(
                f"classes: expected at least 2 reals and 2 fakes of each class, got {of_reals} and {of_fakes} of class "
                f"{label}"
            )
    distances = torch.zeros(len(labels), dtype=torch.float64)
    for begin in range(0, len(labels), team.size):
        group = labels[begin : begin + team.size]
        for rank, label in enumerate(group):
            both = [_moments(judge, label, *images(label)) for images in (reals, fakes)]
            if rank == team.rank:
                own = both
        if team.rank < len(group):
            distances[begin + team.rank] = scores.frechet_distance(*own)
    team.sum_([distances])
    return [OfClass(x, *n, d) for x, n, d in zip(labels, counts, distances.tolist(), strict=True)]


def _moments(judge: Judge, label: int, count: int, images: Images) -> scores.Moments:
    """Of all ``count`` images of a class, on every rank."""
    sums: list[Any] = []  # Moments

    def take(_: Tensor, found: Tensor, __: Tensor) -> None:
        if not sums:
            sums.append(scores.Moments.empty(found.shape[1], judge.device))
        sums[0].update(found)

    bad = judge.feed(images, count, take)
    if bad is not None:
        raise ValueError(f"path: expected finite images, got fakes of class {label} that are not, from number {bad} on")
    scores.add_over_ranks(sums)
    moments: scores.Moments = sums[0]
    return moments
