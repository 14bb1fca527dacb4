"""From the bytes of a picture to uint8 pixels (height, width, 3): decoding, crops, resizes.

Pillow and OpenCV decode JPEG and PNG to the same bits; what OpenCV does beyond that is done here, so that the authors'
pixels need no OpenCV: cv2.imdecode(..., IMREAD_COLOR) turns a picture as its EXIF data says, has its own CMYK, takes
the high byte of 16 bits and drops an alpha channel.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps


def decode(content: bytes, background: int | None = None) -> np.ndarray:
    """RGB as cv2.imdecode(..., IMREAD_COLOR) gives it, whatever the file is called.

    With ``background``, a grey level, what is transparent lies on that instead of losing its alpha channel.
    """
    with Image.open(io.BytesIO(content)) as picture:
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode == "CMYK":
            return _from_cmyk(np.asarray(picture))
        if picture.mode.startswith("I"):
            high = (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(high[..., None], 3, axis=2)
        if background is not None and picture.has_transparency_data:
            return _laid_on(background, np.asarray(picture.convert("RGBA")))
        return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _from_cmyk(inks: np.ndarray) -> np.ndarray:
    """Pillow takes every CMYK picture for one of Adobe's, which are stored inverted; OpenCV works on what is stored."""
    stored = 255 - inks.astype(np.int32)
    black = stored[..., 3:]
    return (black - ((255 - stored[..., :3]) * black >> 8)).astype(np.uint8)


def _laid_on(background: int, rgba: np.ndarray) -> np.ndarray:
    """The colours weighted by alpha, rounded to the nearest."""
    colours, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    return ((colours * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)


def centre(image: np.ndarray, size: int) -> np.ndarray:
    """The middle ``size`` x ``size`` pixels; of an odd rest the smaller half is cut off above and on the left."""
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ValueError(f"expected at least {size} x {size} pixels to crop, got {height} x {width}")
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def centre_square(image: np.ndarray) -> np.ndarray:
    """The largest centred square."""
    return centre(image, min(image.shape[:2]))


def halve(images: np.ndarray) -> np.ndarray:
    """(..., 2S, 2S, C) to (..., S, S, C) as cv2.resize does at exactly this ratio: (a + b + c + d + 2) >> 2."""
    wide = images.astype(np.uint16)
    rows = wide[..., 0::2, :, :] + wide[..., 1::2, :, :]
    return ((rows[..., 0::2, :] + rows[..., 1::2, :] + 2) >> 2).astype(np.uint8)


def linear(image: np.ndarray, size: int) -> np.ndarray:
    """A square picture to (size, size, 3) as cv2.resize does it by default: not antialiased, to the bit.

    Weights have 11 bits; four of a row's 19 bits are dropped, then 16 of each product, then two that are rounded.
    """
    if len(image) == 2 * size:
        return halve(image)
    before, after, *weights = _neighbours(len(image), size)
    # Beyond the first and the last pixel OpenCV takes that one alone within a row, but in a column twice, weighted.
    within_row = [np.where(before == after, alone, x) for alone, x in zip(np.int32([2048, 0]), weights, strict=True)]
    # Channels become columns of their own, as NumPy is slow where the last axis is short.
    left, right = ((3 * at[:, None] + np.arange(3)).reshape(-1) for at in (before, after))
    of_left, of_right = (np.repeat(weight, 3) for weight in within_row)

    def rows(at: np.ndarray, weight: np.ndarray) -> np.ndarray:
        found = image.take(at, 0).reshape(size, -1)
        mixed = found.take(left, 1) * of_left + found.take(right, 1) * of_right
        return (mixed >> 4) * weight[:, None] >> 16

    mixed = rows(before, weights[0]) + rows(after, weights[1]) + 2 >> 2
    return mixed.astype(np.uint8).reshape(size, size, 3)


@lru_cache(maxsize=64)
def _neighbours(old: int, new: int) -> tuple[np.ndarray, ...]:
    """The two of ``old`` pixels that each of ``new`` lies between, and the weight of each."""
    at = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    below = np.floor(at)
    above = at - below
    weights = (np.rint(weight * np.float32(2048)).astype(np.int32) for weight in (np.float32(1) - above, above))
    first = below.astype(np.int64)
    return first.clip(0, old - 1), (first + 1).clip(0, old - 1), *weights


def resize(image: np.ndarray, size: int, filter: Image.Resampling) -> np.ndarray:
    """To ``size`` x ``size``, antialiased, by Pillow."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), filter))
