"""The archives as their makers publish them, CIFAR10, STL10, CelebA, with the pixels of the BSN authors' scripts."""

from __future__ import annotations

import gzip
import os
import re
import tarfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar

import numpy as np
from PIL import Image

from gan.data import cifar, pixels
from gan.data.sources import Source, check_expected, md5_of, naming_member, stamp

BROKEN = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


class Archive(Source):
    """A file that is known by its md5."""

    md5: str

    def __init__(self, path: Path, checksum: bool, preset: str, presets: dict[str, str]) -> None:
        if preset not in presets:
            raise ValueError(f"preset: expected {' or '.join(presets)} for {self.name}, got {preset}")
        if not path.is_file():
            raise ValueError(f"archive: expected a file, got {path}")
        self.path, self.preset, self.version = path, preset, stamp(path)
        found = md5_of(path) if checksum else None
        if checksum and found != self.md5:
            raise ValueError(
                f"archive: expected {path.name} to have the md5 {self.md5}, got {found}: it is incomplete or another "
                f"file (--no-checksum takes it as it is)"
            )
        self.origin = {
            "source": path.name,
            "bytes": path.stat().st_size,
            "md5": found,
            "preset": preset,
            "pixels": presets[preset],
        }


class Cifar10(Archive):
    """cifar-10-python.tar.gz: five pickles of Python 2, each image as 1024 reds, 1024 greens, 1024 blues."""

    name, md5 = "cifar10", "c58f30108f718f92721af3b95e74349a"
    image_size, classes = 32, cifar.CLASSES

    def __init__(self, path: Path, checksum: bool = True, expect: int = 50_000) -> None:
        super().__init__(path, checksum, "bsn", {"bsn": "as they are"})
        wanted = [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)]
        with _tar(path) as tar:
            batches = {member: cifar.batch(path, member, file) for member, file in _members(path, tar, wanted)}
        self.pixels = np.concatenate([batches[member][0] for member in wanted])
        self.labels = np.concatenate([batches[member][1] for member in wanted])
        self.count = len(self.pixels)
        check_expected(path, expect, self.count)

    def images(self, first: int, last: int) -> np.ndarray:
        return self.pixels[first:last].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


class Stl10(Archive):
    """stl10_binary.tar.gz: the 100,000 unlabelled images of 96 x 96, each channel column after column."""

    name, md5, image_size = "stl10", "91f7769df0f17e558f3565bffb0c7dfb", 48
    PRESETS: ClassVar = {"bsn": "2 x 2 mean, as cv2.resize to 48", "mimicry": "Pillow's BILINEAR (antialiased) to 48"}
    MEMBER, BYTES = "stl10_binary/unlabeled_X.bin", 3 * 96 * 96

    def __init__(self, path: Path, checksum: bool = True, expect: int = 100_000, preset: str = "bsn") -> None:
        super().__init__(path, checksum, preset, self.PRESETS)
        tar = _tar(path)
        weakref.finalize(self, tar.close)
        _, self.file = next(_members(path, tar, [self.MEMBER]))
        self.count, rest = divmod(self.file.seek(0, os.SEEK_END), self.BYTES)
        if rest:
            raise ValueError(f"archive: expected {self.MEMBER} of {self.BYTES} bytes an image, got {rest} bytes more")
        check_expected(path, expect, self.count)

    def images(self, first: int, last: int) -> np.ndarray:
        with naming_member(self.path, self.MEMBER):
            self.file.seek(first * self.BYTES)
            content = self.file.read((last - first) * self.BYTES)
            stored = np.frombuffer(content, np.uint8).reshape(last - first, 3, 96, 96).transpose(0, 3, 2, 1)
        if self.preset == "bsn":
            return pixels.halve(stored)
        return np.stack([pixels.resize(np.ascontiguousarray(x), 48, Image.Resampling.BILINEAR) for x in stored])


def _tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except BROKEN as error:
        raise ValueError(f"archive: expected a tar file, compressed or not, got {path.name}") from error


def _members(path: Path, tar: tarfile.TarFile, wanted: list[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """In the order of the archive, so that nothing is decompressed twice."""
    missing = set(wanted)
    try:
        while missing and (member := tar.next()):
            name = str(PurePosixPath(member.name))
            if name in missing and member.isfile():
                missing.remove(name)
                yield name, tar.extractfile(member)
    except BROKEN as error:
        raise ValueError(f"archive: {path.name} is broken before its member {min(missing)}: {error}") from error
    if missing:
        raise ValueError(f"archive: expected a member {min(missing)} in {path.name}, got none")


class CelebA(Archive):
    """img_align_celeba.zip: 000001.jpg to 202599.jpg of 178 x 218, in whatever folder."""

    name, md5, image_size, parallel = "celeba", "00d2c5bc6d35e252742224ab0c1e8fcb", 64, True
    PRESETS: ClassVar = {
        "bsn": "rows 45:173, columns 25:153, 2 x 2 mean, as cv2.resize to 64",
        "mimicry": "centred 178 x 178, Pillow's BILINEAR (antialiased) to 64",
    }

    def __init__(self, path: Path, checksum: bool = True, expect: int = 202_599, preset: str = "bsn") -> None:
        super().__init__(path, checksum, preset, self.PRESETS)
        found: dict[str, str] = {}
        for member in self._zip.namelist():
            match = re.search(r"(?:^|/)(\d{6})\.jpg$", member)
            if match and found.setdefault(match[1], member) != member:
                raise ValueError(f"{path.name}: expected one {match[1]}.jpg, got {found[match[1]]} and {member}")
        missing = next((name for name in (f"{i:06d}" for i in range(1, expect + 1)) if name not in found), None)
        if missing:
            raise ValueError(
                f"expect: expected 000001.jpg to {expect:06d}.jpg in {path.name}, got {len(found)} of them: "
                f"{missing}.jpg is missing"
            )
        check_expected(path, expect, len(found))
        self.members, self.count = [found[number] for number in sorted(found)], len(found)

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        """Opened anew by each process."""
        try:
            return zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"archive: expected a zip file, got {self.path.name}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_zip"}

    def images(self, first: int, last: int) -> np.ndarray:
        return np.stack([self._image(member) for member in self.members[first:last]])

    def _image(self, member: str) -> np.ndarray:
        with naming_member(self.path, member):
            image = pixels.decode(self._zip.read(member))
            if self.preset == "bsn":
                return pixels.halve(pixels.centre(image, 128))
            return pixels.resize(pixels.centre(image, 178), 64, Image.Resampling.BILINEAR)
