"""Between the bytes of stored images and the floats that networks see."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 to floats of the default dtype in [-1, 1], as the BSN authors scale: x / 255 * 2 - 1."""
    return images / 127.5 - 1


def dequantized(images: Tensor, uniform: Tensor) -> Tensor:
    """uint8 and U(0, 1) of their shape to floats in [-1, 1), as the SN-GAN authors scale: x / 128 - 1 + U(0, 1/128)."""
    return (images + uniform) / 128 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] to uint8, the inverse of ``to_float``: rounded, and clamped to the range."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
