"""What prepare.py reads from: images of one size in an order, with what meta.json says of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from gan.data import pixels
from gan.data.npy import ImagesFile

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Source(ABC):
    """``images`` is called with ascending ranges, or, where ``parallel``, with any by several processes at once."""

    parallel: ClassVar[bool] = False
    name: str
    count: int
    image_size: int
    channels: int = 3
    labels: np.ndarray | None = None  # int64 (count,)
    classes: tuple[str, ...] = ()
    origin: dict[str, Any]  # for meta.json; another one is another set
    version: Any = None  # of the file or files, where no checksum tells: not continued if it has changed

    @abstractmethod
    def images(self, first: int, last: int) -> np.ndarray:
        """uint8 (last - first, S, S, C)."""


@contextlib.contextmanager
def naming_member(archive: Path, member: str) -> Iterator[None]:
    """Whatever a reader or decoder says of broken bytes, say of which file they are. A fault of the disk stays one."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{archive.name}: the member {member} is broken: {error}") from error


def check_expected(where: Path, expected: int | None, found: int) -> None:
    """As many images as there should be."""
    if expected is not None and found != expected:
        raise ValueError(f"expect: expected {expected} images in {where.name}, got {found}")
    if found == 0:
        raise ValueError(f"expect: expected images in {where.name}, got none")


def check_size(size: int) -> None:
    """Of the images to be made."""
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")


def md5_of(path: Path) -> str:
    """Of a file of any size, with a progress bar."""
    found = hashlib.md5(usedforsecurity=False)
    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="md5", disable=None) as bar,
    ):
        while part := file.read(1 << 22):
            found.update(part)
            bar.update(len(part))
    return found.hexdigest()


def stamp(path: Path) -> list[int]:
    """What changes when a file is written."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


class Folder(Source):
    """Pictures of any size and kind: the centred square, resized. Class folders become labels, in sorted order."""

    parallel = True

    def __init__(self, folder: Path, size: int, expect: int | None = None) -> None:
        check_size(size)
        if not folder.is_dir():
            raise ValueError(f"folder: expected a folder of images, got {folder}")
        inside = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        found = [path for path in inside if not any(part.startswith(".") for part in path.parts)]
        if not found:
            raise ValueError(f"folder: expected images ({' '.join(SUFFIXES)}) in {folder}, got none")
        self.classes = tuple(sorted({path.parts[0] for path in found if len(path.parts) > 1}))
        beside = [path for path in found if len(path.parts) == 1]
        if self.classes and beside:
            raise ValueError(
                f"folder: expected all images of {folder} in class folders or none, got {beside[0]} beside "
                f"{self.classes[0]}/"
            )
        check_expected(folder, expect, len(found))
        if self.classes:
            self.labels = np.array([self.classes.index(path.parts[0]) for path in found], np.int64)
        self.folder, self.found, self.image_size = folder, found, size
        self.name, self.count = folder.resolve().name, len(found)
        stamps = [[str(path), *stamp(folder / path)] for path in found]
        self.version = hashlib.blake2b(json.dumps(stamps).encode(), digest_size=16).hexdigest()
        self.origin = {
            "source": self.name,
            "bytes": sum(size for _, size, _ in stamps),
            "md5": None,
            "preset": None,
            "pixels": f"turned as EXIF says, on white, centred square, Pillow's LANCZOS (antialiased) to {size}",
        }

    def images(self, first: int, last: int) -> np.ndarray:
        return np.stack([self._image(path) for path in self.found[first:last]])

    def _image(self, path: Path) -> np.ndarray:
        content = (self.folder / path).read_bytes()
        with naming_member(self.folder, str(path)):
            square = pixels.centre_square(pixels.decode(content, background=255))
            return pixels.resize(square, self.image_size, Image.Resampling.LANCZOS)


class Npy(Source):
    """What the BSN authors' scripts wrote, stl10.npy or celeba.npy: uint8 (N, S, S, 3), RGB, ready."""

    def __init__(self, path: Path, expect: int | None = None) -> None:
        self.file = ImagesFile(path, "npy")
        self.count, self.image_size, _, self.channels = self.file.shape
        check_expected(path, expect, self.count)
        self.name = path.stem
        self.origin = {
            "source": path.name,
            "bytes": path.stat().st_size,
            "md5": md5_of(path),
            "preset": None,
            "pixels": "as they are",
        }

    def images(self, first: int, last: int) -> np.ndarray:
        out = np.empty((last - first, *self.file.shape[1:]), np.uint8)
        self.file.read_into(np.arange(first, last), out)
        return out
