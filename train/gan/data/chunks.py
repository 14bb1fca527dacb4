"""Decodes images a chunk at a time and writes each to its place."""

from __future__ import annotations

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
