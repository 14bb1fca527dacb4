"""The memory pool of the C++ kernels."""

from __future__ import annotations

import torch

from fastsn.backends import backends


def release_memory() -> int:
    """Return the CPU memory cached by the C++ kernels to the system; returns the number of bytes.

    The kernels cache the memory of freed large results (normalized weights and gradients) for the next step: at most
    as much as was in use at once, and none that went unused for 512 results. Call this after deleting a model.
    Tensors that are still referenced are not affected. On a GPU use ``torch.cuda.empty_cache()``, as results come from
    torch's allocator.
    """
    return int(torch.ops.fastsn._release_memory()) if backends()["cpp"].available else 0
