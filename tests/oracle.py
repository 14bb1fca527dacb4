"""What a normalized weight has to be, in numpy and float64, for the fuzz: from the papers, nothing of fastsn in it.

Every number comes with a bound of the error that a sound computation in the dtype of the sums may make: each sum of n
products is off by (4 + sqrt(n)) units of rounding times the sum of their magnitudes (the bound of Higham and Mary,
2019, that holds with high probability for any order of summation; n for complex numbers) and n times the smallest
number there is; a vector that is off is off by |M| / |M x| as much after the next product. Infinite: nothing is
claimed, since the result hangs on the rounding (a product that cancels, or leaves the range of the dtype).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Range:
    """What a dtype can hold."""

    eps: float
    tiny: float  # the smallest normal number
    small: float  # the smallest there is
    big: float
    in_order: bool = False  # torch sums complex products one after the other: equal ones all err to the same side

    @classmethod
    def of(cls, dtype: torch.dtype) -> Range:
        info = torch.finfo(dtype)
        return cls(info.eps, info.tiny, info.tiny * info.eps, info.max, dtype.is_complex)

    def sum_of(self, n: int) -> float:
        """The error of a sum of n numbers, in parts of the sum of their magnitudes."""
        return (4 + (n if self.in_order else n**0.5)) * self.eps


def exact(x: Tensor) -> Array:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64).numpy()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the sums, and of u and v."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def matrices(weight: Array, dim: int, variant: str) -> dict[str, Array]:
    """The reshapes that a variant measures. With one kernel position both have the same norm: one is left."""
    moved = np.moveaxis(weight, dim, 0)
    oik = moved.reshape(moved.shape[0], moved.shape[1], -1)
    found = {"out": oik.reshape(len(oik), -1)}
    if variant in ("bsn", "bssn") and oik.shape[2] > 1:
        found["in"] = oik.transpose(0, 2, 1).reshape(-1, oik.shape[1])
    return found


def laid_back(matrix: Array, view: str, shape: tuple[int, ...], dim: int) -> Array:
    """A matrix of the view as an array of the weight's shape."""
    dim %= len(shape)
    moved = (shape[dim], *shape[:dim], *shape[dim + 1 :])
    if view == "in":
        matrix = matrix.reshape(moved[0], -1, moved[1]).transpose(0, 2, 1)
    return np.moveaxis(matrix.reshape(moved), 0, dim)


def _size(m: Array) -> float:
    """The spectral norm, or a little more."""
    x = np.random.default_rng(0).standard_normal(m.shape[1]) + np.zeros(1, m.dtype)
    for _ in range(10):
        length = float(np.linalg.norm(x))
        x = m.conj().T @ (m @ (x / length)) if length else x
    return 1.2 * float(np.linalg.norm(x)) ** 0.5


def _product(m: Array, size: float, x: Array, off: float, r: Range) -> tuple[Array, float]:
    rows, columns = m.shape
    rounding = r.sum_of(columns) * float(np.linalg.norm(np.abs(m) @ np.abs(x))) + rows**0.5 * columns * r.small
    return m @ x, size * off + rounding


def _unit(y: Array, off: float, old: Array, old_off: float, r: Range) -> tuple[Array, float]:
    peak = float(np.abs(y).max())
    if not np.isfinite(peak) or (peak == 0 and off == 0):
        return old, old_off
    if peak == 0:
        return old, np.inf
    length = float(np.linalg.norm(y))
    new = 2 * off / length + r.sum_of(len(y))
    return y / length, new if new < 0.1 and 4 * peak < r.big else np.inf


def iterate(m: Array, u: Array, v: Array, n: int, r: Range, v_first: bool = False) -> tuple[Array, Array, float, float]:
    """u and v after n rounds, and how far from them a result may lie (in the Euclidean norm)."""
    if v_first:  # the iteration of the adjoint matrix, with u and v exchanged
        v, u, off_v, off_u = iterate(m.conj().T, v, u, n, r)
        return u, v, off_u, off_v
    off_u = off_v = 0.0
    if not np.isfinite(m).all():  # no product with it is finite: nothing is taken
        return u, v, off_u, off_v
    size = _size(m)
    for _ in range(n):
        x, off = _product(m, size, v, off_v, r)
        if not np.any(m) or not np.any(v):
            off = 0.0  # zeros add up to zero
        u, off_u = _unit(x, off, u, off_u, r)
        x, off = _product(m.conj().T, size, u, off_u, r)
        if not np.any(m) or not np.any(u):
            off = 0.0
        v, off_v = _unit(x, off, v, off_v, r)
    return u, v, off_u, off_v


@dataclass(frozen=True)
class Bounded:
    """An array, and how far from each entry a result may lie."""

    value: Array
    off: Array


@dataclass(frozen=True)
class Normalized:
    """W̄, the gradients by the weight and by the scale for a gradient G of W̄, and sigma with its relative error."""

    weight: Bounded
    d_weight: Bounded
    d_scale: Bounded
    sigma: complex
    relative: float


def normalize(
    weight: Array,
    dim: int,
    vectors: Mapping[str, tuple[Array, Array]],
    scale: float,
    gradient: Array,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
) -> Normalized:
    """c W / mean sigma for these vectors, which are held constant; ``dtypes``: those of the weight, W̄ and scale."""
    r, (of_weight, into, of_scale) = Range.of(wide(dtypes[0])), map(Range.of, dtypes)
    sigma, off, along = 0.0, 0.0, np.zeros_like(weight)
    variant = "bsn" if "in" in vectors else "sn"
    for view, m in matrices(weight, dim, variant).items():
        u, v = vectors[view]
        sigma = sigma + u.conj() @ m @ v / len(vectors)
        magnitude = float(np.linalg.norm(np.abs(m).T @ np.abs(u))) * max(1.0, float(np.linalg.norm(v)))
        off += (r.sum_of(m.size) * magnitude + m.size * r.small * bool(magnitude)) / len(vectors)
        along = along + laid_back(np.outer(u, v.conj()), view, weight.shape, dim) / len(vectors)
    zero = sigma == 0 and off == 0
    relative = 0.0 if zero else float(off / abs(sigma)) + 4 * r.eps if sigma else np.inf
    divisor = sigma if sigma else 1.0
    value = scale * weight / divisor
    w_bar = Bounded(value, np.abs(value) * (2 * relative + into.eps) + 2 * into.small)
    if r.in_order:  # torch divides complex numbers by way of products, in which last bits of subnormal ones are lost
        w_bar = Bounded(value, w_bar.off + 4 * r.small * abs(scale / divisor))

    inner = 0.0 if zero else np.sum(gradient * np.conj(value / divisor))
    magnitude = 0.0 if zero else float(np.sum(np.abs(gradient) * np.abs(value / divisor)))
    inner_off = magnitude * (r.sum_of(weight.size) + into.eps + 4 * relative)
    inner_off += into.small * float(np.sum(np.abs(gradient))) / abs(divisor)
    first = np.conj(scale / divisor) * gradient
    d_weight = first - inner * along
    d_off = np.abs(first) * (2 * relative + 8 * r.eps) + np.abs(along) * (inner_off + 8 * r.eps * abs(inner))
    d_off = d_off + np.abs(d_weight) * of_weight.eps + 2 * of_weight.small

    terms = gradient * np.conj(weight / divisor)
    d_scale = np.array(np.sum(terms).real)
    scale_off = float(np.sum(np.abs(terms))) * (r.sum_of(weight.size) + 2 * relative)
    scale_off += abs(float(d_scale)) * of_scale.eps + of_scale.small
    return Normalized(w_bar, Bounded(d_weight, d_off), Bounded(d_scale, np.array(scale_off)), sigma, relative)
