"""Images, from archives to batches on the device."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Names of the engine that reads no data folders; late, because preparing data needs no torch."""
    if name in ("Batches", "Dataset", "Noise", "digits", "to_float", "to_uint8"):
        return getattr(importlib.import_module("gan.data.old"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
