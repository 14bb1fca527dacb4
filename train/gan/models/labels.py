"""What conditional networks ask of labels."""

from __future__ import annotations

import torch
from torch import Tensor


def required(labels: Tensor | None, count: int, classes: int, look: bool) -> Tensor:
    """labels, int64 (count,) from 0 to classes - 1. Their values are only looked at with ``look``, because that waits
    for the device.

    Raises:
        ValueError: they are something else.
    """
    expected = f"labels must be {count} integers from 0 to {classes - 1} for a conditional network"
    if labels is None:
        raise ValueError(f"{expected}, got None")
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise ValueError(f"{expected}, got {labels.dtype} of shape {tuple(labels.shape)}")
    if look and count and not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
        low, high = (int(x) for x in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"{expected}, got {low} to {high}")
    return labels
