"""What the kernels of power iteration and of rescaling share: powers of two, channels_last tiles, who comes last."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(exponent):
    """2 ** exponent for a float that is whole; 0 below the range of normal numbers."""
    clipped = tl.minimum(tl.maximum(exponent, -127.0), 127.0)
    return ((clipped + 127.0).to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(x):
    """floor(log2 x) of a float32 that is not negative; -127 for 0 and what is not normal. At most 126, also for inf and
    NaN, so that its negative is the exponent of a normal number."""
    return tl.minimum(((x.to(tl.int32, bitcast=True) >> 23) & 255).to(tl.float32) - 127.0, 126.0)


@triton.jit
def tile(begin, b, k, BI: tl.constexpr, KP: tl.constexpr):
    """Channels begin..begin+BI of channels_last rows at every position, one position after the other: (b of every
    element, which are there, where they lie)."""
    lane = tl.arange(0, KP * BI)
    i = begin + lane % BI
    kk = lane // BI
    return i, (i < b) & (kk < k), i + kk * b


@triton.jit
def last_to_arrive(counters, layer, count):
    """Whether all others of the weight have come here; the counter is then 0 again for the next launch.

    The barrier orders what all threads of the program have stored before the release, by NVIDIA's memory model. On
    gfx942 the stores of the other waves may still be under way when they pass it, so that nothing orders them: there
    "auto" leaves weights to the reference.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counters + layer, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counters + layer, 0)
    return last
