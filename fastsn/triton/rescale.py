"""W̄ = scale · W / sigma and its gradient, for all weights of a call.

Forward: one launch. Backward: one for <G, W̄>, whose last program of a weight settles the coefficients, and one for
dW = (scale / sigma) · G + (g - <G, W̄> / sigma) · mean of the views' u v^T.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsn.triton.shared import exponent_of, last_to_arrive, power_of_two, tile

# Columns of the tables, one row of int64 per weight.
WEIGHT = tl.constexpr(0)  # W; backward: W̄, or W where the scale is a tensor
STRIDE = tl.constexpr(1)
ROWS = tl.constexpr(2)
B = tl.constexpr(3)
K = tl.constexpr(4)
RESULT = tl.constexpr(5)  # address of W̄ or dW
SIGMA = tl.constexpr(6)  # offset of the weight's first sigma, and how many there are
VIEWS = tl.constexpr(7)
FACTOR = tl.constexpr(8)  # the bits of a float32
SCALE = tl.constexpr(9)  # address of a float32, or 0
SCALE_INDEX = tl.constexpr(10)  # its number, or -1
FLAT = tl.constexpr(11)  # four offsets into the flat vectors: p, x, q, z; -1 where there is no such view
GRADIENT = tl.constexpr(15)  # address of G, distance of its rows
GRADIENT_STRIDE = tl.constexpr(16)
CHUNKS = tl.constexpr(17)  # of the inner product, and which of all is the first
FIRST_CHUNK = tl.constexpr(18)
COLUMNS = tl.constexpr(19)


@triton.jit
def _elements(row, start, n, CHUNK_STEP: tl.constexpr, STRIDED: tl.constexpr, column: tl.constexpr):
    """Offsets of elements start.. of a weight whose rows lie ``row[column]`` apart."""
    e = start + tl.arange(0, CHUNK_STEP)
    if STRIDED:
        line = e // n
        return line * tl.load(row + column) + (e - line * n)
    else:
        return e


@triton.jit
def _scale_of(row):
    """The constant c of the weight, as a float32."""
    factor = tl.load(row + FACTOR).to(tl.int32).to(tl.float32, bitcast=True)
    address = tl.load(row + SCALE)
    scale = factor
    if address != 0:
        scale = factor * tl.load(address.to(tl.pointer_type(tl.float32)))
    return scale


@triton.jit
def _rescaled(
    row,
    start,
    end,
    inverse,
    power,
    scale,
    KINDS: tl.constexpr,
    NUMBER: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    STRIDED: tl.constexpr = KINDS[NUMBER][0]
    VEC: tl.constexpr = KINDS[NUMBER][1]
    DTYPE: tl.constexpr = KINDS[NUMBER][2]
    OUT: tl.constexpr = KINDS[NUMBER][3]
    n = tl.load(row + B) * tl.load(row + K)
    weight = tl.load(row + WEIGHT).to(tl.pointer_type(DTYPE))
    if VEC > 1:
        weight = tl.multiple_of(weight, 16)
        end = (end // VEC) * VEC
    out = tl.multiple_of(tl.load(row + RESULT).to(tl.pointer_type(OUT)), 16)
    for step in tl.static_range(CHUNK // STEP):
        e = start + step * STEP + tl.arange(0, STEP)
        at = _elements(row, start + step * STEP, n, STEP, STRIDED, STRIDE)
        w = tl.load(weight + at, mask=e < end, other=0.0).to(tl.float32)
        tl.store(out + e, (w * power * inverse * scale).to(out.dtype.element_ty), mask=e < end)


@triton.jit
def rescale(table, work, sigma, mean, KINDS: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """W̄ = W / sigma · scale, in two roundings, so that BSSN is exactly scale times BSN. work: (weight, chunk, kind)."""
    item = work + 3 * tl.program_id(0)
    layer = tl.load(item)
    chunk = tl.load(item + 1)
    kind = tl.load(item + 2)
    row = table + layer * COLUMNS
    first = sigma + tl.load(row + SIGMA)
    value = tl.load(first)
    if tl.load(row + VIEWS) == 2:
        value = (value + tl.load(first + 1)) * 0.5
    if chunk == 0:
        tl.store(mean + layer, value)
    # 1 / sigma in two factors: a power of two that may be large, and what is near 1.
    divisor = tl.where(value == 0.0, 1.0, value)
    power = power_of_two(-exponent_of(tl.abs(divisor)))
    inverse = 1.0 / (divisor * power)
    numel = tl.load(row + ROWS) * tl.load(row + B) * tl.load(row + K)
    start = chunk.to(tl.int64) * CHUNK
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _rescaled(row, start, numel, inverse, power, _scale_of(row), KINDS, i, CHUNK, STEP)


@triton.jit
def _inner(row, start, end, KINDS: tl.constexpr, NUMBER: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):
    STRIDED: tl.constexpr = KINDS[NUMBER][0]
    VEC: tl.constexpr = KINDS[NUMBER][1]
    DTYPE: tl.constexpr = KINDS[NUMBER][2]
    GRADIENT_DTYPE: tl.constexpr = KINDS[NUMBER][3]
    n = tl.load(row + B) * tl.load(row + K)
    base = tl.load(row + WEIGHT).to(tl.pointer_type(DTYPE))
    gradient = tl.load(row + GRADIENT).to(tl.pointer_type(GRADIENT_DTYPE))
    if VEC > 1:
        base = tl.multiple_of(base, 16)
        gradient = tl.multiple_of(gradient, 16)
        end = (end // VEC) * VEC
    total = tl.zeros((STEP,), tl.float32)
    # One element per load: unrolled, the loads of all steps are in flight at once and take up to 166 registers.
    UNROLL: tl.constexpr = CHUNK // STEP if VEC > 1 else 1
    for step in tl.range(CHUNK // STEP, loop_unroll_factor=UNROLL):
        e = start + step * STEP + tl.arange(0, STEP)
        at = _elements(row, start + step * STEP, n, STEP, STRIDED, STRIDE)
        left = tl.load(base + at, mask=e < end, other=0.0).to(tl.float32)
        at = _elements(row, start + step * STEP, n, STEP, STRIDED, GRADIENT_STRIDE)
        total += left * tl.load(gradient + at, mask=e < end, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _settle(row, layer, sigma, grad_sigma, has_grad_sigma, dots, coefficients, BC: tl.constexpr):
    """The coefficients of dW: of G, and of the mean of the views' u v^T per view; and the derivative by the scale."""
    count = tl.load(row + CHUNKS).to(tl.int32)
    first = dots + tl.load(row + FIRST_CHUNK)
    total = tl.zeros((BC,), tl.float64)
    for begin in range(0, count, BC):  # in the order of the chunks
        at = begin + tl.arange(0, BC)
        total += tl.load(first + at, mask=at < count, other=0.0).to(tl.float64)
    dot = tl.sum(total, axis=0)
    value = tl.load(sigma + layer).to(tl.float64)
    divisor = tl.where(value == 0.0, 1.0, value)
    factor = _scale_of(row).to(tl.float64) / divisor
    inner = dot
    if tl.load(row + SCALE_INDEX) >= 0:  # the base is W, not W̄
        inner = dot * factor
    along = tl.where(value == 0.0, 0.0, -inner / divisor)
    if has_grad_sigma != 0:
        along += tl.load(grad_sigma + layer).to(tl.float64)
    own = tl.load(row + FACTOR).to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
    tl.store(coefficients + 3 * layer, factor.to(tl.float32))
    tl.store(coefficients + 3 * layer + 1, (along / tl.load(row + VIEWS).to(tl.float64)).to(tl.float32))
    tl.store(coefficients + 3 * layer + 2, (dot / divisor * own).to(tl.float32))


@triton.jit(do_not_specialize=["has_grad_sigma"])
def inner_products(
    table,
    work,
    sigma,
    grad_sigma,
    has_grad_sigma,
    dots,
    coefficients,
    counters,
    KINDS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BC: tl.constexpr,
):
    """<G, W̄> of every weight. work: (weight, chunk, kind)."""
    item = work + 3 * tl.program_id(0)
    layer = tl.load(item)
    chunk = tl.load(item + 1)
    kind = tl.load(item + 2)
    row = table + layer * COLUMNS
    numel = tl.load(row + ROWS) * tl.load(row + B) * tl.load(row + K)
    start = chunk.to(tl.int64) * CHUNK
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            tl.store(dots + tl.load(row + FIRST_CHUNK) + chunk, _inner(row, start, numel, KINDS, i, CHUNK, STEP))
    if last_to_arrive(counters, layer, tl.load(row + CHUNKS).to(tl.int32)):
        _settle(row, layer, sigma, grad_sigma, has_grad_sigma, dots, coefficients, BC)


@triton.jit
def _gradient_rows(row, block, flat, alpha, along, KINDS: tl.constexpr, NUMBER: tl.constexpr):
    P: tl.constexpr = KINDS[NUMBER][0]
    Q: tl.constexpr = KINDS[NUMBER][1]
    BO: tl.constexpr = KINDS[NUMBER][2]
    BI: tl.constexpr = KINDS[NUMBER][3]
    USED: tl.constexpr = KINDS[NUMBER][4]
    K_: tl.constexpr = KINDS[NUMBER][5]
    KP: tl.constexpr = KINDS[NUMBER][6]
    KB: tl.constexpr = KINDS[NUMBER][7]
    VEC: tl.constexpr = KINDS[NUMBER][8]
    DTYPE: tl.constexpr = KINDS[NUMBER][9]
    OUT: tl.constexpr = KINDS[NUMBER][10]
    rows = tl.load(row + ROWS).to(tl.int32)
    b = tl.load(row + B).to(tl.int32)
    k = tl.load(row + K).to(tl.int32)
    stride = tl.load(row + GRADIENT_STRIDE)
    n = b * k
    gradient = tl.load(row + GRADIENT).to(tl.pointer_type(DTYPE))
    if VEC > 1:
        gradient = tl.multiple_of(gradient, 16)
        stride = (stride // VEC) * VEC
        n = (n // VEC) * VEC
        if KB:
            b = (b // VEC) * VEC
    out = tl.multiple_of(tl.load(row + RESULT).to(tl.pointer_type(OUT)), 16)
    o = block * BO + tl.arange(0, BO)
    lane = tl.arange(0, KP * BI if KB else BI)
    kk = lane // BI if KB else lane % K_
    in_rows = o < rows
    from_rows = gradient + o.to(tl.int64) * stride
    to_rows = out + o.to(tl.int64) * n
    x = flat + tl.load(row + FLAT + 1)
    z = flat + tl.load(row + FLAT + 3)
    if P:
        p = along * tl.load(flat + tl.load(row + FLAT) + o, mask=in_rows, other=0.0)
    if Q:
        q = along * tl.load(
            flat + tl.load(row + FLAT + 2) + o[:, None] * k + kk[None, :],
            mask=in_rows[:, None] & (kk < k)[None, :],
            other=0.0,
        )
    if KB:
        for begin in range(0, b, BI):
            i, inside, at = tile(begin, b, k, BI, KP)
            mask = in_rows[:, None] & inside[None, :]
            g = alpha * tl.load(from_rows[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
            if P:
                g += p[:, None] * tl.load(x + i * k + kk, mask=inside, other=0.0)[None, :]
            if Q:
                g += q * tl.load(z + i, mask=inside, other=0.0)[None, :]
            tl.store(to_rows[:, None] + at[None, :], g.to(out.dtype.element_ty), mask=mask)
    else:
        for begin in range(0, n, USED):
            at = begin + lane
            inside = (lane < USED) & (at < n)
            mask = in_rows[:, None] & inside[None, :]
            g = alpha * tl.load(from_rows[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
            if P:
                g += p[:, None] * tl.load(x + at, mask=inside, other=0.0)[None, :]
            if Q:
                g += q * tl.load(z + (begin // K_ + lane // K_), mask=inside, other=0.0)[None, :]
            tl.store(to_rows[:, None] + at[None, :], g.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["layers", "scales"])
def gradient(table, work, coefficients, flat, layers, scales, KINDS: tl.constexpr, BL: tl.constexpr):
    """dW of every weight. work: (weight, block of rows, kind). The first program adds up the derivatives by the scales,
    whose addresses come after the table's rows."""
    item = work + 3 * tl.program_id(0)
    layer = tl.load(item)
    kind = tl.load(item + 2)
    alpha = tl.load(coefficients + 3 * layer)
    along = tl.load(coefficients + 3 * layer + 1)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _gradient_rows(table + layer * COLUMNS, tl.load(item + 1), flat, alpha, along, KINDS, i)
    if tl.program_id(0) == 0:
        for scale in range(0, scales):
            total = tl.zeros((BL,), tl.float32)
            for begin in range(0, layers, BL):
                at = begin + tl.arange(0, BL)
                index = tl.load(table + at * COLUMNS + SCALE_INDEX, mask=at < layers, other=-1)
                part = tl.load(coefficients + 3 * at + 2, mask=at < layers, other=0.0)
                total += tl.where(index == scale, part, 0.0)
            address = tl.load(table + layers * COLUMNS + scale)
            tl.store(address.to(tl.pointer_type(tl.float32)), tl.sum(total, axis=0))
