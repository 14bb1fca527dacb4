"""What conditional networks ask of labels."""

from __future__ import annotations

import torch
from torch import Tensor


def required(labels: Tensor | None, beside: Tensor, classes: int, look: bool) -> Tensor:
    """labels, int64 (N,) from 0 to classes - 1, one for each of the N rows beside them. At their values it only looks
    with ``look``, because that waits for the device.

    Raises:
        ValueError: they are something else.
    """
    if labels is not None and torch.jit.is_tracing():
        return labels
    found = "None" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
    if labels is not None and labels.dtype == torch.int64 and labels.shape == beside.shape[:1]:
        if not look or labels.numel() == 0 or torch.compiler.is_compiling():
            return labels
        low, high = (int(x) for x in labels.aminmax())
        if 0 <= low <= high < classes:
            return labels
        found = f"{low} to {high}"
    count = len(beside)
    raise ValueError(f"labels must be {count} integers (int64) from 0 to {classes - 1} in this network, got {found}")
