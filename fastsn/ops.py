"""The list ops: schemas, fakes, the reference for every device, and the rules of differentiation.

Each takes all weights of a call (design: section 4), so that a network costs as many calls as a layer::

    power_iteration(weights, u, v, dims, views, n) -> (sigma, vectors)
        n rounds on every view of every weight from (u, v). vectors: copies of (u, v) as they are afterwards, end to
        end; sigma: u^T M v of each view. n = 0 measures.
    power_iteration_: the same, and writes u and v back in place.
    rescale(weights, scales, sigma, vectors, dims, views, which, factors, dtypes) -> ([W̄], mean sigma)
        W̄ = c W / mean(sigma of its views), in the given dtypes. Both results are differentiable in weights and scales,
        to any order, with u and v held constant.
    rescale_backward(gradients, grad_sigma, bases, scales, mean sigma, vectors, ...) -> ([dW], [dscale])
        dW = (c / sigma) G + (grad_sigma - <G, W̄> / sigma) mean of u v^T,  dc = <G, W> / sigma. bases: W̄, which allows
        the weight to change before the gradient is asked for; W where the scale is a tensor, which may be 0.

Numbers, one per weight: ``dims`` the dimension of output channels; ``views`` 1 (out), 2 (in) or 3 (both); c is
``factors[i]``, times ``scales[which[i]]`` unless that is -1; ``dtypes`` (the codes below), in the backward those of the
weights. ``u`` and ``v`` have one entry per weight and view. All weights of a call are on one device and have sums of
one dtype.

The schemas live here, so that the package imports without having been built. C++ (csrc/register.cpp) adds the kernels
for CPU tensors, and a rule of differentiation that costs a tenth of one in Python; it follows the one here. gpu.py adds
the Triton kernels for tensors of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsn import checks, reference, views
from fastsn.reference import Vectors

VIEW_BITS = {"out": 1, "in": 2}
DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}

LIBRARY = torch.library.Library("fastsn", "FRAGMENT")  # type: ignore[no-untyped-call]
_NUMBERS = "int[] dims, int[] views, int[] which, float[] factors, int[] dtypes"
for _schema in (
    "power_iteration(Tensor[] weights, Tensor[] u, Tensor[] v, int[] dims, int[] views, int n) -> (Tensor, Tensor)",
    "power_iteration_(Tensor[] weights, Tensor(a!)[] u, Tensor(b!)[] v, int[] dims, int[] views, int n)"
    " -> (Tensor, Tensor)",
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
    outputs = [torch.empty_like(w, dtype=_DTYPES[code]) for w, code in zip(weights, rest[-1], strict=True)]
    return outputs, sigma.new_empty(len(weights))


@torch.library.register_fake("fastsn::rescale_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_rescale_backward(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    bases, scales, dtypes = arguments[2], arguments[3], arguments[-1]
    _check_meta(bases, scales)
    d_weights = [torch.empty_like(w, dtype=_DTYPES[code]) for w, code in zip(bases, dtypes, strict=True)]
    return d_weights, [torch.empty_like(scale) for scale in scales]


def _check_meta(weights: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """One tensor on the meta device makes torch call the fake, whose results nobody has written to."""
    for i, scale in enumerate(scales):
        if scale.is_meta != weights[0].is_meta:
            device = weights[0].device
            raise ValueError(f"scales[{i}] must be on the device of weights[0], {device}, got {scale.device}")


# The reference, for devices without kernels.


def check_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    view_bits: Sequence[int],
    n: int,
) -> list[tuple[int, str]]:
    """(position of the weight, view) of every pair of vectors; raises if an argument is not as it must be."""
    checks.weights(weights, dims, view_bits)
    pairs = [(i, view) for i, bits in enumerate(view_bits) for view, bit in VIEW_BITS.items() if bits & bit]
    checks.vectors(weights, dims, pairs, u, v)
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    return pairs


def reference_power_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    view_bits: Sequence[int],
    n: int,
) -> tuple[Tensor, Tensor]:
    """``power_iteration`` of any device."""
    pairs = check_iteration(weights, u, v, dims, view_bits, n)
    oiks = [views.as_oik(w, dim) for w, dim in zip(weights, dims, strict=True)]
    state: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in weights]
    for (i, view), left, right in zip(pairs, u, v, strict=True):
        state[i][view] = (left, right)
    vectors: Sequence[Vectors] = reference.power_iteration(oiks, state, n) if n else state
    sigmas = [sigma for found in reference.sigmas(oiks, vectors) for sigma in found.values()]
    return torch.stack(sigmas), torch.cat([x for found in vectors for pair in found.values() for x in pair])


def reference_power_iteration_(weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], *rest: Any) -> Any:
    """``power_iteration_`` of any device."""
    sigmas, vectors = reference_power_iteration(weights, u, v, *rest)
    buffers = [x for pair in zip(u, v, strict=True) for x in pair]
    for buffer, vector in zip(buffers, torch.split(vectors, [x.numel() for x in buffers]), strict=True):
        buffer.copy_(vector)
    return sigmas, vectors


def reference_rescale(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    sigma: Tensor,
    vectors: Tensor,
    dims: Sequence[int],
    view_bits: Sequence[int],
    which: Sequence[int],
    factors: Sequence[float],
    dtypes: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """``rescale`` of any device."""
    check_rescale(weights, scales, sigma, vectors, dims, view_bits, which, factors, dtypes)
    groups = torch.split(sigma, [bits.bit_count() for bits in view_bits])
    means = torch.stack([group.mean() for group in groups])
    tensors = [_scale(i, scales, which, factors, sigma.dtype) for i in range(len(weights))]
    outputs = reference.rescale(
        weights, [{"mean": mean} for mean in means], tensors, [_DTYPES[code] for code in dtypes]
    )
    return [_own(w, x) for w, x in zip(weights, outputs, strict=True)], means


def check_rescale(*arguments: Any) -> None:
    """Raises if an argument of ``rescale`` is not as it must be."""
    weights, scales, sigma, vectors, dims, view_bits, which, factors, dtypes = arguments
    checks.weights(weights, dims, view_bits)
    checks.numbers(len(weights), scales, which, factors, dtypes, list(_DTYPES))
    _check_state(weights, sigma, vectors, dims, view_bits, sum(bits.bit_count() for bits in view_bits))


def _check_state(
    weights: Sequence[Tensor],
    sigma: Tensor,
    vectors: Tensor,
    dims: Sequence[int],
    view_bits: Sequence[int],
    sigmas: int,
) -> None:
    checks.flat(sigma, sigmas, reference.wide(sigma.dtype), "sigma")
    entries = sum(_vector_size(*weight) for weight in zip(weights, dims, view_bits, strict=True))
    checks.flat(vectors, entries, sigma.dtype, "vectors")


def _scale(
    i: int, scales: Sequence[Tensor], which: Sequence[int], factors: Sequence[float], dtype: torch.dtype
) -> float | Tensor:
    return factors[i] if which[i] < 0 else scales[which[i]].to(dtype).reshape(()) * factors[i]


def _own(like: Tensor, x: Tensor) -> Tensor:
    """An op may not return one of its inputs, and returns the strides that its fake promises."""
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def _differentiable_backward(
    gradients: Sequence[Tensor],
    grad_sigma: Tensor | None,
    bases: Sequence[Tensor],
    scales: Sequence[Tensor],
    sigma: Tensor,
    vectors: Tensor,
    dims: Sequence[int],
    view_bits: Sequence[int],
    which: Sequence[int],
    factors: Sequence[float],
    dtypes: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """``rescale_backward`` in differentiable torch: the kernel of devices that have none, and the second order."""
    d_weights, d_scales = [], [torch.zeros_like(scale) for scale in scales]
    for i, outer in enumerate(_outer_products(bases, vectors, dims, view_bits)):
        g, base = gradients[i].to(sigma.dtype), bases[i].to(sigma.dtype)
        zero = sigma[i] == 0
        divisor = torch.where(zero, torch.ones_like(sigma[i]), sigma[i])
        scale = _scale(i, scales, which, factors, sigma.dtype)
        inner = (g * base).sum()
        if which[i] >= 0:
            d_scales[which[i]] = d_scales[which[i]] + (inner / divisor * factors[i]).to(scales[which[i]].dtype)
            inner = inner * scale / divisor
        along = -torch.where(zero, torch.zeros_like(inner), inner / divisor)
        if grad_sigma is not None:
            along = along + grad_sigma[i]
        d_weights.append((scale / divisor * g + along * outer).to(_DTYPES[dtypes[i]]))
    return d_weights, d_scales


def _outer_products(
    weights: Sequence[Tensor], vectors: Tensor, dims: Sequence[int], view_bits: Sequence[int]
) -> list[Tensor]:
    """The mean of u v^T over the views of each weight, laid back onto the weight."""
    products, start = [], 0
    for w, dim, bits in zip(weights, dims, view_bits, strict=True):
        moved = w.movedim(dim, 0)
        o, i, k = moved.shape[0], moved.shape[1], moved[0, 0].numel()
        total = vectors.new_zeros((o, i, k))
        for view in (view for view, bit in VIEW_BITS.items() if bits & bit):
            sizes = [o, i * k] if view == "out" else [o * k, i]
            u, v = torch.split(vectors[start : start + sum(sizes)], sizes)
            outer = torch.outer(u, v)
            total = total + (outer.view(o, i, k) if view == "out" else outer.view(o, k, i).transpose(1, 2))
            start += sum(sizes)
        products.append((total / bits.bit_count()).view(moved.shape).movedim(0, dim))
    return products


def check_backward(*arguments: Any) -> None:
    """Raises if an argument of ``rescale_backward`` is not as it must be."""
    gradients, grad_sigma, bases, scales, sigma, vectors, dims, view_bits, which, factors, dtypes = arguments
    checks.weights(bases, dims, view_bits)
    checks.gradients(gradients, bases)
    checks.numbers(len(bases), scales, which, factors, dtypes, list(_DTYPES))
    _check_state(bases, sigma, vectors, dims, view_bits, len(bases))
    if grad_sigma is not None:
        checks.flat(grad_sigma, len(bases), sigma.dtype, "grad_sigma")


def reference_rescale_backward(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    """``rescale_backward`` of any device."""
    check_backward(*arguments)
    d_weights, d_scales = _differentiable_backward(*arguments)
    return [_own(base, dw) for base, dw in zip(arguments[2], d_weights, strict=True)], d_scales


for _name, _kernel in (
    ("power_iteration", reference_power_iteration),
    ("power_iteration_", reference_power_iteration_),
    ("rescale", reference_rescale),
    ("rescale_backward", reference_rescale_backward),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


# The rules of differentiation, for devices whose kernels do not bring their own. What an iteration gives is constant.

for _name in ("power_iteration", "power_iteration_"):
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    weights, scales, _, vectors, dims, view_bits, which, factors, _ = inputs
    bases = [w if place >= 0 else out for w, out, place in zip(weights, output[0], which, strict=True)]
    ctx.save_for_backward(*bases, *scales, output[1], vectors)
    ctx.numbers = [dims, view_bits, which, factors, [DTYPE_CODES[w.dtype] for w in weights]]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: list[Tensor | None], grad_sigma: Tensor | None) -> tuple[Any, ...]:
    *saved, sigma, vectors = ctx.saved_tensors
    count = len(gradients)
    bases, scales = saved[:count], saved[count:]
    # A weight that was not used gets no gradient, rather than one of zeros.
    used = [i for i in range(count) if gradients[i] is not None or grad_sigma is not None]
    d_weights: list[Tensor | None] = [None] * count
    d_scales: list[Tensor | None] = [None] * len(scales)
    if used:
        given = [gradients[i] if gradients[i] is not None else torch.zeros_like(bases[i]) for i in used]
        if len(used) < count:  # nothing here may make a GPU wait, as an index that comes from a list does
            sizes = [_vector_size(b, *n) for b, *n in zip(bases, *ctx.numbers[:2], strict=True)]
            parts = torch.split(vectors, sizes)
            vectors = torch.cat([parts[i] for i in used])
            sigma = torch.cat([sigma[i : i + 1] for i in used])
            grad_sigma = None if grad_sigma is None else torch.cat([grad_sigma[i : i + 1] for i in used])
        found, d_scales = rescale_backward(
            given,
            grad_sigma,
            [bases[i] for i in used],
            scales,
            sigma,
            vectors,
            *([numbers[i] for i in used] for numbers in ctx.numbers),
        )
        for i, dw in zip(used, found, strict=True):
            d_weights[i] = dw
    return d_weights, d_scales, None, None, None, None, None, None, None


def _vector_size(weight: Tensor, dim: int, bits: int) -> int:
    o, i, n = weight.shape[dim], weight.shape[1 if dim == 0 else 0], weight.numel()
    return (o + n // o) * (bits & 1) + (n // i + i) * (bits >> 1)


torch.library.register_autograd("fastsn::rescale", _backward, setup_context=_save, lib=LIBRARY)


def _rescale_backward_autograd(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    if torch.is_grad_enabled():
        check_backward(*arguments)
        return _differentiable_backward(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return rescale_backward(*arguments)  # type: ignore[no-any-return]


LIBRARY.impl("rescale_backward", _rescale_backward_autograd, "Autograd")  # type: ignore[no-untyped-call]
for _key in ("Batched", "FuncTorchBatched"):  # is_grads_batched=True, and vmap over a backward
    LIBRARY.impl("rescale_backward", _differentiable_backward, _key)  # type: ignore[no-untyped-call]


@torch.library.register_vmap("fastsn::rescale", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _rescale_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """Sample by sample: a batch of networks is a longer list."""

    def sample(x: Tensor, dim: int | None, i: int) -> Tensor:
        return x if dim is None else x.select(dim, i)

    results = []
    for i in range(info.batch_size):
        tensors = [[sample(x, d, i) for x, d in zip(arguments[j], in_dims[j], strict=True)] for j in (0, 1)]
        flat = [sample(arguments[j], in_dims[j], i) for j in (2, 3)]
        results.append(rescale(*tensors, *flat, *arguments[4:]))
    outputs = [torch.stack(same) for same in zip(*(outputs for outputs, _ in results), strict=True)]
    return (outputs, torch.stack([mean for _, mean in results])), ([0] * len(outputs), 0)
