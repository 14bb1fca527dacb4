"""Small archives in the formats of the real ones, and the BSN authors' lines that read those, with OpenCV."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Compressed as the name says."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def zipped(path: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def string(content: bytes) -> bytes:
    """A str of Python 2, which protocol 2 writes as SHORT_BINSTRING or BINSTRING."""
    if len(content) < 256:
        return b"U" + bytes([len(content)]) + content
    return b"T" + struct.pack("<i", len(content)) + content


def whole(number: int) -> bytes:
    """BININT1, BININT2 or BININT."""
    if 0 <= number < 256:
        return b"K" + bytes([number])
    return b"M" + struct.pack("<H", number) if 0 <= number < 65536 else b"J" + struct.pack("<i", number)


def python2_array(data: np.ndarray) -> bytes:
    """What cPickle.dump(data, file, 2) of Python 2 and an old NumPy writes for a uint8 matrix."""
    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85" + string(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|")
    dtype += b"NNN" + whole(-1) + whole(-1) + b"K\x00tb"
    shape = whole(data.shape[0]) + whole(data.shape[1]) + b"\x86"
    return made + b"(K\x01" + shape + dtype + b"\x89" + string(data.tobytes()) + b"tb"


def cifar_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """Byte for byte in the manner of data_batch_1."""
    items = string(b"batch_label") + string(b"training batch 1 of 5")
    items += string(b"labels") + b"](" + b"".join(map(whole, labels)) + b"e"
    items += string(b"data") + python2_array(data)
    items += string(b"filenames") + b"](" + string(b"leptodactylus_pentadactylus_s_000004.png") + b"e"
    return b"\x80\x02}q\x01(" + items + b"u."


def cifar_members(data: np.ndarray, labels: list[int]) -> dict[str, bytes]:
    """As the published archive: batches in no order, with more beside them."""
    n = len(data) // 5
    parts = {i: cifar_pickle(data[(i - 1) * n : i * n], labels[(i - 1) * n : i * n]) for i in range(1, 6)}
    members = {f"cifar-10-batches-py/data_batch_{i}": parts[i] for i in (4, 1, 5, 2, 3)}
    return {"cifar-10-batches-py/readme.html": b"<html>", **members, "cifar-10-batches-py/test_batch": parts[1]}


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth with some noise, as photographs are."""
    y, x = np.mgrid[:height, :width]
    phase = rng.uniform(0, 6, 3)
    waves = 127 + 90 * np.sin(x[..., None] / 11 + phase) * np.cos(y[..., None] / 7 - phase)
    return (waves + rng.normal(0, 15, waves.shape)).clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image: np.ndarray, orientation: int, kind: str = "JPEG") -> bytes:
    """With EXIF data that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


def celeba_members(rng: np.random.Generator, count: int, folder: str = "img_align_celeba") -> dict[str, bytes]:
    """JPEGs of 178 x 218."""
    pictures = [encoded(picture(rng, 218, 178), quality=90) for _ in range(min(count, 8))]
    return {f"{folder}/{i + 1:06d}.jpg": pictures[i % len(pictures)] for i in range(count)}


def authors_celeba(content: bytes) -> np.ndarray:
    """dataset_preprocess/CelebA/preprocess.py, / as Python 2 divides."""
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    height, width, _ = image.shape
    top, left = (height - 128) // 2, (width - 128) // 2
    image = cv2.resize(image[top : top + 128, left : left + 128, :], (64, 64))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def authors_stl10(content: bytes) -> np.ndarray:
    """dataset_preprocess/STL10/preprocess.py."""
    images = np.transpose(np.reshape(np.frombuffer(content, np.uint8), (-1, 3, 96, 96)), (0, 3, 2, 1))
    return np.stack([cv2.resize(image, (48, 48)) for image in images])


def authors_cifar10(data: np.ndarray) -> np.ndarray:
    """gan/load_data.py, before the division."""
    return np.transpose(np.reshape(data, [len(data), 3, 32, 32]), [0, 2, 3, 1])


def imagenet_pictures(rng: np.random.Generator, each: int) -> dict[str, bytes]:
    """Of one class: one of every odd kind that ILSVRC2012 has, then JPEGs, wide and high, up to ``each``."""
    photo = picture(rng, 280, 300)
    inks = np.dstack([photo, picture(rng, 280, 300)[..., 0]])
    found = [
        encoded(Image.fromarray(inks, "CMYK"), quality=95),
        encoded(photo, "PNG"),
        encoded(Image.fromarray(photo[..., 0])),
        turned(photo, 6),
        encoded(picture(rng, 21, 30)),
        encoded(picture(rng, 400, 256), subsampling=0),
        encoded(picture(rng, 259, 401)),
        encoded(picture(rng, 256, 256)),  # twice 128
    ]
    found += [encoded(picture(rng, *rng.integers(60, 120, 2))) for _ in range(each - len(found))]
    return {f"{10026 + 7 * i}": content for i, content in enumerate(found[:each])}


def imagenet_tar(path: Path, rng: np.random.Generator, classes: int, each: int) -> Path:
    """A small ILSVRC2012_img_train.tar: so many classes of so many pictures, the odd ones among them."""
    return tar_of_classes(path, {f"n{1440764 + i:08d}": imagenet_pictures(rng, each) for i in range(classes)})


def tar_of_classes(path: Path, classes: Mapping[str, Mapping[str, bytes]]) -> Path:
    """In the manner of ILSVRC2012_img_train.tar, from {wnid: {number: picture}}."""
    tars = {}
    for wnid, pictures in classes.items():
        inner = tar(path.with_name(f"{wnid}.tar"), {f"{wnid}_{i}.JPEG": content for i, content in pictures.items()})
        tars[inner.name] = inner.read_bytes()
        inner.unlink()
    return tar(path, tars)


def authors_imagenet(content: bytes, size: int = 128) -> np.ndarray:
    """dataset_preprocess/ImageNet/preprocess.py."""
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return cv2.resize(image[top : top + side, left : left + side], (size, size))
