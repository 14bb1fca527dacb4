"""The reference implementation in plain torch: slow, any dtype and device, differentiable to any order.

A weight is an array (O, I, K), any strides, and each of its views (``fastsn.views``) is a matrix M with vectors u, v:

    power iteration, n times    u <- M v / |M v|,  v <- M^H u / |M^H u|  (a zero or non-finite result is
                                discarded; optionally v before u)
    sigma of a view             u^H M v   (with u, v held constant: d sigma / dM = u v^H)
    normalized weight           W̄ = scale * W / mean(sigma of its views)

Everything works on lists, one entry per weight; nothing here mutates its inputs or waits for the device. Sources:
Miyato et al., "Spectral Normalization for GANs", ICLR 2018, section 2.1 and appendix A (the iteration); Lin, Sekar,
Fanti, "Why Spectral Normalization Stabilizes GANs", NeurIPS 2021 (the second view and the scale).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Vectors: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]  # view -> (u, v)
Sigmas: TypeAlias = Mapping[str, Tensor]  # view -> sigma, a scalar tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of u, v: float32 for half-precision weights, otherwise the weight's own."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def matrix(oik: Tensor, view: str) -> Tensor:
    """A view of an (O, I, K) weight as a matrix, in the dtype of the sums: O x (I·K) or (O·K) x I."""
    o, i, k = oik.shape
    oik = oik.to(wide(oik.dtype))
    return oik.reshape(o, i * k) if view == "out" else oik.transpose(1, 2).reshape(o * k, i)


def unit(x: Tensor, old: Tensor) -> Tensor:
    """x / |x|, or ``old`` if x is zero or not finite, so that such a vector is never stored.

    torch divides by max(|x|, eps): below eps it stores a vector shorter than 1, which shrinks further with every step
    and never recovers. Here x is first divided by the power of two below its largest entry, so that the norm of a tiny
    or huge x neither underflows nor overflows and no floor is needed. A power of two costs no rounding: wherever torch
    gets the vector right, this has the same bits.
    """
    peak = x.detach().abs().amax()
    mantissa, _ = torch.frexp(peak)
    power = peak / (2 * mantissa)
    sound = power.isfinite() & (power > 0)
    unit = F.normalize(_divided(x, torch.where(sound, power, torch.ones_like(power))), dim=0)
    return torch.where(sound, unit, old)


def _divided(x: Tensor, by: Tensor) -> Tensor:
    """x / by. torch multiplies a complex x by 1 / by, which is infinite where by is subnormal."""
    return torch.complex(x.real / by, x.imag / by) if x.is_complex() else x / by


def power_iteration(
    weights: Sequence[Tensor],
    vectors: Sequence[Vectors],
    n_power_iterations: int = 1,
    gradient: str = "fixed",
    v_first: Sequence[bool] | None = None,
) -> list[Vectors]:
    """The vectors after ``n_power_iterations`` iterations on every view, as new tensors.

    Args:
        weights: (O, I, K) each.
        vectors: per weight, view -> (u, v); their keys say which views are iterated.
        v_first: per weight, whether a round is v <- M^H u / |M^H u|, then u <- M v / |M v|, as in
            ``torch.nn.utils.spectral_norm``; default: no.
        gradient: "fixed": u and v are constants (torch, Miyato); "through" lets autograd differentiate the iteration,
            as the BSN authors' own code does. Both agree once the iteration has converged.
    """
    if gradient not in ("fixed", "through"):
        raise ValueError(f"gradient must be 'fixed' or 'through', got {gradient!r}")
    orders = [False] * len(weights) if v_first is None else v_first
    with torch.set_grad_enabled(gradient == "through" and torch.is_grad_enabled()):
        return [
            {view: _iterate(matrix(w, view), u, v, n_power_iterations, order) for view, (u, v) in state.items()}
            for w, state, order in zip(weights, vectors, orders, strict=True)
        ]


def _iterate(m: Tensor, u: Tensor, v: Tensor, n: int, v_first: bool) -> tuple[Tensor, Tensor]:
    u, v = u.to(m.dtype), v.to(m.dtype)
    for _ in range(n):
        if v_first:
            v = unit(torch.mv(m.mH, u), v)
        u = unit(torch.mv(m, v), u)
        if not v_first:
            v = unit(torch.mv(m.mH, u), v)
    return u, v


def sigmas(weights: Sequence[Tensor], vectors: Sequence[Vectors]) -> list[Sigmas]:
    """u^H M v of every view, differentiable in the weight. After an iteration: the norm of the last product."""
    return [
        {view: _sigma(matrix(w, view), u, v) for view, (u, v) in state.items()}
        for w, state in zip(weights, vectors, strict=True)
    ]


def _sigma(m: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.vdot(u.to(m.dtype), torch.mv(m, v.to(m.dtype)))


def rescale(
    weights: Sequence[Tensor],
    sigmas: Sequence[Sigmas],
    scales: Sequence[float | Tensor],
    dtypes: Sequence[torch.dtype] | None = None,
) -> list[Tensor]:
    """scale * W / mean(sigma) of every weight, rounded once, to ``dtypes`` (default: each weight's own).

    The weights may have any shape; shape and strides are kept. Where sigma is exactly 0 the divisor is 1: a zero weight
    stays zero, with the finite gradient scale * G, instead of becoming NaN.
    """
    dtypes = [w.dtype for w in weights] if dtypes is None else dtypes
    return [
        _rescale(w, mean_sigma(s), c).to(dtype) for w, s, c, dtype in zip(weights, sigmas, scales, dtypes, strict=True)
    ]


def mean_sigma(sigmas: Sigmas) -> Tensor:
    """The divisor of a weight: the mean of its views' sigmas."""
    first, *rest = sigmas.values()
    return torch.stack([first, *rest]).mean() if rest else first


def _rescale(w: Tensor, sigma: Tensor, scale: float | Tensor) -> Tensor:
    unit = w.to(sigma.dtype) / torch.where(sigma == 0, torch.ones_like(sigma), sigma)
    if isinstance(scale, Tensor):
        return unit * scale.to(sigma.dtype).reshape(())
    return unit if scale == 1 else unit * scale
