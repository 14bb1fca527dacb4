"""ILSVRC2012_img_train.tar as it is published: a tar with a tar of JPEGs for each of 1,000 classes."""

from __future__ import annotations

import re
import tarfile
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from gan.data import photographs
from gan.data.archives import Archive
from gan.data.npy import naming, read_at
from gan.data.processes import results
from gan.data.sources import check_expected, check_size, naming_member

IMAGES, CLASSES = 1_281_167, 1000


class Pictures(NamedTuple):
    """Where those of a class lie in the archive. dropped: how many more there are, too small for the preset."""

    names: np.ndarray  # bytes
    offsets: np.ndarray  # int64
    sizes: np.ndarray  # int64
    dropped: int


class ImageNet(Archive):
    """Both tars are uncompressed: pictures are read from where they lie, by any process, in the order of their classes
    and names, which is that of a folder of class folders. Labels are the classes' numbers in that order."""

    name, md5, parallel = "imagenet", "1d675b47d978889d74fa0da5fadfb00e", True

    PRESETS: ClassVar = {
        "bsn": "turned as EXIF says, centred square, as cv2.resize to {0} (not antialiased)",
        "chainer": f"of {photographs.LEAST} x {photographs.LEAST} at least, the shorter side made {photographs.LEAST} "
        "by Pillow's LANCZOS (about what the authors' ImageMagick does), centred square, JPEG of quality 95, "
        "stretched to 0 to 255 one by one, Pillow's BILINEAR (antialiased) to {0}",
        "mimicry": "centred 224 x 224, black where there is less, Pillow's BILINEAR (antialiased) to {0}",
    }

    def __init__(
        self,
        path: Path,
        checksum: bool = True,
        expect: int = IMAGES,
        preset: str = "bsn",
        size: int = 128,
        workers: int = 1,
    ) -> None:
        check_size(size)
        super().__init__(path, checksum, preset, {name: text.format(size) for name, text in self.PRESETS.items()})
        self.image_size, self.tars = size, self._find_tars()
        self.classes = tuple(sorted(self.tars))
        if expect == IMAGES and len(self.classes) != CLASSES:
            raise ValueError(
                f"expect: expected {CLASSES} tars of classes in {path.name}, got {len(self.classes)}, "
                f"{self.classes[0]}.tar to {self.classes[-1]}.tar (--expect takes a part)"
            )
        found: dict[str, Pictures] = {}
        with tqdm(total=len(self.classes), unit="class", desc="index", disable=None) as bar:
            for wnid, pictures in results(self._index, self.classes, workers):
                found[wnid] = pictures
                bar.update()
        pictures = [found[wnid] for wnid in self.classes]
        self.names, self.offsets, self.sizes = (np.concatenate(x) for x in list(zip(*pictures, strict=True))[:3])
        self.labels = np.repeat(np.arange(len(pictures)), [len(x.names) for x in pictures])
        self.count, dropped = len(self.names), sum(x.dropped for x in pictures)
        check_expected(path, expect, self.count + dropped)
        if self.count == 0:
            raise ValueError(f"preset: {preset} drops every image of {path.name}, none has {photographs.LEAST} pixels")
        self.origin["dropped"] = dropped

    def _find_tars(self) -> dict[str, str]:
        """The member of each class, in whatever folder it is."""
        try:
            members = _members(self._tar)
        except tarfile.TarError as error:
            raise ValueError(f"archive: {self.path.name} is broken or cut off: {error}") from error
        found: dict[str, str] = {}
        for member in members:
            match = re.search(r"(?:^|/)(n\d{8})\.tar$", member.name)
            if match and found.setdefault(match[1], member.name) != member.name:
                raise ValueError(f"{self.path.name}: expected one {match[1]}.tar, got more")
        if not found:
            raise ValueError(f"archive: expected tars of classes (n01440764.tar) in {self.path.name}, got none")
        return found

    @cached_property
    def _tar(self) -> tarfile.TarFile:
        """Opened anew by each process."""
        try:
            tar = tarfile.TarFile(self.path)
        except tarfile.TarError as error:
            with self.path.open("rb") as file:
                packed = ", compressed with gzip: gunzip it first" if file.read(2) == b"\x1f\x8b" else ""
            raise ValueError(
                f"archive: expected a tar file that is not compressed, got {self.path.name}{packed}"
            ) from error
        weakref.finalize(self, tar.close)
        return tar

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_tar"}

    def _index(self, wnid: str) -> Pictures:
        """From the headers alone: the tar's, and where the preset needs them the pictures'."""
        outer = self._tar.getmember(self.tars[wnid])
        with naming_member(self.path, f"{wnid}.tar"):
            tar = tarfile.TarFile(fileobj=self._tar.extractfile(outer))
            found = [x for x in _members(tar) if x.isfile() and x.name.lower().endswith(".jpeg")]
        if not found:
            raise ValueError(f"archive: expected pictures (*.JPEG) in {wnid}.tar of {self.path.name}, got none")
        found.sort(key=lambda member: member.name)
        kept = [x for x in found if self.preset != "chainer" or self._shorter(wnid, tar, x) >= photographs.LEAST]
        return Pictures(
            np.array([x.name.encode("utf-8", "surrogateescape") for x in kept], bytes),
            np.array([outer.offset_data + x.offset_data for x in kept], np.int64),
            np.array([x.size for x in kept], np.int64),
            len(found) - len(kept),
        )

    def _shorter(self, wnid: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
        """The shorter side of a picture."""
        with (
            naming_member(self.path, f"{wnid}.tar/{member.name}"),
            tar.extractfile(member) as file,
            Image.open(file) as picture,
        ):
            return min(picture.size)

    def images(self, first: int, last: int) -> np.ndarray:
        return np.stack([self._image(i) for i in range(first, last)])

    def _image(self, i: int) -> np.ndarray:
        content = bytearray(self.sizes[i])
        with naming(self.path):
            read_at(self._tar.fileobj.fileno(), memoryview(content), int(self.offsets[i]))
        name = self.names[i].decode(errors="replace")
        with naming_member(self.path, f"{self.classes[self.labels[i]]}.tar/{name}"):
            return photographs.PRESETS[self.preset](bytes(content), self.image_size)


def _members(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """All of them. tarfile itself takes a header that is broken, or lacking, for the end."""
    found: list[tarfile.TarInfo] = []
    try:
        found.extend(tar)
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(tarfile.BLOCKSIZE)
        if end != bytes(tarfile.BLOCKSIZE):
            what = "no header and no mark of an end" if len(end) == tarfile.BLOCKSIZE else "the end of the file"
            raise tarfile.ReadError(f"{what} at byte {tar.offset}")
    except tarfile.TarError as error:
        after = f"after its member {found[-1].name}" if found else "at its start"
        raise tarfile.ReadError(f"{error} {after}") from error
    return found
