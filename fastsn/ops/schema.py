"""The list ops: schemas, fakes, the reference for every device, and the rules of differentiation.

Each takes all weights of a call, so that a network costs as many calls as a layer::

    power_iteration(weights, u, v, dims, view_masks, v_first, n) -> (sigma, vectors)
        n rounds of u <- M v / |M v|, v <- M^T u / |M^T u| on every view of every weight, or, for a weight with
        ``v_first``, of v, then u. vectors: copies of (u, v) as they are afterwards, end to end; sigma: u^T M v of each
        view. n = 0 measures.
    power_iteration_: the same, and writes u and v back in place.
    rescale(weights, scales, sigma, vectors, dims, view_masks, scale_index, scale_factor, dtypes) -> ([W̄], mean sigma)
        W̄ = c W / mean(sigma of its views), in the given dtypes. Both results are differentiable in weights and scales,
        to any order, with u and v held constant.
    rescale_backward(gradients, grad_sigma, bases, scales, mean sigma, vectors, ...) -> ([dW], [dscale])
        dW = (c / sigma) G + (grad_sigma - <G, W̄> / sigma) mean of u v^T,  dc = <G, W> / sigma. bases: W̄, which allows
        the weight to change before the gradient is asked for; W where the scale is a tensor, which may be 0.

Numbers, one per weight: ``dims`` the dimension of output channels; ``view_masks`` 1 (out), 2 (in) or 3 (both);
``v_first`` 0, or 1 for the order of torch.nn.utils.spectral_norm; c is ``scale_factor[i]``, times
``scales[scale_index[i]]`` unless that index is -1; ``dtypes`` (the codes below), in the backward those of the weights.
``u`` and ``v`` have one entry per weight and view. All weights of a call are on one device and have sums of one dtype.

The schemas live here, so that the package imports without having been built. C++ (csrc/register.cpp) adds the kernels
for CPU tensors, and a rule of differentiation that costs a tenth of the one in Python (autograd.py), which it follows.
cuda.py adds the Triton kernels for tensors of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsn import reference

VIEW_BITS = {"out": 1, "in": 2}
DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}

LIBRARY = torch.library.Library("fastsn", "FRAGMENT")  # type: ignore[no-untyped-call]
_NUMBERS = "int[] dims, int[] view_masks, int[] scale_index, float[] scale_factor, int[] dtypes"
for _schema in (
    "power_iteration(Tensor[] weights, Tensor[] u, Tensor[] v, int[] dims, int[] view_masks, int[] v_first, int n)"
    " -> (Tensor, Tensor)",
    "power_iteration_(Tensor[] weights, Tensor(a!)[] u, Tensor(b!)[] v, int[] dims, int[] view_masks, int[] v_first, "
    "int n) -> (Tensor, Tensor)",
    f"rescale(Tensor[] weights, Tensor[] scales, Tensor sigma, Tensor vectors, {_NUMBERS}) -> (Tensor[], Tensor)",
    "rescale_backward(Tensor[] gradients, Tensor? grad_sigma, Tensor[] bases, Tensor[] scales, Tensor sigma, "
    f"Tensor vectors, {_NUMBERS}) -> (Tensor[], Tensor[])",
):
    # torch.compile(mode="reduce-overhead") must not record them: the first launch for a list of addresses keeps its
    # table on the device, which during the warm-up of that mode would lie in the memory of its graphs, where torch
    # refuses what outlives a call. Allocating elsewhere is no way out: torch picks the pool by stream or by thread,
    # depending on its version. A torch.cuda.graph around a step that has run once records them as they are.
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))  # type: ignore[no-untyped-call]

power_iteration = torch.ops.fastsn.power_iteration.default
power_iteration_ = torch.ops.fastsn.power_iteration_.default
rescale = torch.ops.fastsn.rescale.default
rescale_backward = torch.ops.fastsn.rescale_backward.default


# What the ops give, without computing it.


@torch.library.register_fake("fastsn::power_iteration", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("fastsn::power_iteration_", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_power_iteration(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], *_: Any
) -> tuple[Tensor, Tensor]:
    dtype = reference.wide(weights[0].dtype)
    entries = sum(x.numel() for x in (*u, *v))
    return weights[0].new_empty(len(u), dtype=dtype), weights[0].new_empty(entries, dtype=dtype)


@torch.library.register_fake("fastsn::rescale", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_rescale(
    weights: Sequence[Tensor], scales: Sequence[Tensor], sigma: Tensor, *rest: Any
) -> tuple[list[Tensor], Tensor]:
    _check_meta(weights, scales)
    outputs = [torch.empty_like(w, dtype=DTYPES[code]) for w, code in zip(weights, rest[-1], strict=True)]
    return outputs, sigma.new_empty(len(weights))


@torch.library.register_fake("fastsn::rescale_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_rescale_backward(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    bases, scales, dtypes = arguments[2], arguments[3], arguments[-1]
    _check_meta(bases, scales)
    d_weights = [torch.empty_like(w, dtype=DTYPES[code]) for w, code in zip(bases, dtypes, strict=True)]
    return d_weights, [torch.empty_like(scale) for scale in scales]


def _check_meta(weights: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """One tensor on the meta device makes torch call the fake, whose results nobody has written to."""
    for i, scale in enumerate(scales):
        if scale.is_meta != weights[0].is_meta:
            device = weights[0].device
            raise ValueError(f"scales[{i}] must be on the device of weights[0], {device}, got {scale.device}")
