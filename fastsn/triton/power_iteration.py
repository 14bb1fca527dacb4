"""u <- M v / |M v|, v <- M^T u / |M^T u| for both views of all weights of a call, in this order or the other. A weight
is read once where the vector that has entries for its rows comes first, otherwise once for each half.

A program takes a block of rows of one weight. The local half gives p = <row, x> (row matrix: u from v) and
q[k] = sum_b w[b, k] z[b] (class matrix) for its rows; the accumulating half adds p · row into x and q · row into z,
from the same block while it is near. Sums over blocks are written apart and added up in the order of the blocks by the
program that arrives last, or, where those are many, by a second launch: no float atomics, so the same bits every time.

p and q are not divided by their norms before the end. Each block brings its own near 1 by a power of two, so that
weights of any normal size come out exact; where they are all zero, it takes the old vector instead, so that v moves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsn.triton.finish import (
    ACCUMULATE,
    BLOCKS,
    COLUMNS,
    FUSED,
    LOCAL,
    NOTHING,
    ROWS,
    SIGMA,
    STRIDE,
    SUMS,
    WEIGHT,
    B,
    K,
    finish,
    gather,
    state_of,
)
from fastsn.triton.rows import accumulate_by_position, accumulate_flat, local_by_position, local_flat
from fastsn.triton.shared import exponent_of, last_to_arrive, power_of_two


@triton.jit
def _scaled(raw, old, mask, peak, bad, exponents, block):
    """Coefficients of the accumulating half: near 1 by a power of two that is noted. The old ones where all are 0, or
    one is ``bad``, that is not finite: then the block counts only if no other has anything better."""
    exponent = exponent_of(peak)
    if (peak == 0.0) | (bad > 0):
        tl.store(exponents + block, NOTHING)
        scaled = tl.load(old, mask=mask, other=0.0)
    else:
        tl.store(exponents + block, exponent)
        scaled = raw * power_of_two(-exponent)
    return scaled


@triton.jit
def block_of_rows(row, block, flat, scratch, first, KINDS: tl.constexpr, NUMBER: tl.constexpr):
    """Both halves, or one of them, over a block of rows."""
    MODE: tl.constexpr = KINDS[NUMBER][0]
    P: tl.constexpr = KINDS[NUMBER][1]
    Q: tl.constexpr = KINDS[NUMBER][2]
    BO: tl.constexpr = KINDS[NUMBER][3]
    BI: tl.constexpr = KINDS[NUMBER][4]
    USED: tl.constexpr = KINDS[NUMBER][5]
    K_: tl.constexpr = KINDS[NUMBER][6]
    KP: tl.constexpr = KINDS[NUMBER][7]
    KB: tl.constexpr = KINDS[NUMBER][8]
    VEC: tl.constexpr = KINDS[NUMBER][9]
    DTYPE: tl.constexpr = KINDS[NUMBER][10]

    rows = tl.load(row + ROWS).to(tl.int32)
    b = tl.load(row + B).to(tl.int32)
    k = tl.load(row + K).to(tl.int32)
    blocks = tl.load(row + BLOCKS)
    stride = tl.load(row + STRIDE)
    weight = tl.load(row + WEIGHT).to(tl.pointer_type(DTYPE))
    n = b * k
    p_raw = scratch + tl.load(row + SUMS)
    q_raw = p_raw + rows
    p_exponents = q_raw + rows * k
    q_exponents = p_exponents + blocks
    x_sums = q_exponents + blocks + block.to(tl.int64) * n
    z_sums = q_exponents + blocks + blocks * n + block.to(tl.int64) * b
    own = p_raw - (blocks - block) * ((tl.maximum(n, BO * BI) + 3) // 4 * 4)
    if BI % 4 == 0:
        own = tl.multiple_of(own, 16)
    if (
        VEC > 1
    ):  # the host has checked; said on values of this branch alone, for a hint holds wherever its value is used
        weight = tl.multiple_of(weight, 16)
        stride = (stride // VEC) * VEC
        n = (n // VEC) * VEC
        if KB:
            b = (b // VEC) * VEC

    o = block * BO + tl.arange(0, BO)
    in_rows = o < rows
    LANES: tl.constexpr = KP * BI if KB else BI
    lane = tl.arange(0, LANES)
    kk = lane // BI if KB else lane % K_
    in_q = in_rows[:, None] & (kk < k)[None, :]
    starts = weight + o.to(tl.int64) * stride

    if MODE != ACCUMULATE:
        # The second half of an iteration goes on from what the first has just made.
        x = state_of(row, 1, flat, 0 if MODE == LOCAL else first)
        z = state_of(row, 3, flat, 0 if MODE == LOCAL else first)
        if KB:
            p, q = local_by_position(starts, o, in_rows, b, k, x, z, q_raw, P, Q, BO, BI, KP, VEC)
        else:
            p, q = local_flat(starts, o, in_rows, n, x, z, q_raw, own, P, Q, BO, BI, USED, K_, KP, VEC)
        if P:
            tl.store(p_raw + o, p, mask=in_rows)
    else:
        p = tl.zeros((BO,), tl.float32)
        q = tl.zeros((BO, LANES), tl.float32)

    if MODE == FUSED or MODE == ACCUMULATE:
        if P:
            p_old = state_of(row, 0, flat, first) + o
            if MODE == FUSED:
                size = tl.where(in_rows, tl.abs(p), 0.0)
                bad = tl.max(tl.where(size < float("inf"), 0, 1), axis=0)
                p = _scaled(p, p_old, in_rows, tl.max(size, axis=0), bad, p_exponents, block)
            else:
                p = tl.load(p_old, mask=in_rows, other=0.0)
                tl.store(p_exponents + block, 0.0)
        if Q:
            q_old = state_of(row, 2, flat, first) + o[:, None] * k + kk[None, :]
            if MODE == FUSED:
                sizes = tl.where(in_q, tl.abs(q), 0.0)
                bad = tl.max(tl.max(tl.where(sizes < float("inf"), 0, 1), axis=1), axis=0)
                peak = tl.max(tl.max(sizes, axis=1), axis=0)
                q = _scaled(q, q_old, in_q, peak, bad, q_exponents, block)
            else:
                q = tl.load(q_old, mask=in_q, other=0.0)
                tl.store(q_exponents + block, 0.0)
        if KB:
            accumulate_by_position(starts, in_rows, b, k, p, q, x_sums, z_sums, P, Q, BI, KP)
        else:
            accumulate_flat(starts, in_rows, n, p, q, x_sums, z_sums, own, P, Q, BO, BI, USED, K_, KP)


@triton.jit(do_not_specialize=["first", "store"])
def iterate(table, work, flat, sigma, scratch, counters, first, store, KINDS: tl.constexpr, FINISH: tl.constexpr):
    """Blocks of rows. work, per program: (weight, block, kind, mode, 1 if another launch adds the blocks up)."""
    item = work + 5 * tl.program_id(0)
    layer = tl.load(item)
    row = table + layer * COLUMNS
    kind = tl.load(item + 2)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            block_of_rows(row, tl.load(item + 1), flat, scratch, first, KINDS, i)
    if tl.load(item + 4) == 0:
        if last_to_arrive(counters, layer, tl.load(row + BLOCKS).to(tl.int32)):
            finish(row, tl.load(item + 3), 0, flat, sigma, scratch, first, store, FINISH)


@triton.jit(do_not_specialize=["first", "store"])
def reduce(table, work, flat, sigma, scratch, counters, first, store, FINISH: tl.constexpr):
    """Sums of weights with many blocks. work, per program: (weight, tile of columns, -1, mode, tiles)."""
    BG: tl.constexpr = FINISH[0]
    BC: tl.constexpr = FINISH[1]
    item = work + 5 * tl.program_id(0)
    layer = tl.load(item)
    row = table + layer * COLUMNS
    rows = tl.load(row + ROWS).to(tl.int32)
    b = tl.load(row + B).to(tl.int32)
    k = tl.load(row + K).to(tl.int32)
    blocks = tl.load(row + BLOCKS)
    exponents = scratch + tl.load(row + SUMS) + rows + rows * k
    x_sums = exponents + 2 * blocks
    begin = tl.load(item + 1) * BC
    if (tl.load(row + SIGMA) >= 0) & (begin < b * k):
        gather(x_sums, b * k, exponents, blocks, begin, BG, BC)
    if (tl.load(row + SIGMA + 1) >= 0) & (begin < b):
        gather(x_sums + blocks * b * k, b, exponents + blocks, blocks, begin, BG, BC)
    if last_to_arrive(counters, layer, tl.load(item + 4)):
        finish(row, tl.load(item + 3), 1, flat, sigma, scratch, first, store, FINISH)
