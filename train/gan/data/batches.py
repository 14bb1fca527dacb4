"""Batches on the device: from images that live there, or read from the disk ahead of time.

Both give the same tensors, strides included, so that a run does not depend on which of them it had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gan.data.store import Store
from gan.devices import sent

Picks = Callable[[int], np.ndarray]
AHEAD = 4  # batches that are being read while one is trained on
SLICE = 4096  # images that one thread reads at a time when a whole set is loaded


class Batches:
    """Draw after draw: which images it has, ``picks(draw)`` says.

    Sets of up to ``resident_gb`` (10^9 bytes) live on the device as uint8. Larger ones are read from the disk by
    ``workers`` threads, a few draws ahead. What fails there is raised by ``next``.
    """

    def __init__(
        self,
        store: Store,
        picks: Picks,
        device: torch.device,
        resident_gb: float = 4.0,
        workers: int = 8,
        start: int = 0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        self.labels = None if store.labels is None else torch.from_numpy(store.labels).to(device)
        kind = _Resident if store.nbytes <= resident_gb * 1e9 else _Ahead
        self.draws: _Resident | _Ahead = kind(store, picks, device, workers, start)

    def next(self) -> tuple[Tensor, Tensor | None]:
        """uint8 (n, C, S, S) and int64 (n,), both on the device."""
        index, images = self.draws.next()
        return images, None if self.labels is None else self.labels[sent(index, self.labels.device)]

    def close(self) -> None:
        """Stop reading."""
        self.draws.close()


class _Resident:
    """All images on the device."""

    def __init__(self, store: Store, picks: Picks, device: torch.device, workers: int, start: int) -> None:
        self.picks, self.draw = picks, start
        shape = (store.count, store.channels, store.image_size, store.image_size)
        self.images = torch.empty(shape, dtype=torch.uint8, device=device)
        slices = [np.arange(i, min(i + SLICE, store.count)) for i in range(0, store.count, SLICE)]
        with ThreadPoolExecutor(workers) as pool:
            for index, pixels in zip(slices, pool.map(store.read, slices), strict=True):
                self.images[index[0] : index[-1] + 1] = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)

    def next(self) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(self.picks(self.draw))
        self.draw += 1
        return index, self.images[sent(index, self.images.device)]

    def close(self) -> None:
        del self.images


@dataclass
class _Reading:
    """A batch on its way. For a GPU it is in pinned memory, which is used again once the copy there is done."""

    index: np.ndarray
    images: Tensor
    parts: list[Future[None]] = field(default_factory=list)
    copied: torch.cuda.Event | None = None


class _Ahead:
    """The next batches are being read by threads."""

    def __init__(self, store: Store, picks: Picks, device: torch.device, workers: int, start: int) -> None:
        self.store, self.picks, self.device, self.workers, self.draw = store, picks, device, workers, start
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
        self.reading: deque[_Reading] = deque()
        for _ in range(AHEAD):
            self._read(None)
        self.last: _Reading | None = None

    def next(self) -> tuple[Tensor, Tensor]:
        if self.last is not None:  # a step later: its copy to the device has run beside that
            self._read(self.last)
        self.last = batch = self.reading.popleft()
        for part in batch.parts:
            part.result()
        images = batch.images.to(self.device, non_blocking=True)
        if batch.copied is not None:
            batch.copied.record()
        return torch.from_numpy(batch.index), images

    def _read(self, used: _Reading | None) -> None:
        """Begin with the next draw, in the pinned memory of one that is done with if it fits."""
        index = self.picks(self.draw)
        self.draw += 1
        if used is not None and used.copied is not None:
            used.copied.synchronize()
        free = used is not None and used.copied is not None and len(used.index) == len(index)
        batch = used if free else self._empty(index)
        batch.index = index
        images, step = batch.images.numpy(), -(-len(index) // self.workers)
        batch.parts = [
            self.pool.submit(self._read_part, index[i : i + step], images[i : i + step])
            for i in range(0, len(index), step)
        ]
        self.reading.append(batch)

    def _read_part(self, index: np.ndarray, out: np.ndarray) -> None:
        """The channels come first here and not by torch, whose own threads would get in the way of these."""
        out[:] = self.store.read(index).transpose(0, 3, 1, 2)

    def _empty(self, index: np.ndarray) -> _Reading:
        gpu = self.device.type == "cuda"
        shape = (len(index), self.store.channels, self.store.image_size, self.store.image_size)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=gpu)
        return _Reading(index, images, copied=torch.cuda.Event() if gpu else None)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
