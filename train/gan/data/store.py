"""A data folder, opened: images.npy (uint8, N x S x S x C), labels.npy where there are any, meta.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gan.data.npy import ImagesFile

FORMAT = 1
DIGEST = 16  # bytes
CHUNK = 512  # images with one digest; a key is made of the digests, so that parts of a set can be hashed apart


class Rows(Protocol):
    """Where the bytes are."""

    def read_into(self, index: np.ndarray, out: np.ndarray) -> None:
        """Images ``index`` into ``out``, uint8 (len(index), S, S, C), contiguous."""


@dataclass(frozen=True)
class InMemory:
    """images: uint8 (N, S, S, C)."""

    images: np.ndarray

    def read_into(self, index: np.ndarray, out: np.ndarray) -> None:
        np.take(self.images, index, axis=0, out=out)


@dataclass(frozen=True, eq=False)
class Store:
    """Images of one size. labels: int64 (count,) below ``classes``, or None. key: a checksum of images and labels."""

    name: str
    count: int
    image_size: int
    channels: int
    labels: np.ndarray | None
    classes: int
    key: str
    rows: Rows

    def __post_init__(self) -> None:
        if self.labels is not None:
            check_labels("labels: expected them", self.labels, self.count, self.classes)

    @property
    def nbytes(self) -> int:
        """Of all images."""
        return self.count * self.image_size**2 * self.channels

    def read(self, index: np.ndarray) -> np.ndarray:
        """uint8 (len(index), S, S, C)."""
        out = np.empty((len(index), self.image_size, self.image_size, self.channels), np.uint8)
        self.read_into(index, out)
        return out

    def read_into(self, index: np.ndarray, out: np.ndarray) -> None:
        """``read`` into an array that is there already."""
        if len(index) > 0 and not 0 <= index.min() <= index.max() < self.count:
            raise IndexError(
                f"index: expected 0 to {self.count - 1} for {self.name}, got {index.min()} to {index.max()}"
            )
        self.rows.read_into(index, out)

    def require(self, *, image_size: int, channels: int = 3, labels: bool = False) -> None:
        """Refuse data that a recipe cannot be trained on."""
        if self.image_size != image_size:
            raise ValueError(
                f"data: expected images of {image_size} x {image_size} pixels, got {self.name} of "
                f"{self.image_size} x {self.image_size}"
            )
        if self.channels != channels:
            raise ValueError(f"data: expected images of {channels} channels, got {self.name} with {self.channels}")
        if labels and self.labels is None:
            raise ValueError(f"data: expected images with labels, got {self.name} without")


def memory_store(name: str, images: np.ndarray, labels: np.ndarray | None = None) -> Store:
    """A set in memory, uint8 (N, S, S, C). Its key is that of a folder with the same content."""
    count, size, width, channels = images.shape
    if images.dtype != np.uint8 or size != width:
        raise ValueError(f"images: expected uint8 of shape (N, S, S, C), got {images.dtype} of shape {images.shape}")
    labels = None if labels is None else labels.astype(np.int64)
    classes = 0 if labels is None else int(labels.max()) + 1
    key = content_key(images.shape, (digest(images[i : i + CHUNK]) for i in range(0, count, CHUNK)), labels)
    return Store(name, count, size, channels, labels, classes, key, InMemory(images))


def check_labels(expected: str, labels: np.ndarray, count: int, classes: int) -> None:
    """Raises ValueError, which begins with ``expected``, for what are not ``count`` labels below ``classes``."""
    found = f"{labels.dtype} of shape {labels.shape}"
    if labels.shape == (count,) and labels.dtype == np.int64:
        if 0 <= labels.min() <= labels.max() < classes:
            return
        found = f"{labels.min()} to {labels.max()}"
    raise ValueError(f"{expected} to be {count} int64 from 0 to {classes - 1}, got {found}")


def digest(images: np.ndarray) -> bytes:
    """``DIGEST`` bytes that stand for up to ``CHUNK`` images."""
    return hashlib.blake2b(np.ascontiguousarray(images).data, digest_size=DIGEST).digest()


def content_key(shape: tuple[int, ...], digests: Iterable[bytes], labels: np.ndarray | None) -> str:
    """The key of a set, from the digests of its chunks in order."""
    found = hashlib.blake2b(json.dumps(shape).encode(), digest_size=DIGEST)
    for part in digests:
        found.update(part)
    if labels is not None:
        found.update(labels.astype("<i8").tobytes())
    return found.hexdigest()


def open_store(folder: Path) -> Store:
    """What prepare.py has written. A folder that is not whole is refused."""
    meta = read_meta(folder)
    images = ImagesFile(folder / "images.npy", "data")
    shape = tuple(meta[name] for name in ("count", "image_size", "image_size", "channels"))
    if images.shape != shape:
        raise ValueError(f"data: expected {images.path} of shape {shape}, as meta.json says, got {images.shape}")
    classes, labels = len(meta["classes"]), None
    if classes > 0:
        try:
            labels = np.load(folder / "labels.npy")
        except ValueError as error:
            raise ValueError(f"data: expected {folder / 'labels.npy'} to be a .npy file: {error}") from error
        check_labels(f"data: expected {folder / 'labels.npy'}", labels, shape[0], classes)
    return Store(meta["name"], shape[0], shape[1], shape[3], labels, classes, meta["key"], images)


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a data folder."""
    path = folder / "meta.json"
    if not path.exists():
        begun = folder.with_name(f"{folder.name}.partial")
        why = f", which prepare.py has not finished: {begun}" if begun.exists() else ""
        raise ValueError(f"data: expected a folder written by prepare.py, with meta.json in it, got {folder}{why}")
    try:
        meta = json.loads(path.read_text())
        found = meta["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: expected {path} as prepare.py writes it, got something else: {error!r}") from error
    if found != FORMAT:
        raise ValueError(f"data: expected {path} of format {FORMAT}, got {found}")
    return dict(meta)
