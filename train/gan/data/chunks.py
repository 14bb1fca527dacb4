"""Decodes images a chunk at a time and writes each to its place, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from gan.data import store
from gan.data.npy import write_at
from gan.data.sources import Source


@dataclass(frozen=True)
class Chunks:
    """The images of a source, ``size`` to a chunk; they belong into ``path``, whose data begins at ``offset``."""

    source: Source
    path: Path
    offset: int
    size: int

    @property
    def count(self) -> int:
        """How many chunks."""
        return -(-self.source.count // self.size)

    def images(self, chunk: int) -> range:
        """Which images are of a chunk."""
        return range(chunk * self.size, min((chunk + 1) * self.size, self.source.count))

    def make(self, chunk: int) -> bytes:
        """Decode and write one; its digest."""
        wanted = self.images(chunk)
        images = self.source.images(wanted.start, wanted.stop)
        row = self.source.image_size**2 * self.source.channels
        write_at(self.path, images.tobytes(), self.offset + wanted.start * row)
        return store.digest(images)


def made(chunks: Chunks, wanted: list[int], workers: int) -> Iterator[tuple[int, bytes]]:
    """(chunk, its digest) of those that are wanted, in whatever order they are written."""
    if not chunks.source.parallel or min(workers, len(wanted)) < 2:
        for chunk in wanted:
            yield chunk, chunks.make(chunk)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(wanted)), context, initializer=_begin, initargs=(chunks,))
    try:
        waiting = {pool.submit(_make, chunk): chunk for chunk in wanted}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BrokenProcessPool as error:
        raise ChildProcessError("a process that decodes images has died: the same command continues") from error
    finally:
        pool.shutdown(cancel_futures=True)


_chunks: Chunks  # in a worker, what it works on


def _begin(chunks: Chunks) -> None:
    global _chunks
    _chunks = chunks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the business of the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed can end nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make(chunk: int) -> bytes:
    return _chunks.make(chunk)
