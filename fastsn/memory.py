"""Memory that the C++ kernels keep for later results."""

from __future__ import annotations

import torch

from fastsn.backends import backends


def release_memory() -> int:
    """Give the CPU memory of earlier results back to the system; returns how many bytes.

    The C++ kernels keep the memory of large normalized weights and gradients that nobody holds any more for the next
    step: at most as much as was in use at once, and none that 512 later results have not needed. Call this when a model
    is gone and its memory is wanted elsewhere. Results that are still referenced stay as they are. On a GPU, results are of
    torch's own allocator: ``torch.cuda.empty_cache()``.
    """
    return int(torch.ops.fastsn._release_memory()) if backends()["cpp"].available else 0
