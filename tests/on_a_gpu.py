"""For tests that need a GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# conftest.py asks for Triton's interpreter unless TRITON_INTERPRET=0 is set: no step with it can be captured.
HAS_KERNELS = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "0"


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """RuntimeError for whatever makes Python wait for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
