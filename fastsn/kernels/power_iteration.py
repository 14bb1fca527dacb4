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
from fastsn.kernels.shared import ROW_AXIS, exponent_of, last_to_arrive, power_of_two, tile


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
    KP: tl.constexpr = KINDS[NUMBER][5]
    EXACT: tl.constexpr = KINDS[NUMBER][6]
    KB: tl.constexpr = KINDS[NUMBER][7]
    VEC: tl.constexpr = KINDS[NUMBER][8]
    DTYPE: tl.constexpr = KINDS[NUMBER][9]
    R: tl.constexpr = ROW_AXIS
    C: tl.constexpr = 1 - ROW_AXIS

    rows = tl.load(row + ROWS).to(tl.int32)
    b = tl.load(row + B).to(tl.int32)
    k = tl.load(row + K).to(tl.int32)
    blocks = tl.load(row + BLOCKS)
    stride = tl.load(row + STRIDE)
    weight = tl.load(row + WEIGHT).to(tl.pointer_type(DTYPE))
    if (
        VEC > 1
    ):  # the host has checked; said on values of this branch alone, for a hint holds wherever its value is used
        weight = tl.multiple_of(weight, 16)
        stride = (stride // VEC) * VEC
        if KP == 1 or KB:
            b = (b // VEC) * VEC
    p_raw = scratch + tl.load(row + SUMS)
    q_raw = p_raw + rows
    p_exponents = q_raw + rows * k
    q_exponents = p_exponents + blocks
    x_sums = q_exponents + blocks + block.to(tl.int64) * b * k
    z_sums = q_exponents + blocks + blocks * b * k + block.to(tl.int64) * b

    o = block * BO + tl.arange(0, BO)
    kk = tl.arange(0, KP)
    in_rows = o < rows
    in_q = in_rows[:, None] & (kk < k)[None, :]
    starts = weight + o.to(tl.int64) * stride
    p = tl.zeros((BO,), tl.float32)
    q = tl.zeros((BO, KP), tl.float32)

    if MODE != ACCUMULATE:
        # The second half of an iteration goes on from what the first has just made.
        x = state_of(row, 1, flat, 0 if MODE == LOCAL else first)
        z = state_of(row, 3, flat, 0 if MODE == LOCAL else first)
        p_terms = tl.zeros((BO, BI, KP) if C == 1 else (BI, BO, KP), tl.float32)
        q_terms = tl.zeros((BO, BI, KP) if C == 1 else (BI, BO, KP), tl.float32)
        for begin in range(0, b, BI):
            i, inside, at = tile(begin, b, k, BI, KP, EXACT, KB)
            w = tl.load(
                tl.expand_dims(starts, (C, 2)) + tl.expand_dims(at, R),
                mask=tl.expand_dims(in_rows, (C, 2)) & tl.expand_dims(inside, R),
                other=0.0,
            ).to(tl.float32)
            if P:
                p_terms += w * tl.expand_dims(tl.load(x + i[:, None] * k + kk[None, :], mask=inside, other=0.0), R)
            if Q:
                q_terms += w * tl.expand_dims(tl.load(z + i, mask=i < b, other=0.0), (R, 2))
        if P:
            p = tl.sum(tl.sum(p_terms, axis=2), axis=C)
            tl.store(p_raw + o, p, mask=in_rows)
        if Q:
            q = tl.sum(q_terms, axis=C)
            tl.store(q_raw + o[:, None] * k + kk[None, :], q, mask=in_q)

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
        for begin in range(0, b, BI):
            i, inside, at = tile(begin, b, k, BI, KP, EXACT, KB)
            w = tl.load(
                tl.expand_dims(starts, (C, 2)) + tl.expand_dims(at, R),
                mask=tl.expand_dims(in_rows, (C, 2)) & tl.expand_dims(inside, R),
                other=0.0,
            ).to(tl.float32)
            if P:
                x_part = tl.sum(w * tl.expand_dims(p, (C, 2)), axis=R)
                tl.store(x_sums + i[:, None] * k + kk[None, :], x_part, mask=inside)
            if Q:
                z_part = tl.sum(tl.sum(w * tl.expand_dims(q, C), axis=R), axis=1)
                tl.store(z_sums + i, z_part, mask=i < b)


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
