"""What follows the blocks of an iteration: their sums are added up, norms taken, u, v and sigma written."""

from __future__ import annotations

import triton
import triton.language as tl

from fastsn.triton.shared import exponent_of, power_of_two

# What a program does, and what is finished when the last one of a weight is done.
# The vector of rows is u; of a turned weight, whose rows are input channels, v. That of columns is the other one.
FUSED = tl.constexpr(0)  # a round in which the vector of rows comes first: both halves
ACCUMULATE = tl.constexpr(1)  # of another round the first half: the vector of columns from that of rows
LOCAL = tl.constexpr(2)  # and the second: the vector of rows from that of columns
MEASURE = tl.constexpr(3)  # no iteration: sigma = u^T M v

# Columns of the table, one row of int64 per weight. Addresses, and offsets into the flat tensors of a call.
WEIGHT = tl.constexpr(0)
STRIDE = tl.constexpr(1)
ROWS = tl.constexpr(2)
B = tl.constexpr(3)
K = tl.constexpr(4)
BLOCKS = tl.constexpr(5)
SUMS = tl.constexpr(6)  # of scratch: p, q, exponents of both, sums of x, sums of z
STATE = tl.constexpr(7)  # four addresses of what is stored: p, x, q, z; 0 where there is no such view
FLAT = tl.constexpr(11)  # four offsets into the flat vectors
SIGMA = tl.constexpr(15)  # two: of the row matrix, of the class matrix
COLUMNS = tl.constexpr(17)

NOTHING = tl.constexpr(-1000.0)  # the exponent of a block whose p is zero


@triton.jit
def state_of(row, which, flat, first):
    """Where vector ``which`` (p, x, q, z) is read: what is stored, or, after an iteration, the flat result."""
    stored = tl.load(row + STATE + which)
    new = flat.to(tl.int64) + 4 * tl.load(row + FLAT + which)
    return tl.where(first != 0, stored, new).to(tl.pointer_type(tl.float32))


@triton.jit
def top_exponent(exponents, blocks, BG: tl.constexpr):
    """The largest of a weight's blocks."""
    top = tl.full((BG,), NOTHING, tl.float32)
    for begin in range(0, blocks, BG):
        j = begin + tl.arange(0, BG)
        top = tl.maximum(top, tl.load(exponents + j, mask=j < blocks, other=NOTHING))
    return tl.max(top, axis=0)


@triton.jit
def gather(sums, n, exponents, blocks, begin, BG: tl.constexpr, BC: tl.constexpr):
    """Adds up the blocks' sums of columns begin..begin+BC in the order of the blocks, in the place of block 0."""
    top = top_exponent(exponents, blocks, BG)
    at = begin + tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float32)
    for first in range(0, blocks, BG):
        j = first + tl.arange(0, BG)
        # Blocks of nothing count only where there is nothing else: there they hold what the old vector gives.
        weight = power_of_two(tl.load(exponents + j, mask=j < blocks, other=NOTHING) - top)
        part = tl.load(
            sums + j[:, None].to(tl.int64) * n + at[None, :], mask=(j < blocks)[:, None] & (at < n)[None, :], other=0.0
        )
        total += tl.sum(part * weight[:, None], axis=0)
    tl.store(sums + at, total, mask=at < n)


@triton.jit
def _product(x, y, n, BT: tl.constexpr):
    """x · y in float64, in which the squares of any float32 have room."""
    total = tl.zeros((BT,), tl.float64)
    for begin in range(0, n, BT):
        at = begin + tl.arange(0, BT)
        left = tl.load(x + at, mask=at < n, other=0.0).to(tl.float64)
        total += left * tl.load(y + at, mask=at < n, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _sound(norm):
    return (norm > 0.0) & (norm < 1e300)  # false for NaN


@triton.jit
def _take(row, which, x, norm, n, flat, first, store, BT: tl.constexpr):
    """Vector ``which`` becomes x / norm; what it was, if the norm is bad (NaN where nothing new was made)."""
    old = state_of(row, which, flat, first)
    stored = tl.load(row + STATE + which).to(tl.pointer_type(tl.float32))
    result = flat + tl.load(row + FLAT + which)
    ok = _sound(norm)
    power = power_of_two(-exponent_of(norm.to(tl.float32)))
    inverse = (1.0 / tl.where(ok, norm * power, 1.0)).to(tl.float32)
    for begin in range(0, n, BT):
        at = begin + tl.arange(0, BT)
        kept = tl.load(old + at, mask=at < n, other=0.0)
        value = tl.where(ok, tl.load(x + at, mask=at < n, other=0.0) * power * inverse, kept)
        tl.store(result + at, value, mask=at < n)
        if store != 0:
            tl.store(stored + at, value, mask=at < n)


@triton.jit
def finish(row, mode, gathered, flat, sigma, scratch, first, store, FINISH: tl.constexpr):
    """What is left of a weight when all of its blocks are done: sums over the blocks, vectors, sigma."""
    BG: tl.constexpr = FINISH[0]
    BC: tl.constexpr = FINISH[1]
    BT: tl.constexpr = FINISH[2]
    rows = tl.load(row + ROWS).to(tl.int32)
    b = tl.load(row + B).to(tl.int32)
    k = tl.load(row + K).to(tl.int32)
    blocks = tl.load(row + BLOCKS)
    p_raw = scratch + tl.load(row + SUMS)
    p_exponents = p_raw + rows + rows * k
    x_sums = p_exponents + 2 * blocks
    accumulated = mode <= ACCUMULATE
    for view in range(0, 2):  # the row matrix (p and x), the class matrix (q and z)
        place = tl.load(row + SIGMA + view)
        if place >= 0:
            raw = p_raw + view * rows
            raw_n = tl.where(view == 0, rows, rows * k)
            exponents = p_exponents + view * blocks
            sums = x_sums + view * blocks * b * k
            sums_n = tl.where(view == 0, b * k, b)
            if accumulated & (gathered == 0):
                for begin in range(0, sums_n, BC):
                    gather(sums, sums_n, exponents, blocks, begin, BG, BC)
                tl.debug_barrier()
            coefficients = state_of(row, 2 * view, flat, first)
            top = tl.where(mode == FUSED, top_exponent(exponents, blocks, BG), 0.0)
            # Where p is nothing but zeros, or nowhere finite, the old unit vector has taken its place.
            nothing = top == NOTHING
            measured = mode == MEASURE
            right = tl.where(measured, coefficients.to(tl.int64), raw.to(tl.int64)).to(tl.pointer_type(tl.float32))
            product = _product(raw, right, raw_n, BT)
            squares = _product(sums, sums, tl.where(accumulated, sums_n, 0), BT)
            nan = float("nan")
            norm = tl.sqrt(tl.abs(product))
            sums_norm = tl.sqrt(squares)
            # sigma is |M^T p| / |p|; |p| where only that is there; u^T M v where nothing is iterated.
            used = tl.where(nothing, 1.0, norm * power_of_two(-top))
            ratio = tl.where(_sound(sums_norm) & _sound(used), sums_norm / tl.where(used == 0.0, 1.0, used), nan)
            fused = tl.where(sums_norm == 0.0, 0.0, ratio)
            local = tl.where(_sound(norm) | (norm == 0.0), norm, nan)
            value = tl.where(measured, product, tl.where(mode == LOCAL, local, fused))
            raw_norm = tl.where(((mode == FUSED) & (top != NOTHING)) | (mode == LOCAL), norm, nan)
            _take(row, 2 * view, raw, raw_norm, raw_n, flat, first, store, BT)
            # The second of two halves finds x where the first has put it.
            x_first = tl.where(mode == LOCAL, 0, first)
            _take(row, 2 * view + 1, sums, tl.where(accumulated, sums_norm, nan), sums_n, flat, x_first, store, BT)
            if mode != ACCUMULATE:
                tl.store(sigma + place, value.to(tl.float32))
