"""A weight of any layer as an array (O, I, K): output channels, input channels per group, kernel positions.

A view without a copy wherever strides allow it, also of channels_last and sliced weights. Two matrices share the array:

===== ========== ================ ==================================================
view  shape      state (u, v)     its norm is that of
===== ========== ================ ==================================================
out   O x (I·K)  (O,), (I·K,)     the kernel reshaped to cout x (cin·k·k)
in    (O·K) x I  (O·K,), (I,)     the kernel reshaped to cin x (cout·k·k), transposed
===== ========== ================ ==================================================

Grouped convolutions follow torch: the tensor's own shape counts, so I is cin / groups (and O is cout / groups for a
ConvTranspose), and the norm is that of this tensor, which bounds the norm of every group.
"""

from __future__ import annotations

from torch import Tensor, nn

VIEWS = ("out", "in")

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def output_dim(module: nn.Module) -> int:
    """The dimension of ``module.weight`` that counts output channels: 1 for ConvTranspose1-3d, else 0."""
    return 1 if isinstance(module, _TRANSPOSED) else 0


def as_oik(weight: Tensor, dim: int) -> Tensor:
    """``weight`` (at least 2-D) as (O, I, K): ``dim`` first, then the first of the others, then the rest flattened.

    A view of the same memory unless the trailing dimensions cannot be flattened by strides (then one copy).
    """
    weight = weight.movedim(dim, 0)
    return weight.unsqueeze(-1) if weight.ndim == 2 else weight.flatten(2)


def distinct(views: tuple[str, ...], oik: Tensor) -> tuple[str, ...]:
    """The views that differ on this weight: with one kernel position (Linear, Embedding, 1x1) `in` is `out` transposed,
    has the same norm, and is left out."""
    return views if oik.shape[2] > 1 else views[:1]


def vector_sizes(oik: Tensor, view: str) -> tuple[int, int]:
    """The lengths of u and v of a view."""
    o, i, k = oik.shape
    return (o, i * k) if view == "out" else (o * k, i)
