"""Sheets of images."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor


def grid(images: Tensor, columns: int) -> Image.Image:
    """uint8 (N, C, S, S) with C of 1 or 3 as one picture, row by row, a pixel apart."""
    count, channels, size, _ = images.shape
    rows = -(-count // columns)
    sheet = torch.zeros(channels, rows * (size + 1) - 1, columns * (size + 1) - 1, dtype=torch.uint8)
    for index, image in enumerate(images.cpu()):
        top, left = (index // columns) * (size + 1), (index % columns) * (size + 1)
        sheet[:, top : top + size, left : left + size] = image
    pixels = sheet[0] if channels == 1 else sheet.permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())
