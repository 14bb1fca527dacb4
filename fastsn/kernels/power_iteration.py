"""u <- M v / |M v|, v <- M^T u / |M^T u| for both views of all weights of a call, each weight read once.

A program takes a block of rows of one weight. The local half gives p = <row, x> (row matrix: u from v) and
q[k] = sum_b w[b, k] z[b] (class matrix) for its rows; the accumulating half adds p · row into x and q · row into z,
from the same block while it is near. Sums over blocks are written apart and added up in the order of the blocks by the
program that arrives last, or, where those are many, by a second launch: no float atomics, so the same bits every time.

p and q are not divided by their norms before the end. Each block brings its own near 1 by a power of two, so that
weights of any size come out exact; where they are all zero, it takes the old vector instead, so that v still moves.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a program does, and what is finished when the last one of a weight is done.
FUSED = tl.constexpr(0)  # both halves: one iteration of a weight whose rows are output channels
ACCUMULATE = tl.constexpr(1)  # the first half of an iteration of a turned weight: u from the v in force
LOCAL = tl.constexpr(2)  # its second half: v from that u
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
def power_of_two(exponent):
    """2 ** exponent for a float that is whole; 0 below the range of normal numbers."""
    clipped = tl.minimum(tl.maximum(exponent, -127.0), 127.0)
    return ((clipped + 127.0).to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(x):
    """floor(log2 x) of a float32 that is not negative; -127 for 0 and what is not normal, 128 for inf and NaN."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255).to(tl.float32) - 127.0


@triton.jit
def tile(i, kk, b, k, BK: tl.constexpr, KB: tl.constexpr):
    """Where elements (b, k) of a row lie. BK: k where it is known when compiling, which makes wide loads possible."""
    if KB:
        return i[:, None] + kk[None, :] * b
    elif BK > 0:
        return i[:, None] * BK + kk[None, :]
    else:
        return i[:, None] * k + kk[None, :]


@triton.jit
def state_of(row, which, flat, first):
    """Where vector ``which`` (p, x, q, z) is read: what is stored, or, after an iteration, the flat result."""
    stored = tl.load(row + STATE + which)
    new = flat.to(tl.int64) + 4 * tl.load(row + FLAT + which)
    return tl.where(first != 0, stored, new).to(tl.pointer_type(tl.float32))


@triton.jit
def _scaled(raw, old, peak, exponents, block):
    """Coefficients of the accumulating half: near 1 by a power of two that is noted; the old ones where all are 0."""
    exponent = exponent_of(peak)
    nothing = peak == 0.0
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
    BK: tl.constexpr = KP if EXACT else 0

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
        p_terms = tl.zeros((BO, BI, KP), tl.float32)
        q_terms = tl.zeros((BO, BI, KP), tl.float32)
        for begin in range(0, b, BI):
            i = begin + tl.arange(0, BI)
            if EXACT:
                inside = tl.broadcast_to((i < b)[:, None], (BI, KP))
            else:
                inside = (i < b)[:, None] & (kk < k)[None, :]
            at = tile(i, kk, b, k, BK, KB)
            w = tl.load(
                starts[:, None, None] + at[None, :, :], mask=in_rows[:, None, None] & inside[None, :, :], other=0.0
            )
            if P:
                p_terms += (
                    w.to(tl.float32) * tl.load(x + i[:, None] * k + kk[None, :], mask=inside, other=0.0)[None, :, :]
                )
            if Q:
                q_terms += w.to(tl.float32) * tl.load(z + i, mask=i < b, other=0.0)[None, :, None]
        if P:
            p = tl.sum(tl.sum(p_terms, axis=2), axis=1)
            tl.store(p_raw + o, p, mask=in_rows)
        if Q:
            q = tl.sum(q_terms, axis=1)
            tl.store(q_raw + o[:, None] * k + kk[None, :], q, mask=in_q)

    if MODE == FUSED or MODE == ACCUMULATE:
        if P:
            p_old = tl.load(state_of(row, 0, flat, first) + o, mask=in_rows, other=0.0)
            if MODE == FUSED:
                p = _scaled(p, p_old, tl.max(tl.where(in_rows, tl.abs(p), 0.0), axis=0), p_exponents, block)
            else:
                p = p_old
                tl.store(p_exponents + block, 0.0)
        if Q:
            q_old = tl.load(state_of(row, 2, flat, first) + o[:, None] * k + kk[None, :], mask=in_q, other=0.0)
            if MODE == FUSED:
                peak = tl.max(tl.max(tl.where(in_q, tl.abs(q), 0.0), axis=1), axis=0)
                q = _scaled(q, q_old, peak, q_exponents, block)
            else:
                q = q_old
                tl.store(q_exponents + block, 0.0)
        for begin in range(0, b, BI):
            i = begin + tl.arange(0, BI)
            if EXACT:
                inside = tl.broadcast_to((i < b)[:, None], (BI, KP))
            else:
                inside = (i < b)[:, None] & (kk < k)[None, :]
            at = tile(i, kk, b, k, BK, KB)
            w = tl.load(
                starts[:, None, None] + at[None, :, :], mask=in_rows[:, None, None] & inside[None, :, :], other=0.0
            )
            if P:
                x_part = tl.sum(w.to(tl.float32) * p[:, None, None], axis=0)
                tl.store(x_sums + i[:, None] * k + kk[None, :], x_part, mask=inside)
            if Q:
                z_part = tl.sum(tl.sum(w.to(tl.float32) * q[:, None, :], axis=0), axis=1)
                tl.store(z_sums + i, z_part, mask=i < b)


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
            # Where p is nothing but zeros, the old vector has taken its place.
            nothing = top == NOTHING
            measured = mode == MEASURE
            left = tl.where(nothing, coefficients.to(tl.int64), raw.to(tl.int64)).to(tl.pointer_type(tl.float32))
            right = tl.where(nothing | measured, coefficients.to(tl.int64), raw.to(tl.int64))
            product = _product(left, right.to(tl.pointer_type(tl.float32)), raw_n, BT)
            squares = _product(sums, sums, tl.where(accumulated, sums_n, 0), BT)
            nan = float("nan")
            norm = tl.sqrt(tl.abs(product))
            sums_norm = tl.sqrt(squares)
            # sigma is |M^T p| / |p|; |p| where only that is there; u^T M v where nothing is iterated.
            used = tl.where(nothing, norm, norm * power_of_two(-top))
            ratio = sums_norm / tl.where(used == 0.0, 1.0, used)
            fused = tl.where(_sound(sums_norm), ratio, tl.where(sums_norm == 0.0, 0.0, nan))
            local = tl.where(_sound(norm) | (norm == 0.0), norm, nan)
            value = tl.where(measured, product, tl.where(mode == LOCAL, local, fused))
            raw_norm = tl.where(((mode == FUSED) & (top != NOTHING)) | (mode == LOCAL), norm, nan)
            tl.debug_barrier()  # the old vectors have been read by all before any is written
            _take(row, 2 * view, raw, raw_norm, raw_n, flat, first, store, BT)
            # The second half of a turned weight's iteration finds x where the first half has put it.
            x_first = tl.where(mode == LOCAL, 0, first)
            _take(row, 2 * view + 1, sums, tl.where(accumulated, sums_norm, nan), sums_n, flat, x_first, store, BT)
            if mode != ACCUMULATE:
                tl.store(sigma + place, value.to(tl.float32))


@triton.jit
def last_to_arrive(counters, layer, count):
    """Whether all others of the weight have come here; the counter is then 0 again for the next launch."""
    tl.debug_barrier()
    last = tl.atomic_add(counters + layer, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counters + layer, 0)
    return last


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


@triton.jit
def iterate(table, work, flat, sigma, scratch, counters, first, store, KINDS: tl.constexpr, FINISH: tl.constexpr):
    """Blocks of rows. work, per program: (weight, block, kind, mode, 1 if another launch adds the blocks up)."""
    item = work + 5 * tl.program_id(0)
    _block_item(table, item, flat, sigma, scratch, counters, first, store, KINDS, FINISH)


@triton.jit
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


@triton.jit
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
