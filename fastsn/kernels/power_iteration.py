"""u <- M v / |M v|, v <- M^T u / |M^T u| for both views of all weights of a call, each weight read once.

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

from fastsn.kernels.finish import (
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
from fastsn.kernels.rows import accumulate_by_position, accumulate_flat, local_by_position, local_flat
from fastsn.kernels.shared import exponent_of, last_to_arrive, power_of_two


@triton.jit
def _scaled(raw, old, peak, bad, exponents, block):
    """Coefficients of the accumulating half: near 1 by a power of two that is noted. The old ones where all are 0, or
    one is ``bad``, that is not finite: then the block counts only if no other has anything better."""
    exponent = exponent_of(peak)
    nothing = (peak == 0.0) | (bad > 0)
    tl.store(exponents + block, tl.where(nothing, NOTHING, exponent))
    return tl.where(nothing, old, raw * power_of_two(-exponent))


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
    own = p_raw - (blocks - block) * ((BO if BO > 1 else 2) * BI)
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
            p, q = local_by_position(starts, o, in_rows, b, k, x, z, q_raw, P, Q, BO, BI, KP)
        else:
            p, q = local_flat(starts, o, in_rows, n, x, z, q_raw, own, P, Q, BO, BI, USED, K_, KP)
        if P:
            tl.store(p_raw + o, p, mask=in_rows)
    else:
        p = tl.zeros((BO,), tl.float32)
        q = tl.zeros((BO, LANES), tl.float32)

    if MODE == FUSED or MODE == ACCUMULATE:
        if P:
            p_old = tl.load(state_of(row, 0, flat, first) + o, mask=in_rows, other=0.0)
            if MODE == FUSED:
                size = tl.where(in_rows, tl.abs(p), 0.0)
                bad = tl.max(tl.where(size < float("inf"), 0, 1), axis=0)
                p = _scaled(p, p_old, tl.max(size, axis=0), bad, p_exponents, block)
            else:
                p = p_old
                tl.store(p_exponents + block, 0.0)
        if Q:
            q_old = tl.load(state_of(row, 2, flat, first) + o[:, None] * k + kk[None, :], mask=in_q, other=0.0)
            if MODE == FUSED:
                sizes = tl.where(in_q, tl.abs(q), 0.0)
                bad = tl.max(tl.max(tl.where(sizes < float("inf"), 0, 1), axis=1), axis=0)
                peak = tl.max(tl.max(sizes, axis=1), axis=0)
                q = _scaled(q, q_old, peak, bad, q_exponents, block)
            else:
                q = q_old
                tl.store(q_exponents + block, 0.0)
        if KB:
            accumulate_by_position(starts, in_rows, b, k, p, q, x_sums, z_sums, P, Q, BI, KP)
        else:
            accumulate_flat(starts, in_rows, n, p, q, x_sums, z_sums, own, P, Q, BI, USED, K_, KP)


@triton.jit
def _block_item(table, item, flat, sigma, scratch, counters, first, store, KINDS: tl.constexpr, FINISH: tl.constexpr):
    layer = tl.load(item)
    row = table + layer * COLUMNS
    kind = tl.load(item + 2)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            block_of_rows(row, tl.load(item + 1), flat, scratch, first, KINDS, i)
    if tl.load(item + 4) == 0:
        if last_to_arrive(counters, layer, tl.load(row + BLOCKS).to(tl.int32)):
            finish(row, tl.load(item + 3), 0, flat, sigma, scratch, first, store, FINISH)


@triton.jit
def _columns_item(table, item, flat, sigma, scratch, counters, first, store, FINISH: tl.constexpr):
    BG: tl.constexpr = FINISH[0]
    BC: tl.constexpr = FINISH[1]
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


@triton.jit(do_not_specialize=["first", "store"])
def iterate(table, work, flat, sigma, scratch, counters, first, store, KINDS: tl.constexpr, FINISH: tl.constexpr):
    """Blocks of rows. work, per program: (weight, block, kind, mode, 1 if another launch adds the blocks up)."""
    item = work + 5 * tl.program_id(0)
    _block_item(table, item, flat, sigma, scratch, counters, first, store, KINDS, FINISH)


@triton.jit(do_not_specialize=["first", "store"])
def reduce(table, work, flat, sigma, scratch, counters, first, store, FINISH: tl.constexpr):
    """Sums of weights with many blocks. work, per program: (weight, tile of columns, -1, mode, tiles)."""
    _columns_item(table, work + 5 * tl.program_id(0), flat, sigma, scratch, counters, first, store, FINISH)


@triton.jit
def _all_programs(barrier):
    """Waits for every program of the grid, all of which must be running: a cooperative launch. The counter only grows,
    by a multiple of the grid, so that nobody has to reset it."""
    programs = tl.num_programs(0)
    tl.debug_barrier()
    target = (tl.atomic_add(barrier, 1, sem="acq_rel", scope="gpu") // programs + 1) * programs
    while tl.atomic_add(barrier, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rounds", "store"])
def iterate_together(
    table, work, phases, flat, sigma, scratch, counters, barrier, rounds, store,
    PHASES: tl.constexpr, KINDS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """All rounds and their phases in one launch, a barrier after each. phases: where each phase's work ends."""
    programs = tl.num_programs(0)
    for round_ in range(0, rounds):
        first = tl.where(round_ == 0, 1, 0)
        begin = 0
        for phase in range(0, PHASES):
            end = tl.load(phases + phase)
            for j in range(begin + tl.program_id(0), end, programs):
                item = work + 5 * j
                if tl.load(item + 2) >= 0:
                    _block_item(table, item, flat, sigma, scratch, counters, first, store, KINDS, FINISH)
                else:
                    _columns_item(table, item, flat, sigma, scratch, counters, first, store, FINISH)
            begin = end
            if (phase < PHASES - 1) | (round_ < rounds - 1):
                _all_programs(barrier)
