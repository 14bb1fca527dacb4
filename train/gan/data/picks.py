"""Which images a batch has: a function of seed, number of the draw, batch size and number of images, and of no state.

Made from the raw output of NumPy's Philox, which is fixed for good, and not by its distributions, which may change
between versions of NumPy: a run that is continued years later sees the same images.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

WITH_REPLACEMENT, BY_EPOCHS = 1, 2  # purposes: no number serves both


def with_replacement(seed: int, draw: int, batch_size: int, count: int) -> np.ndarray:
    """int64 (batch_size,): each image independent of all others, as the BSN authors draw."""
    _check(batch_size, count)
    uniform = (_raw(seed, WITH_REPLACEMENT, draw, batch_size) >> np.uint64(11)) * 2.0**-53
    return (uniform * count).astype(np.int64)


def by_epochs(seed: int, draw: int, batch_size: int, count: int) -> np.ndarray:
    """int64 (batch_size,): every image once an epoch, each epoch in an order of its own, as Chainer's iterators.

    A batch at the end of an epoch takes what is left and goes on with the next one.
    """
    _check(batch_size, count)
    epoch, first = divmod(draw * batch_size, count)
    picked = _order(seed, epoch, count)[first : first + batch_size]
    rest = _order(seed, epoch + 1, count)[: batch_size - len(picked)] if len(picked) < batch_size else picked[:0]
    return np.concatenate([picked, rest])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    order = np.argsort(_raw(seed, BY_EPOCHS, epoch, count), kind="stable")
    order.flags.writeable = False  # it is shared
    return order


def _raw(seed: int, purpose: int, number: int, size: int) -> np.ndarray:
    """uint64 (size,). The counter's upper half is the number, so that no two numbers share a block."""
    key = np.array([seed & (2**64 - 1), purpose], np.uint64)
    return np.random.Philox(key=key, counter=[0, 0, number, 0]).random_raw(size)


def _check(batch_size: int, count: int) -> None:
    if not 0 < batch_size <= count:
        raise ValueError(f"batch_size: expected 1 to {count}, the number of images, got {batch_size}")
