"""ImageNet's pictures as three programs make them: the BSN authors', the SN-GAN authors' and mimicry."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, JpegImagePlugin

from gan.data import pixels

LEAST = 256  # pixels of the shorter side, which the SN-GAN authors ask for


def bsn(content: bytes, size: int) -> np.ndarray:
    """The centred square, resized by OpenCV."""
    return pixels.linear(pixels.centre_square(pixels.decode(content)), size)


def chainer(content: bytes, size: int) -> np.ndarray:
    """A JPEG of 256 x 256 by ImageMagick, then scipy.misc.imresize of its float32 pixels.

    ImageMagick keeps the subsampling of a JPEG, and writes other kinds without. What comes out is about half a grey
    level from what it writes.
    """
    with Image.open(io.BytesIO(content)) as opened:
        sampling = max(JpegImagePlugin.get_sampling(opened), 0)  # -1: no JPEG of three channels
        picture = opened.convert("RGB")
    shape = [int(side * LEAST / min(picture.size) + 0.5) for side in picture.size]
    square = pixels.centre(np.asarray(picture.resize(shape, Image.Resampling.LANCZOS)), LEAST)
    stored = io.BytesIO()
    Image.fromarray(square).save(stored, "JPEG", quality=95, subsampling=sampling)
    return pixels.resize(_stretched(np.asarray(Image.open(stored))), size, Image.Resampling.BILINEAR)


def _stretched(image: np.ndarray) -> np.ndarray:
    """From 0 to 255, all channels alike: scipy.misc.bytescale, in float32."""
    low, high = int(image.min()), int(image.max())
    scale = np.float32(255 / max(high - low, 1))
    return ((image.astype(np.float32) - np.float32(low)) * scale + np.float32(0.5)).astype(np.uint8)


def mimicry(content: bytes, size: int) -> np.ndarray:
    """torchvision's CenterCrop(224), then Resize(size)."""
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB")
    left, top = (_before(side, 224) for side in picture.size)
    square = np.asarray(picture.crop((left, top, left + 224, top + 224)))
    return pixels.resize(square, size, Image.Resampling.BILINEAR)


def _before(side: int, wanted: int) -> int:
    """Where a crop begins, below 0 for one with a margin: torchvision rounds the two otherwise."""
    return round((side - wanted) / 2) if side >= wanted else -((wanted - side) // 2)


PRESETS: Mapping[str, Callable[[bytes, int], np.ndarray]] = {"bsn": bsn, "chainer": chainer, "mimicry": mimicry}
