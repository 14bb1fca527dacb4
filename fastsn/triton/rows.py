"""The two halves of an iteration over a block of rows, for the two orders in which the elements of a row may lie.

Rows of (b, k): a tile is BO rows by BI flat elements, of which USED, a multiple of K, count. Tiles follow each other by
USED elements, so that a lane keeps its position k, and what belongs to it, through the loop; loads are of 16 bytes for
any K. Where K is no power of two, positions and channels come together once per program, by way of memory: sums go to
the block's own part of the scratch, which the L1 and L2 caches hold.

Rows of (k, b), channels_last: a tile is BO rows by KP >= K positions of BI channels each, also flat, so that lanes lie
along the rows with every version of Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsn.triton.shared import tile


@triton.jit
def local_flat(
    starts, o, in_rows, n, x, z, q_raw, own, P: tl.constexpr, Q: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    USED: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """<row, x>, and the class matrix's q of every lane's position, which is also stored."""
    lane = tl.arange(0, BI)
    p_terms = tl.zeros((BO, BI // VEC), tl.float32)  # of the elements of one load: they are one thread's
    q_terms = tl.zeros((BO, BI), tl.float32)
    for begin in range(0, n, USED):
        at = begin + lane
        inside = (lane < USED) & (at < n)
        w = tl.load(starts[:, None] + at[None, :], mask=in_rows[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if P:
            products = w * tl.load(x + at, mask=inside, other=0.0)[None, :]
            p_terms += tl.sum(tl.reshape(products, (BO, BI // VEC, VEC)), axis=2)
        if Q:
            q_terms += w * tl.load(z + (begin // K + lane // K), mask=inside, other=0.0)[None, :]
    p = tl.sum(p_terms, axis=1)
    q = tl.zeros((BO, BI), tl.float32)
    if Q:
        kk = tl.arange(0, KP)
        here = tl.arange(0, BO)
        if K == KP:
            q_sums = tl.sum(tl.reshape(q_terms, (BO, BI // K, K)), axis=1)
        else:
            tl.store(own + here[:, None] * BI + lane[None, :], q_terms)
            tl.debug_barrier()
            # Channels at a time: half as many elements as a tile has.
            G: tl.constexpr = BI // KP // 2 if BI // KP > 1 else 1
            q_sums = tl.zeros((BO, KP), tl.float32)
            for begin in range(0, USED // K, G):
                i = begin + tl.arange(0, G)
                mask = (i < USED // K)[:, None] & (kk < K)[None, :]
                from_ = own + i[:, None] * K + kk[None, :]
                terms = tl.load(here[:, None, None] * BI + from_[None, :, :], mask=mask[None, :, :], other=0.0)
                q_sums += tl.sum(terms, axis=1)
        tl.store(q_raw + o[:, None] * K + kk[None, :], q_sums, mask=in_rows[:, None] & (kk < K)[None, :])
        tl.debug_barrier()
        q = tl.load(q_raw + o[:, None] * K + (lane % K)[None, :], mask=in_rows[:, None], other=0.0)
    return p, q


@triton.jit
def accumulate_flat(
    starts, in_rows, n, p, q, x_sums, z_sums, own, P: tl.constexpr, Q: tl.constexpr, BO: tl.constexpr,
    BI: tl.constexpr, USED: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of p times row, and of q times row."""
    lane = tl.arange(0, BI)
    for begin in range(0, n, USED):
        at = begin + lane
        inside = (lane < USED) & (at < n)
        w = tl.load(starts[:, None] + at[None, :], mask=in_rows[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if P:
            tl.store(x_sums + at, tl.sum(w * p[:, None], axis=0), mask=inside)
        if Q:
            z_terms = tl.sum(w * q, axis=0)
            if K == KP:
                i = tl.arange(0, BI // K)
                z_part = tl.sum(tl.reshape(z_terms, (BI // K, K)), axis=1)
                tl.store(z_sums + begin // K + i, z_part, mask=begin + i * K < n)
            else:
                tl.store(own + at, z_terms, mask=inside)
    if Q and K != KP:
        tl.debug_barrier()
        kk = tl.arange(0, KP)
        G: tl.constexpr = BO * BI // KP  # channels at a time: as many elements as a tile has
        for begin in range(0, n // K, G):
            i = begin + tl.arange(0, G)
            there = i < n // K
            mask = there[:, None] & (kk < K)[None, :]
            terms = tl.load(own + i[:, None] * K + kk[None, :], mask=mask, other=0.0)
            tl.store(z_sums + i, tl.sum(terms, axis=1), mask=there)


@triton.jit
def local_by_position(
    starts, o, in_rows, b, k, x, z, q_raw, P: tl.constexpr, Q: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    KP: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """<row, x>, and the class matrix's q of every lane's position, which is also stored."""
    kk = tl.arange(0, KP * BI) // BI
    p_terms = tl.zeros((BO, KP * BI // VEC), tl.float32)
    q_terms = tl.zeros((BO, KP * BI), tl.float32)
    for begin in range(0, b, BI):
        i, inside, at = tile(begin, b, k, BI, KP)
        mask = in_rows[:, None] & inside[None, :]
        w = tl.load(starts[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
        if P:
            products = w * tl.load(x + i * k + kk, mask=inside, other=0.0)[None, :]
            p_terms += tl.sum(tl.reshape(products, (BO, KP * BI // VEC, VEC)), axis=2)
        if Q:
            q_terms += w * tl.load(z + i, mask=inside, other=0.0)[None, :]
    q = tl.zeros((BO, KP * BI), tl.float32)
    if Q:
        each = tl.arange(0, KP)
        q_sums = tl.sum(tl.reshape(q_terms, (BO, KP, BI)), axis=2)
        tl.store(q_raw + o[:, None] * k + each[None, :], q_sums, mask=in_rows[:, None] & (each < k)[None, :])
        tl.debug_barrier()
        q = tl.load(q_raw + o[:, None] * k + kk[None, :], mask=in_rows[:, None] & (kk < k)[None, :], other=0.0)
    return tl.sum(p_terms, axis=1), q


@triton.jit
def accumulate_by_position(
    starts, in_rows, b, k, p, q, x_sums, z_sums, P: tl.constexpr, Q: tl.constexpr, BI: tl.constexpr, KP: tl.constexpr
):
    """Sums over the rows of p times row, and of q times row."""
    kk = tl.arange(0, KP * BI) // BI
    for begin in range(0, b, BI):
        i, inside, at = tile(begin, b, k, BI, KP)
        mask = in_rows[:, None] & inside[None, :]
        w = tl.load(starts[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
        if P:
            tl.store(x_sums + i * k + kk, tl.sum(w * p[:, None], axis=0), mask=inside)
        if Q:
            z_part = tl.sum(tl.reshape(tl.sum(w * q, axis=0), (KP, BI)), axis=0)
            channel = begin + tl.arange(0, BI)
            tl.store(z_sums + channel, z_part, mask=channel < b)
